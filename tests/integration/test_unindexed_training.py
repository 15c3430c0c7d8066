"""Training on tars without a manifest: both stages, on two ranks, going on where they stopped, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ldm_scale.__main__ import main
from tests.helpers.commands import refusal, stage1, stage2
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact
from tests.helpers.shards import broken_png, make_sample, write_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of shards: one whole, one with a broken picture and cut short."""
    rng = np.random.default_rng(0)
    samples = [(f"{n:03d}", make_sample(n, 20, rng)) for n in range(24)]
    samples[13][1]["png"] = broken_png()
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "a.tar", samples[:12])
    tar = write_tar(tmp_path / "data" / "b.tar", samples[12:])
    with tarfile.open(tar) as archive:
        last = archive.getmembers()[-1].offset
    tar.write_bytes(tar.read_bytes()[: last + 100])
    tiny_artifact(tmp_path / "artifact")
    return tmp_path


def _pattern(folder: Path) -> str:
    return f"data.manifest='{folder / 'data'}/{{a,b}}.tar'"


def _main_and_errors(arguments: list[str]) -> tuple[int, str]:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        return main(["train", *arguments]), errors.getvalue()


@pytest.mark.parametrize(("stage", "workers"), [(stage1, 0), (stage2, 2)])
def test_a_stage_trains_and_goes_on(folder: Path, stage: Callable[..., list[str]], workers: int) -> None:
    more = [
        _pattern(folder),
        f"data.num_workers={workers}",
        "data.max_bad_share=0.5",
        "data.block_chunks=1",  # or the shuffle buffer holds the shards, and what is bad in them, many times
        "data.chunk_samples=8",
        "train.validate_every_images=8",
    ]
    for total in (32, 48):
        arguments = stage(folder, folder / "run", *more, f"train.total_images={total}")
        outcomes = run_ranks(_main_and_errors, 2, arguments)
        assert [status for status, _ in outcomes] == [0, 0], outcomes
        assert outcomes[0][1].count("without a manifest") == 1
        assert "without a manifest" not in outcomes[1][1]
    assert "continuing at 32 images" in outcomes[0][1]
    assert json.loads((folder / "run" / "result.json").read_text())["images"] == 48
    rows = [json.loads(line) for line in (folder / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == {"b/013", "b/023"}
    assert (folder / "run" / "artifact" / "config.json").is_file() == (stage is stage1)


def test_what_needs_a_manifest_is_refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    classes = stage2(folder, folder / "run", _pattern(folder), "conditioning.classes={num_classes: 3, width: 16}")
    assert "training on classes needs one" in refusal(capfd, classes, 2)
    nothing = stage1(folder, folder / "run", f"data.manifest='{folder}/c*.tar'")
    assert "c*.tar: matches nothing" in refusal(capfd, nothing, 3)
