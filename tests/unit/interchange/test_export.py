"""The export command: verified or nothing, and never over other people's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.export import main
from ldm_scale.interchange import load, verify
from ldm_scale.interchange import publish as publish_module
from ldm_scale.interchange.artifact import (
    Artifact,
    DiffusionArtifact,
    fill_artifact_folder,
    read_artifact,
    read_diffusion_artifact,
    write_artifact,
    write_diffusion_artifact,
)
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from ldm_scale.interchange.load import read_source
from ldm_scale.interchange.publish import publish


@pytest.fixture
def model(tmp_path: Path, diffusion_artifact: DiffusionArtifact) -> Path:
    write_diffusion_artifact(tmp_path / "model", diffusion_artifact)
    return tmp_path / "model"


def test_diffusers_export_reports_its_differences(
    tmp_path: Path, model: Path, diffusion_artifact: DiffusionArtifact, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(model), "--to", "diffusers", "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(out)
    assert (report["to"], report["kind"]) == ("diffusers", "diffusion")
    assert report["content_sha256"] == diffusion_artifact.content_hash
    assert set(report["differences"]) == {
        "autoencoder's latents",
        "autoencoder's posterior",
        "autoencoder's pixels",
        "text encoder",
        "UNet",
    }
    assert all(difference <= 1e-4 for difference in report["differences"].values())
    card = (out / "README.md").read_text()
    assert diffusion_artifact.content_hash in card
    assert f"| UNet | {report['differences']['UNet']:.1e} |" in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]


def test_there_and_back(tmp_path: Path, model: Path, diffusion_artifact: DiffusionArtifact) -> None:
    assert main([str(model), "--to", "diffusers", "--out", str(tmp_path / "a")]) == 0
    assert main([str(tmp_path / "a"), "--to", "safetensors", "--out", str(tmp_path / "b")]) == 0
    back = read_diffusion_artifact(tmp_path / "b")
    assert back.content_hash == diffusion_artifact.content_hash
    assert all(torch.equal(back.state[name], tensor) for name, tensor in diffusion_artifact.state.items())


def test_an_autoencoder_alone(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    a = autoencoder_artifact
    write_artifact(tmp_path / "a", a.state, a.config, a.statistics, a.provenance)
    assert main([str(tmp_path / "a"), "--to", "diffusers", "--out", str(tmp_path / "kl")]) == 0
    assert json.loads((tmp_path / "kl" / "config.json").read_text())["scaling_factor"] == 0.7
    assert main([str(tmp_path / "kl"), "--to", "safetensors", "--out", str(tmp_path / "b")]) == 0
    assert read_artifact(tmp_path / "b").content_hash == a.content_hash


def test_untrained_models(tmp_path: Path) -> None:
    source = [
        "experiment=demo_text",
        "unet.base_channels=16",
        "unet.norm_groups=4",
        "unet.head_dim=16",
        "conditioning.width=16",
        "conditioning.num_heads=2",
        "conditioning.depth=1",
    ]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = str(tmp_path / name)
        assert main([*source, "--random-init", "--seed", seed, "--to", "diffusers", "--out", out]) == 0
    a, b, c = (read_source(tmp_path / name) for name in "abc")
    assert isinstance(a, DiffusionArtifact)
    assert a.content_hash == b.content_hash != c.content_hash
    assert not a.state["unet.conv_out.weight"].any(), "a run starts with its output layer at zero"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=demo_text"], "add --random-init"),
        (["a", "b"], r"2 sources given \(a, b\)"),
        (["a", "--seed", "1"], "--seed 1 only chooses"),
        (["experiment=demo_text", "--random-init", "--weights", "ema"], "--weights ema: an untrained model"),
        (["experiment=demo_text", "unet.head_dim=7", "--random-init"], r"unet\.head_dim=7"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main([*arguments, "--to", "diffusers", "--out", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_only_earlier_exports_are_replaced(
    tmp_path: Path, diffusion_artifact: DiffusionArtifact, autoencoder_artifact: Artifact
) -> None:
    out = tmp_path / "out"
    publish(autoencoder_artifact, "diffusers", out)
    publish(diffusion_artifact, "safetensors", out)
    assert read_source(out).content_hash == diffusion_artifact.content_hash
    a = autoencoder_artifact
    write_artifact(tmp_path / "artifact", a.state, a.config, a.statistics, a.provenance)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    for name in ("artifact", "photos"):
        with pytest.raises(CheckpointError, match=f"{name} holds files that this command did not write"):
            publish(diffusion_artifact, "diffusers", tmp_path / name)
    assert read_artifact(tmp_path / "artifact").content_hash == a.content_hash


def damage(path: Path, name: str) -> None:
    state = load_file(path)
    state[name] = state[name].flip(0)
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "mid_block.resnets.0.norm1.weight"),
        ("text_encoder/model.safetensors", "text_model.final_layer_norm.bias"),
    ],
)
def test_a_tensor_that_is_not_read_back_fails_the_export(
    tmp_path: Path,
    diffusion_artifact: DiffusionArtifact,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    tensor: str,
) -> None:
    def fill_and_damage(folder: Path, artifact: Artifact | DiffusionArtifact) -> None:
        fill_diffusers_folder(folder, artifact)
        damage(folder / file, tensor)

    monkeypatch.setattr("ldm_scale.interchange.diffusers.fill_diffusers_folder", fill_and_damage)
    with pytest.raises(CheckpointError, match=r"is read back with other values"):
        publish(diffusion_artifact, "diffusers", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "key", "value", "part"),
    [
        ("vae/config.json", "scaling_factor", 0.5, "autoencoder's latents"),
        ("unet/config.json", "attention_head_dim", 1, "UNet"),
        ("text_encoder/config.json", "hidden_act", "quick_gelu", "text encoder"),
    ],
)
def test_a_configuration_that_computes_something_else_fails_the_export(
    tmp_path: Path, diffusion_artifact: DiffusionArtifact, file: str, key: str, value: Any, part: str
) -> None:
    fill_diffusers_folder(tmp_path, diffusion_artifact)
    config = json.loads((tmp_path / file).read_text())
    assert config[key] != value
    (tmp_path / file).write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=f"exported {part} differs from ours by"):
        verify.measure_differences(tmp_path, diffusion_artifact)


def test_a_tokenizer_with_other_numbers_fails_the_export(tmp_path: Path, diffusion_artifact: DiffusionArtifact) -> None:
    fill_diffusers_folder(tmp_path, diffusion_artifact)
    path = tmp_path / "tokenizer" / "merges.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:1] + lines[1000:]) + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError, match="exported tokenizer gives"):
        verify.measure_differences(tmp_path, diffusion_artifact)


def test_safetensors_that_are_not_read_back_fail_the_export(
    tmp_path: Path, autoencoder_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_and_damage(folder: Path, artifact: Artifact | DiffusionArtifact) -> None:
        fill_artifact_folder(folder, artifact)
        damage(folder / "weights.safetensors", "encoder.conv_in.weight")

    monkeypatch.setattr(publish_module, "fill_artifact_folder", fill_and_damage)
    with pytest.raises(CheckpointError, match="is not what was written"):
        publish(autoencoder_artifact, "safetensors", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_missing_libraries_are_named(
    tmp_path: Path, autoencoder_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs diffusers and transformers.*ldm-scale\[interchange\]"):
        publish(autoencoder_artifact, "diffusers", tmp_path / "out")
