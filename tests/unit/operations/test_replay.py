"""`ldm-scale replay` makes a recorded step again and finds the images that are to blame."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_scale import faults
from ldm_scale.__main__ import main
from ldm_scale.config.schema import Config
from ldm_scale.engine import env
from ldm_scale.operations.train import train
from ldm_scale.training.skipping import read_records
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset

BATCH = 8


def _train(config: Config) -> bool:
    return train(config, env.read_launch())


def _replay(arguments: list[str], out: Path) -> tuple[int, dict[str, Any]]:
    """Status and document of the command, in a process of its own: it starts a process group."""
    import contextlib

    with out.open("w") as file, contextlib.redirect_stdout(file):
        status = main(["replay", *arguments])
    text = out.read_text()
    return status, json.loads(text) if text.startswith("{") else {"text": text}


@pytest.mark.parametrize(("stage", "zero"), [("diffusion", 2), ("autoencoder", 1)])
def test_a_recorded_step_is_made_again_from_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, zero: int
) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=20, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    run = tmp_path / "run"
    cadence = {"total_images": 3 * BATCH, "checkpoint_every_images": BATCH, "keep_checkpoints": 9}
    config = tiny_config(stage, manifest, run, train=cadence, zero={"stage": zero}, sampling={"prompts": ("a",)})
    # Rank 1 alone, its second step: images 12 to 15, of which the first is spoilt.
    monkeypatch.setenv(faults.VARIABLE, "nan:at=step.input,rank=1,nth=2")
    assert run_ranks(_train, 2, config) == [True, True]
    (record,) = read_records(run)
    assert record["images"] == [BATCH, 2 * BATCH]

    # One image at a time on one process: the same one is the fifth.
    monkeypatch.setenv(faults.VARIABLE, "nan:at=step.input,nth=5")
    ((status, document),) = run_ranks(_replay, 1, [str(run), "--json"], tmp_path / "out")
    assert status == 0
    assert document["images"] == record["images"]
    assert document["checkpoint"].endswith("images-0000000008")
    assert document["steps_after_checkpoint"] == 0
    assert document["recorded"]["values"]
    assert [sample["verdict"] for sample in document["samples"]] == ["not finite"] + ["ordinary"] * (BATCH - 1)
    assert document["samples"][0]["image"] == 12
    keys = {sample["image"]: sample["key"] for sample in record["samples"]}
    assert document["samples"][0]["key"] == keys[12]
    assert sorted(sample["image"] for sample in document["samples"]) == list(range(BATCH, 2 * BATCH))
    assert np.asarray(Image.open(document["picture"])).shape == (16, BATCH * 16 + (BATCH - 1) * 2, 3)
    if stage == "diffusion":
        # Rank 0's images were sound: alone they have the losses that they had among others, on the same weights.
        before = {s["image"]: s["loss"] for s in record["samples"]}
        again = {s["image"]: s["loss"] for s in document["samples"]}
        for image in range(13, 16):
            assert again[image] == pytest.approx(before[image], rel=1e-4)


def test_any_step_and_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=20, resolution=20)
    tiny_artifact(tmp_path / "artifact")
    run = tmp_path / "run"
    config = tiny_config("diffusion", manifest, run, train={"total_images": 2 * BATCH, "checkpoint_every_images": 8})
    assert run_ranks(_train, 1, config) == [True]
    ((status, document),) = run_ranks(_replay, 1, [str(run), "--image", "19"], tmp_path / "out")
    assert status == 0
    assert "images 16 to 23, with the weights of " in document["text"]
    assert "nothing is recorded of this step" in document["text"]
    assert f"0 not finite, 0 far off, {BATCH} ordinary" in document["text"]
    assert (run / "replay-0000000016.png").is_file()


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "none")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["replay", str(tmp_path)]) == 2
    assert "skipped_steps.jsonl holds no step; choose any step of the run with --image N" in capsys.readouterr().err
    for image in ("-1", "999999999999999999999"):
        assert main(["replay", str(tmp_path), "--image", image]) == 2
        assert f"--image {image}: must be from 0 to " in capsys.readouterr().err
    assert main(["replay", str(tmp_path), "--image", "5"]) == 4
    assert "no checkpoint of at most 5 images (there: none)" in capsys.readouterr().err


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["replay", "--help"])
    assert exit_.value.code == 0
    assert "ldm-scale replay runs/demo_text --image 40960 --json" in capsys.readouterr().out
