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
from ldm_scale.errors import ConfigError
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import UNET

CASE = Case(UNET, batch=4, latent_channels=3, latent_side=8, context_tokens=4, context_width=16)


def _measure(stages: list[int]) -> dict[str, Any]:
    here = env.start(env.read_launch(), TrainConfig(device="cpu"))
    return scaling.measure(CASE, here, stages, 2, "tiny")


@pytest.mark.rest
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


def test_ranks_that_do_not_divide_the_batch_are_named() -> None:
    whole, part = _document(1, 1.0, [1.0]), _document(3, 1.0, [1.0])
    part["rows"] = part["rows"][:1]  # weak alone
    assert "3 ranks: no strong scaling" in scaling_report.table(scaling_report.report([whole, part]))
    assert "no strong" not in scaling_report.table(scaling_report.report([whole, _document(3, 1.0, [1.0])]))


def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("other.json", "{}"), ("list.json", "[1]"), ("torn.json", "{")):
        (tmp_path / name).write_text(text)
    for name in ("other.json", "list.json", "torn.json", "missing.json"):
        with pytest.raises(SystemExit):
            scaling.main(["--join", str(tmp_path / name), "--out", str(tmp_path)])
        assert f"--join {tmp_path / name}: is not there or not of --measure" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is no folder to write to"):
        scaling.main(["--out", str(tmp_path / "other.json")])

    def failed(*_: Any, **__: Any) -> None:
        raise scaling.subprocess.CalledProcessError(7, "torchrun")

    monkeypatch.setattr(scaling.subprocess, "run", failed)
    assert scaling.main(["--out", str(tmp_path), "--ranks", "1"]) == 1
    assert "error: the ranks ended with 7" in capsys.readouterr().err


def test_too_few_turns_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, both = _document(1, 1.0, [1.0]), _document(2, 1.25, [1.0])
    scaling.finish([one, both] * 2, tmp_path)
    assert "a trial: fewer than 3 turns" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    turns = [_document(2, seconds, [1.0]) for seconds in (1.25, 1.0, 2.0)]
    scaling.finish([one, turns[0], one, turns[1], one, turns[2]], tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png"}
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["results"]["rows"]
    (weak,) = [row for row in rows if (row["mode"], row["ranks"]) == ("weak", 2)]
    assert (weak["efficiency"], weak["efficiency_range"]) == (0.8, [0.5, 1.0])


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
