"""`train init=...` as a user types it: networks come from the source, mistakes are one line before anything starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ldm_scale import load_diffusion
from ldm_scale.__main__ import main
from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import ConditioningConfig
from ldm_scale.interchange.artifact import DiffusionArtifact, read_artifact, read_diffusion_artifact
from ldm_scale.interchange.load import read_source
from tests.helpers import foreign
from tests.helpers.commands import refusal
from tests.helpers.origins import autoencoder_origin, diffusion_origin
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import AUTOENCODER, TEXT, UNET, tiny_artifact
from tests.helpers.shards import make_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("init")
    make_dataset(path / "data", num_samples=16, samples_per_shard=16, resolution=20)
    tiny_artifact(path / "artifact")
    autoencoder_origin(path / "other", AUTOENCODER)
    diffusion_origin(path / "origin", path / "artifact")
    (path / "weights.ckpt").write_bytes(b"weights")
    foreign.save("sd1", path / "hub")
    return path


def _overrides(folder: Path, *more: str, experiment: str = "demo_text") -> list[str]:
    """No size of any network: these come from `init`."""
    return [
        f"experiment={experiment}",
        f"run_dir={folder / 'run'}",
        f"data.manifest={folder / 'data' / 'manifest.json'}",
        "data.validation_split=",
        "data.resolution=16",
        "data.num_workers=0",
        "optimizer.warmup_images=0",
        "train.device=cpu",
        "train.global_batch=8",
        "train.total_images=16",
        "sampling.num_steps=2",
        "sampling.prompts=[a]",
        *more,
    ]


def test_networks_are_those_of_the_source_and_training_that_of_the_run(folder: Path) -> None:
    config = load_config(
        _overrides(folder, f"init={folder / 'origin'}", "conditioning.text.drop_probability=0.3", "unet.dropout=0.25")
    )
    assert config.unet == dataclasses.replace(UNET, dropout=0.25)
    assert config.conditioning == ConditioningConfig(text=dataclasses.replace(TEXT, drop_probability=0.3))
    assert config.autoencoder == AUTOENCODER
    assert config.artifact == str(folder / "origin" / "autoencoder")
    plain = load_config(_overrides(folder))
    assert plain.conditioning.text is not None
    from_files = load_config(_overrides(folder, f"init={folder / 'origin'}")).conditioning.text
    assert from_files is not None
    assert from_files.drop_probability == plain.conditioning.text.drop_probability
    assert (config.optimizer, config.train) == (plain.optimizer, plain.train)
    assert config.sampling.guidance_scale == plain.sampling.guidance_scale, "a file names it"
    unnamed = load_config([f"init={folder / 'origin'}", "stage=diffusion", "run_dir=r"])
    assert unnamed.sampling.guidance_scale == 7.5


def test_a_first_stage_gets_its_networks_too(folder: Path) -> None:
    config = load_config(_overrides(folder, f"init={folder / 'other'}", experiment="demo_autoencoder"))
    assert config.autoencoder == AUTOENCODER
    assert config.autoencoder_loss == load_config(["experiment=demo_autoencoder"]).autoencoder_loss


@pytest.mark.parametrize(
    ("init", "more", "message"),
    [
        ("nowhere", [], "nowhere is no folder: give an artifact, an export, a run folder or a checkpoint"),
        ("weights.ckpt", [], "weights.ckpt --out DIR`, and give init=DIR"),
        ("other", [], "holds an autoencoder, stage=diffusion trains a diffusion model"),
        ("origin", ["init_weights=raw"], "init_weights=raw: "),
        ("origin", ["init_weights=best"], "weights best: must be raw, ema or ema=STD"),
        ("origin", ["unet.base_channels=32"], "unet.base_channels=32 (there: 16); leave these keys out"),
        ("origin", ["unet={num_heads: 2, head_dim: null}"], "unet.head_dim=null (there: 16), unet.num_heads=2 (there"),
        ("origin", ["conditioning.text.activation=quick_gelu"], "activation=quick_gelu (there: gelu)"),
        ("origin", ["conditioning.classes.width=16"], "configured one, conditioning.classes=set (there: null); leave"),
        ("origin", ["model=sd1"], "model=sd1 beside init="),
        ("origin", ["artifact={folder}/other"], "(other weights and latent statistics): the latents of one mean"),
        ("origin", ["artifact={folder}/origin"], "origin/autoencoder"),
        ("origin", ["stage=autoencoder"], "holds a diffusion model, stage=autoencoder trains an autoencoder"),
        (
            "origin",
            ["stage=classifier", "conditioning=none", "unet.attention=self", "data.resolution=64"],
            "stage=classifier begins with random weights alone",
        ),
    ],
)
def test_mistakes_are_one_line_before_anything_starts(
    folder: Path, capfd: pytest.CaptureFixture[str], init: str, more: list[str], message: str
) -> None:
    options = [option.format(folder=folder) if "{folder}" in option else option for option in more]
    status = 4 if init in ("nowhere", "weights.ckpt") or options == [f"artifact={folder}/origin"] else 2
    line = refusal(capfd, _overrides(folder, f"init={folder / init}", *options), status)
    assert message in line
    assert str(folder / init) in line
    assert not (folder / "run").exists()


def test_the_first_stage_and_choices_without_a_source_are_refused_too(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layers = "autoencoder_loss.discriminator_layers=1"
    first = _overrides(folder, f"init={folder / 'other'}", layers, experiment="demo_autoencoder")
    assert "autoencoder.base_channels=16 (there: 8)" in refusal(capfd, [*first, "autoencoder.base_channels=16"], 2)
    assert "autoencoder=kl_f8 beside init=" in refusal(capfd, [*first, "autoencoder=kl_f8"], 2)
    assert "init_weights=raw chooses among the weights of init" in refusal(
        capfd, _overrides(folder, "init_weights=raw", "artifact=a", "data.resolution=64"), 2
    )
    random = ["experiment=demo_text", f"init={folder / 'origin'}", "--random-init", "--to", "safetensors"]
    assert main(["export", *random, "--out", str(folder / "out")]) == 2
    assert "beside --random-init, which gives random weights" in capfd.readouterr().err
    assert not (folder / "out").exists()


def test_another_programs_layout_has_no_artifact_to_work_on(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *_overrides(folder, f"init={folder / 'hub' / 'sd1'}")]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "holds no autoencoder in our own format; make an artifact of it with `ldm-scale import" in error


def test_an_imported_pipeline_is_trained_sampled_and_exported(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    imported, run = tmp_path / "sd1", tmp_path / "run"
    assert main(["import", str(folder / "hub" / "sd1"), "--out", str(imported)]) == 0
    command = ["train", *_overrides(folder, f"init={imported}", f"run_dir={run}", "diffusion.prediction=v")]
    capfd.readouterr()
    assert run_ranks(main, 1, command) == [0]
    told = capfd.readouterr().err
    assert told.count("diffusion.prediction=v (there: eps): the network has to learn it anew") == 1
    assert told.count("beginning with the") == 1

    model, source = read_source(run, "raw"), read_diffusion_artifact(imported)
    assert isinstance(model, DiffusionArtifact)
    assert model.provenance["init"]["content_sha256"] == source.content_hash
    assert model.autoencoder.content_hash == read_artifact(imported / "autoencoder").content_hash
    assert model.unet == source.unet
    assert model.diffusion.prediction == "v"
    moved = (model.state["unet.conv_in.weight"] - source.state["unet.conv_in.weight"]).abs().max()
    assert 0 < moved < 0.01, "two steps from where it began"
    assert load_diffusion(run).sample(["a red apple"], [3], num_steps=2).shape == (1, 3, 16, 16)
    assert main(["export", str(run), "--to", "diffusers", "--out", str(tmp_path / "pipeline")]) == 0
    assert (tmp_path / "pipeline" / "model_index.json").is_file()

    capfd.readouterr()
    assert run_ranks(main, 1, [*command, "train.total_images=24", f"init={tmp_path / 'gone'}"]) == [0]
    assert capfd.readouterr().err.count(f"goes on from that (it began with {imported})") == 1
    assert read_source(run).provenance["images"] == 24
