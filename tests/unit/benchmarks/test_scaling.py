"""Scaling over ranks: what ranks measure, and what may be made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling, scaling_report
from benchmarks.unet_step import Case
from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import UNET

CASE = Case(UNET, batch=4, latent_channels=3, latent_side=8, context_tokens=4, context_width=16)


def _measure(stages: list[int]) -> dict[str, Any]:
    here = env.start(env.read_launch(), TrainConfig(device="cpu"))
    return scaling.measure(CASE, here, stages, 2, "tiny")


def test_ranks_train_the_same_images_and_communicate(tmp_path: Path) -> None:
    alone, both = run_ranks(_measure, 1, [0, 2])[0], run_ranks(_measure, 2, [0, 2])[0]
    assert [row["images"] for row in both["rows"]] == [8, 4, 8, 4]
    assert all(0 < row["communication_share"] < 1 for row in both["rows"])
    results = scaling_report.report([both, alone, both])
    assert results["fewest_ranks"] == 1
    for row in results["rows"]:
        assert row["efficiency"] == 1.0 if row["ranks"] == 1 else 0 < row["efficiency"] < 2
        assert row["steps"] == (2 if row["ranks"] == 1 else 4)
        if row["mode"] == "strong":
            assert row["difference"] < 1e-4
    assert "ZeRO 2, strong, 2 rank(s)" in scaling_report.table(results)
    scaling_report.draw(results, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def _document(ranks: int, step_s: float, losses: list[float], cores: int = 2) -> dict[str, Any]:
    row = {"stage": 1, "communication_share": 0.1}
    rows = [
        row | {"mode": "weak", "images": 8 * ranks, "step_s": [step_s] * 3, "losses": None},
        row | {"mode": "strong", "images": 8, "step_s": [step_s / ranks] * 3, "losses": losses},
    ]
    place = {"ranks": ranks, "hosts": 1, "cores_of_the_host": cores, "device": "cpu"}
    return place | {"case": "tiny", "unet": {}, "environment": {"device": "a CPU", "threads": 1}, "rows": rows}


def test_efficiency_is_per_rank_and_needs_equal_losses() -> None:
    found = scaling_report.report([_document(4, 2.0, [1.0, 0.5]), _document(2, 1.6, [1.0, 0.5])])
    rows = {(row["mode"], row["ranks"]): row for row in found["rows"]}
    assert rows["weak", 4]["efficiency"] == pytest.approx(0.8)
    assert rows["strong", 4]["efficiency"] == pytest.approx(0.8)
    assert rows["weak", 2]["images_per_s"] == pytest.approx(10.0)
    assert {row["threads"] for row in found["rows"]} == {1}
    table = scaling_report.table(found)
    assert "ZeRO 1, weak, 4 rank(s) *" in table
    assert "not how training scales" in table
    for wrong in ([1.0, 0.6], [1.0, float("nan")]):
        found = scaling_report.report([_document(1, 1.0, [1.0, 0.5]), _document(2, 1.0, wrong)])
        rows = {(row["mode"], row["ranks"]): row for row in found["rows"]}
        assert "efficiency" not in rows["strong", 2]
        assert "other losses" in rows["strong", 2]["refused"]
    assert "*" not in scaling_report.table(found)


def test_what_overlaps_is_counted_once() -> None:
    assert scaling.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert scaling.covered([]) == 0


def test_files_of_several_cases_are_not_joined(tmp_path: Path) -> None:
    paths = []
    for case in ("demo", "mid"):
        paths.append(str(tmp_path / f"{case}.json"))
        Path(paths[-1]).write_text(json.dumps(_document(1, 1.0, [1.0]) | {"case": case}))
    with pytest.raises(SystemExit, match="of one case on one device"):
        scaling.main(["--join", *paths, "--out", str(tmp_path)])
