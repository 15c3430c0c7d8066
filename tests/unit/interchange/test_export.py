"""The export command: verified or nothing, and never over other people's files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_scale.conditioning.base import Conditions
from ldm_scale.config.schema import AutoencoderConfig, ClassConditioningConfig, ConditioningConfig
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.export import main
from ldm_scale.interchange import load, sources, verify
from ldm_scale.interchange import publish as publish_module
from ldm_scale.interchange.artifact import (
    AUTOENCODER_FORMAT,
    Artifact,
    DiffusionArtifact,
    artifact_format,
    fill_artifact_folder,
    make_artifact,
    make_diffusion_artifact,
    read_artifact,
    read_diffusion_artifact,
    write_artifact,
    write_diffusion_artifact,
)
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from ldm_scale.interchange.load import read_source
from ldm_scale.interchange.model_card import _GIVEN
from ldm_scale.interchange.publish import publish
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from tests.helpers.models import tiny_model
from tests.helpers.weights import random_state


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
    assert 'y = Conditions(captions=["a caption"])\n' in (tmp_path / "b" / "README.md").read_text()
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


VQ = AutoencoderConfig(
    kind="vq",
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    latent_channels=3,
    norm_groups=4,
    attention_levels=(1,),
    codebook_size=20,
)
PER_CHANNEL = LatentStatistics(channel_mean=(3.0, -0.7, 0.01), channel_std=(9.0, 0.05, 1.3), num_images=8)


@pytest.mark.parametrize("name", ["vq", "attention"])
def test_the_other_kinds_there_and_back(tmp_path: Path, name: str) -> None:
    config = VQ if name == "vq" else dataclasses.replace(VQ, kind="kl", codebook_size=None)
    a = make_artifact(random_state(Autoencoder(config)), config, LatentStatistics(num_images=5), {"resolution": 16})
    published = publish(a, "diffusers", tmp_path / "theirs")
    kl_alone = set() if name == "vq" else {"autoencoder's posterior"}
    assert set(published.differences) == {"autoencoder's latents", "autoencoder's pixels", *kl_alone}
    assert f"import {'VQModel' if name == 'vq' else 'AutoencoderKL'}\n" in (tmp_path / "theirs/README.md").read_text()
    publish(read_source(tmp_path / "theirs"), "safetensors", tmp_path / "b")
    assert read_artifact(tmp_path / "b").content_hash == a.content_hash


def per_channel_artifact(artifact: Artifact) -> Artifact:
    return make_artifact(artifact.state, artifact.config, PER_CHANNEL, artifact.provenance)


def test_statistics_per_channel_there_and_back(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    a = per_channel_artifact(autoencoder_artifact)
    published = publish(a, "diffusers", tmp_path / "theirs")
    assert max(published.differences.values()) < 1e-4
    assert "in quant_conv and post_quant_conv" in (tmp_path / "theirs" / "README.md").read_text()
    back = read_source(tmp_path / "theirs")
    assert isinstance(back, Artifact)
    assert back.statistics == PER_CHANNEL
    assert back.content_hash == a.content_hash


@pytest.mark.parametrize("change", ["trained further", "without the original tensors"])
def test_weights_changed_by_others_are_unfolded(tmp_path: Path, autoencoder_artifact: Artifact, change: str) -> None:
    a = per_channel_artifact(autoencoder_artifact)
    publish(a, "diffusers", tmp_path / "theirs")
    expected = dict(a.state)
    if change == "trained further":
        weights = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
        theirs = load_file(weights)
        theirs["post_quant_conv.weight"] *= 2
        save_file(theirs, weights, metadata={"format": "pt"})
        mean = torch.tensor(PER_CHANNEL.channel_mean)
        weight = expected["post_quant_conv.weight"]
        expected["post_quant_conv.weight"] = 2 * weight
        # Twice the folded weight reads twice the mean, which was in the bias once.
        expected["post_quant_conv.bias"] = expected["post_quant_conv.bias"] - weight.flatten(1) @ mean
    else:
        (tmp_path / "theirs" / "ldm_scale.safetensors").unlink()
    back = read_source(tmp_path / "theirs")
    assert isinstance(back, Artifact)
    assert back.content_hash != a.content_hash
    for name, tensor in expected.items():
        assert (back.state[name] - tensor).norm() <= 1e-6 * tensor.norm(), name


def test_a_pipeline_with_statistics_per_channel_comes_back(
    tmp_path: Path, diffusion_artifact: DiffusionArtifact
) -> None:
    a = with_autoencoder(diffusion_artifact, per_channel_artifact(diffusion_artifact.autoencoder))
    publish(a, "diffusers", tmp_path / "theirs")
    assert read_source(tmp_path / "theirs").content_hash == a.content_hash


def with_autoencoder(model: DiffusionArtifact, autoencoder: Artifact) -> DiffusionArtifact:
    return make_diffusion_artifact(
        model.state,
        autoencoder,
        unet=model.unet,
        conditioning=model.conditioning,
        diffusion=model.diffusion,
        sampling=model.sampling,
        provenance=model.provenance,
    )


IDENTITY = AutoencoderConfig(
    kind="identity", base_channels=1, channel_multipliers=(1,), latent_channels=3, norm_groups=1
)


@pytest.mark.parametrize(
    ("config", "statistics", "alone", "message"),
    [
        (VQ, LatentStatistics(), False, r"autoencoder\.kind=vq: StableDiffusionPipeline .* autoencoder alone"),
        (VQ, LatentStatistics(shift=0.1), True, r"latent_statistics\.shift=0\.1: VQModel has a scaling_factor"),
        (VQ, PER_CHANNEL, True, r"latent_statistics\.channel_mean: .* away from the codes"),
        (IDENTITY, LatentStatistics(), True, r"autoencoder\.kind=identity: diffusers has no autoencoder without"),
        (IDENTITY, LatentStatistics(), False, r"autoencoder\.kind=identity: diffusers has no autoencoder without"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(
    tmp_path: Path,
    diffusion_artifact: DiffusionArtifact,
    config: AutoencoderConfig,
    statistics: LatentStatistics,
    alone: bool,
    message: str,
) -> None:
    first = make_artifact(random_state(Autoencoder(config)), config, statistics, {"resolution": 16})
    artifact = first if alone else with_autoencoder(diffusion_artifact, first)
    with pytest.raises(CheckpointError, match=message):
        publish(artifact, "diffusers", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    # Our own format holds them all.
    publish(artifact, "safetensors", tmp_path / "out")
    assert read_source(tmp_path / "out").content_hash == artifact.content_hash


def test_the_identity_is_an_artifact_without_training(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    arguments = ["experiment=identity_f1", "--random-init", "--to", "safetensors", "--out", str(out)]
    assert main(arguments) == 0
    assert artifact_format(out) == AUTOENCODER_FORMAT
    loaded = load.load_autoencoder(out)
    x = torch.rand(1, 3, 5, 7)
    assert torch.equal(loaded.decode(loaded.encode(x)), x)
    assert torch.equal(loaded.encode(x), x)


def test_untrained_models(tmp_path: Path) -> None:
    source = [
        "experiment=demo_text",
        "unet.base_channels=16",
        "unet.norm_groups=4",
        "unet.head_dim=16",
        "conditioning.text.width=16",
        "conditioning.text.num_heads=2",
        "conditioning.text.depth=1",
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
    with pytest.raises(CheckpointError, match=f"{part} read back differs by"):
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
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs diffusers and transformers.*ldm-scale\[interchange\]"):
        publish(autoencoder_artifact, "diffusers", tmp_path / "out")


def test_an_export_does_not_replace_what_it_is_made_of(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    publish(autoencoder_artifact, "safetensors", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"out is .*out, which is read and would be replaced: give another"):
        main([str(tmp_path / "out"), "--to", "diffusers", "--out", f"{tmp_path}/out/"])
    assert read_source(tmp_path / "out").content_hash == autoencoder_artifact.content_hash


def test_what_the_card_of_a_class_conditional_model_shows_runs(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, ConditioningConfig(classes=ClassConditioningConfig(num_classes=3, width=16)))
    publish(sources.read_source(model), "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(tmp_path / "out"))
    shown: dict[str, Any] = {}
    exec(code, shown)
    assert shown["images"].shape == (1, 3, 16, 16)


def test_the_card_of_every_kind_shows_fields_that_conditions_have() -> None:
    assert set(_GIVEN) == {field.name for field in dataclasses.fields(ConditioningConfig)}
    named = {part.partition("=")[0] for given in _GIVEN.values() for part in given.split(", ")}
    assert named <= {field.name for field in dataclasses.fields(Conditions)}
