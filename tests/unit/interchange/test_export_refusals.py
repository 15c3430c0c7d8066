"""What is wrong with a source or a place is told in one line, and nothing half-written stays under the final name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_scale.__main__ import main
from ldm_scale.config.schema import Config, DataConfig
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact, write_artifact, write_diffusion_artifact
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.disks import full_disk

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TO_K = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.weight"


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory, diffusion_artifact: DiffusionArtifact) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    fill_diffusers_folder(folder, diffusion_artifact)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that an export prints instead of a result."""
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) not in (0, None)
    output, errors = capsys.readouterr()
    assert output == ""
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    return line


def change(path: Path, name: str, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = load_file(path)
    state[name] = to(state[name]).contiguous()
    save_file(state, path, metadata={"format": "pt"})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (
        lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-100]),
        "unet/diffusion_pytorch_model.safetensors cannot be read",
    ),
    "something else": (
        lambda f: (f / UNET).write_text("version https://git-lfs.github.com/spec/v1\n" * 9),
        "unet/diffusion_pytorch_model.safetensors cannot be read",
    ),
    "absent": (lambda f: (f / UNET).unlink(), "unet/diffusion_pytorch_model.safetensors is missing"),
    "of another family": (
        lambda f: shutil.copy(f / VAE, f / UNET),
        "unet/diffusion_pytorch_model.safetensors does not fit its configuration: ",
    ),
    "a convolution turned": (
        lambda f: change(f / UNET, "conv_in.weight", lambda x: x.transpose(0, 1)),
        "conv_in.weight (3, 16, 3, 3) instead of (16, 3, 3, 3)",
    ),
    "a joint projection's part turned": (
        lambda f: change(f / UNET, TO_K, lambda x: x.reshape(2 * len(x), -1)),
        f"{TO_K} (64, 16)",
    ),
    "two parts swapped in shape": (
        lambda f: (
            change(f / UNET, "conv_norm_out.weight", lambda x: x[:-1]),
            change(f / UNET, "conv_norm_out.bias", lambda x: torch.cat([x, x[:1]])),
        ),
        "2 of another shape (norm_out.bias (17,) instead of (16,), norm_out.weight (15,) instead of (16,))",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_pipeline_whose_weights_are(
    tmp_path: Path, pipeline: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    damage, told = DAMAGE[kind]
    shutil.copytree(pipeline, tmp_path / "model")
    damage(tmp_path / "model")
    line = refused(capsys, tmp_path / "model", "--to", "safetensors", "--out", tmp_path / "out")
    assert told in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def run(tmp_path: Path, diffusion_artifact: DiffusionArtifact) -> Path:
    """A stage-2 run of two ranks."""
    first = diffusion_artifact.autoencoder
    write_artifact(tmp_path / "first", first.state, first.config, first.statistics, first.provenance)
    config = Config(
        stage="diffusion",
        artifact=str(tmp_path / "first"),
        autoencoder=first.config,
        unet=diffusion_artifact.unet,
        conditioning=diffusion_artifact.conditioning,
        data=DataConfig(resolution=16),
    )
    folder = tmp_path / "run" / "checkpoints" / "images-0000000064"
    write_checkpoint(folder, config, "diffusion", {"weight": diffusion_artifact.state}, first.content_hash)
    return tmp_path / "run"


@pytest.mark.parametrize("target", ["safetensors", "diffusers"])
def test_a_disk_that_fills_half_way(
    tmp_path: Path, run: Path, autoencoder_artifact: Artifact, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    """With nothing there, and over an earlier export, which stays as it was."""
    out, before = tmp_path / "out", sorted(tmp_path.iterdir())
    with full_disk(at_bytes=100_000):
        line = refused(capsys, run, "--to", target, "--out", out)
    assert str(out) in line
    assert "space" in line
    assert sorted(tmp_path.iterdir()) == before
    a = autoencoder_artifact
    write_artifact(tmp_path / "a", a.state, a.config, a.statistics, a.provenance)
    assert main(["export", str(tmp_path / "a"), "--to", "safetensors", "--out", str(out)]) == 0
    kept = {path: path.read_bytes() for path in sorted(out.rglob("*"))}
    with full_disk(at_bytes=100_000):
        refused(capsys, run, "--to", target, "--out", out)
    assert {path: path.read_bytes() for path in sorted(out.rglob("*"))} == kept
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "a", out])


def test_a_place_that_is_taken_is_told_before_the_source_is_read(
    tmp_path: Path, pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "file").touch()
    for name, told in (("photos", "holds files that this command did not write"), ("file", "is a file")):
        for source in (pipeline, tmp_path / "nowhere"):
            line = refused(capsys, source, "--to", "safetensors", "--out", tmp_path / name)
            assert f"{tmp_path / name} {told}" in line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cat.jpg", "file", "photos"]


def test_an_untrained_model_does_not_fit_on_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = ["experiment=demo_autoencoder", "--random-init"]
    with full_disk(at_bytes=100_000):
        line = refused(capsys, *source, "--to", "safetensors", "--out", tmp_path / "out")
    assert str(tmp_path) in line
    assert list(tmp_path.iterdir()) == []


def test_a_model_exported_over_its_own_source(tmp_path: Path, diffusion_artifact: DiffusionArtifact) -> None:
    write_diffusion_artifact(tmp_path / "model", diffusion_artifact)
    out = str(tmp_path / "out")
    assert main(["export", str(tmp_path / "model"), "--to", "safetensors", "--out", out]) == 0
    weights = (tmp_path / "out" / "weights.safetensors").read_bytes()
    assert main(["export", out, "--to", "safetensors", "--out", out]) == 0
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == weights
