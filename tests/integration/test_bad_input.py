"""What cannot be trained is refused in one line that says why; before a process group starts where that can be told."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest

from ldm_scale.__main__ import main
from ldm_scale.data.sources.tars import index_tars
from tests.helpers.commands import refusal, stage1, stage2
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import broken_png, make_dataset, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "data", num_samples=16, samples_per_shard=16, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    return tmp_path


@pytest.mark.parametrize(
    ("override", "sides"),
    [
        ("autoencoder.channel_multipliers=[1,2,2]", ["has f=2", "config's autoencoder has f=4", "(3 levels)"]),
        ("autoencoder.latent_channels=4", ["latents of 3 channels", "autoencoder.latent_channels=4"]),
        (
            "latents.sample_posterior=false",
            ["latents.sample_posterior=false", "were measured on the posterior's samples"],
        ),
    ],
)
def test_an_artifact_that_does_not_fit_the_unet(
    folder: Path, capfd: pytest.CaptureFixture[str], override: str, sides: list[str]
) -> None:
    line = refusal(capfd, stage2(folder, folder / "run", override), 2)
    assert all(side in line for side in [f"artifact={folder / 'artifact'}", *sides]), line


def test_an_artifact_that_is_not_there(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refusal(capfd, stage2(folder, folder / "run", f"artifact={folder / 'nothing'}"), 2)
    assert f"artifact={folder / 'nothing'}: there is no such folder" in line


def test_an_artifact_that_is_cut_short(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = folder / "artifact" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert str(weights) in refusal(capfd, stage2(folder, folder / "run"), 4)


@pytest.mark.parametrize("stage", [stage1, stage2])
def test_a_resolution_that_f_does_not_divide(folder: Path, capfd: pytest.CaptureFixture[str], stage: type) -> None:
    line = refusal(capfd, stage(folder, folder / "run", "data.resolution=17"), 2)
    assert "data.resolution=17 does not divide by the autoencoder's f=2" in line
    assert "(16 or 18)" in line


def test_no_shards_at_the_path(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    nowhere = folder / "nowhere" / "manifest.json"
    assert str(nowhere) in refusal(capfd, stage1(folder, folder / "run", f"data.manifest={nowhere}"), 3)
    (shard,) = (folder / "data").glob("*.tar")
    shard.unlink()
    assert str(shard) in refusal(capfd, stage1(folder, folder / "run"), 3)


def _main_and_errors(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return main(["train", *arguments]), errors.getvalue()


def test_more_ranks_than_shards_train(folder: Path) -> None:
    assert len(list((folder / "data").glob("*.tar"))) == 1
    arguments = stage1(folder, folder / "run", "train.total_images=16")
    outcomes = run_ranks(_main_and_errors, 2, arguments)
    assert [status for status, _ in outcomes] == [0, 0], outcomes
    assert (folder / "run" / "artifact" / "config.json").is_file()


@pytest.mark.parametrize("workers", [0, 1])
def test_images_none_of_which_decode_stop_the_run_with_their_names(tmp_path: Path, workers: int) -> None:
    (tmp_path / "data").mkdir()
    samples = [(f"blank{n:02d}", {"png": broken_png(), "txt": b"a"}) for n in range(16)]
    index_tars([write_tar(tmp_path / "data" / "0.tar", samples)], tmp_path / "data" / "manifest.json", "train")
    arguments = stage1(tmp_path, tmp_path / "run", f"data.num_workers={workers}", "data.max_consecutive_bad=3")
    ((status, errors),) = run_ranks(_main_and_errors, 1, arguments)
    assert status == 3
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert line.count("0/blank") >= 3
    assert "Traceback" not in errors
