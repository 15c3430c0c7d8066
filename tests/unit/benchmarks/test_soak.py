"""The soak's arithmetic on runs that were made up, and its report; the soak itself needs a Slurm cluster."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image

from benchmarks.soak import __main__ as command
from benchmarks.soak import summary
from benchmarks.soak.account import Row, effective_share, image_seconds, lost_seconds
from benchmarks.soak.kinds import KINDS, SHORT, Kind, Orders
from benchmarks.soak.summary import Fault, Found
from benchmarks.soak.watch import SoakError
from ldm_scale import faults

STEP_S, BATCH = 1.25, 10


def _steps(begin_s: float, images: int, number: int) -> list[Row]:
    """Steps that end every STEP_S seconds, the first at `begin_s`, on top of so many images."""
    return [(begin_s + STEP_S * i, images + BATCH * (i + 1)) for i in range(number)]


def _disturbed() -> list[Row]:
    """100 steps, after a gap of 30 s 12 of them again, then 100 new ones; and a pause of 7 s in the middle of these."""
    rows = _steps(1000.0, 0, 100)  # until 1123.75
    rows += _steps(1153.75, 880, 12 + 50)  # until 1230
    return rows + _steps(1237.0, 1500, 50)


def test_an_undisturbed_run_is_wholly_effective() -> None:
    rows = _steps(500.0, 0, 200)
    assert image_seconds(rows) == pytest.approx(0.125)
    assert effective_share(rows) == pytest.approx(1.0)
    assert lost_seconds(rows, [600.0]) == [0, 0]
    noise = random.Random(0)
    uneven = [(at_s + noise.uniform(0, 0.4), images) for at_s, images in rows]
    assert effective_share(uneven) == pytest.approx(1.0, abs=0.02)
    assert lost_seconds(uneven, [600.0]) == [0, 0]


def test_gap_and_repeated_steps_are_lost_to_the_fault_before_them() -> None:
    rows = _disturbed()
    # Down for 30 s with the first repeated step in it, then 11 more of them. The pause has one usual step.
    assert lost_seconds(rows, [1120.0, 1200.0]) == pytest.approx([0, 30 + 11 * STEP_S, 7 - STEP_S])
    assert lost_seconds(rows, [1120.0]) == pytest.approx([0, 30 + 11 * STEP_S + 7 - STEP_S])
    assert lost_seconds(rows, []) == pytest.approx([30 + 11 * STEP_S + 7 - STEP_S])


def test_what_is_effective_and_what_is_lost_make_up_the_time() -> None:
    rows = _disturbed()
    wall_s = rows[-1][0] - rows[0][0]
    assert effective_share(rows) * wall_s + sum(lost_seconds(rows, [1120.0])) == pytest.approx(wall_s)
    assert effective_share(rows) == pytest.approx(199 * STEP_S / wall_s)
    assert effective_share(rows, skipped_images=2 * BATCH) == pytest.approx(197 * STEP_S / wall_s)


def test_a_run_that_was_hardly_seen_has_no_figures() -> None:
    with pytest.raises(ValueError, match="two are needed"):
        image_seconds(_steps(0.0, 0, 1))


def _found() -> Found:
    return Found(
        minutes=20.0,
        kinds=2,
        rows=_disturbed(),
        faults=[
            Fault("killed rank", "kill -9", 1120.0, 960, "ended | with status 137", 1, 1),
            Fault("not finite", "NaN", 1200.0, 1280, "is skipped"),
        ],
        skipped_images=BATCH,
        checks={"nothing is left": ""},
        disturbed="abc",
        undisturbed="abc",
    )


ENVIRONMENT = {"date": "2026-01-01", "device": "a CPU", "torch": "2", "load_average": 1.0, "settings": {
    "ranks": 2, "nodes": 3, "slow_s": 1.0, "dead_after_s": 5}}  # fmt: skip


def test_a_report_that_passed(tmp_path: Path) -> None:
    found = _found()
    found.minutes = 4.0
    assert found.lost_s == pytest.approx([30 + 11 * STEP_S, 7 - STEP_S + STEP_S])
    assert summary.failures(found) == []
    summary.write(tmp_path, "soak", found, ENVIRONMENT)
    text = (tmp_path / "soak.md").read_text()
    assert text.startswith("# Soak: 2 faults in 4 minutes of training: passed\n")
    assert "| 2.0 | killed rank: kill -9 | 43.8 | 1 | yes | ended / with status 137 |" in text
    document = json.loads((tmp_path / "soak.json").read_text())
    assert document["faults"][0]["lost_s"] == 43.8
    assert document["faults"][0]["at_s"] == 120.0
    assert document["measured"]["effective"] == pytest.approx(198 * STEP_S / 298.25, abs=1e-4)
    assert len(document["rows"]) == len(found.rows)
    assert Image.open(tmp_path / "soak.png").width > 500


def test_everything_that_is_wrong_is_said() -> None:
    found = _found()
    found.rows += _steps(found.rows[-1][0] + 100.0, 2000, 5)
    found.faults[0].problem = "submitted again by hand"
    found.checks["nothing is left"] = "process 7 on n1"
    found.undisturbed = "abd"
    failed = summary.failures(found)
    assert [line.split(",")[0] for line in failed] == [
        "killed rank: submitted again by hand",
        "not finite took 106 s",
        f"effective training time is {found.effective:.1%}",
        "nothing is left: no",
        "the weights differ from the undisturbed run's: abc and abd",
    ]
    assert "FAILED" in summary.text("soak", found, ENVIRONMENT)


def test_what_was_broken_off_is_marked(tmp_path: Path) -> None:
    found = Found(minutes=120.0, kinds=12, problem="ended by Ctrl-C")
    summary.write(tmp_path, "soak-unfinished", found, ENVIRONMENT)
    assert "UNFINISHED" in (tmp_path / "soak-unfinished.md").read_text()
    assert not (tmp_path / "soak-unfinished.png").exists()
    found.rows = _disturbed()
    summary.write(tmp_path, "soak-unfinished", found, ENVIRONMENT)
    assert "Effective training time" in (tmp_path / "soak-unfinished.md").read_text()
    assert (tmp_path / "soak-unfinished.png").exists()


def test_long_runs_are_thinned_and_keep_what_was_lost(tmp_path: Path) -> None:
    found = _found()
    found.rows = _steps(0.0, 0, 5000) + _steps(5000 * STEP_S + 30, 49_900, 5000)
    found.faults = []
    rows = summary.document(found, ENVIRONMENT)["rows"]
    assert len(rows) < 2100
    assert [4999 * STEP_S, 50_000] in rows
    assert [5000 * STEP_S + 30, 49_910] in rows


def test_twelve_kinds_and_orders_that_can_be_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({kind.name for kind in KINDS}) == 12
    assert set(SHORT) <= {kind.name for kind in KINDS}
    orders = Orders(tmp_path / "faults", 0.5)
    monkeypatch.setattr(faults, "_rules", ())
    monkeypatch.setattr(faults, "_file", None)
    monkeypatch.setenv(faults.VARIABLE, str(orders.path))
    said: list[str] = []
    faults.configure(0, said.append)
    assert len(said) == 1
    orders.give("kill:at=save.rename,rank=1")
    faults.reach("save.rename")
    assert len(said) == 3


def test_without_root_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "missing", lambda: ["root's rights", "slurmd"])
    assert command.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: no Slurm cluster without root's rights, slurmd; run `make soak` as root\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SoakError("no step within 300 s")])
def test_what_ends_it_early_leaves_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def soak(folder: Path, kinds: Sequence[Kind], minutes: float, found: Found) -> None:
        found.rows += _disturbed()
        found.faults.append(Fault(kinds[0].name, kinds[0].what, 1120.0, 960))
        raise end

    monkeypatch.setattr(command, "missing", list)
    monkeypatch.setattr(command, "soak", soak)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    assert command.main(["--short", "--out", str(tmp_path)]) == 1
    text = (tmp_path / "soak-short-unfinished.md").read_text()
    assert text.startswith("# Soak: 5 faults in 6 minutes of training: UNFINISHED\n")
    assert f"unfinished: {str(end) or 'ended by Ctrl-C'}" in text
    assert "| 2.0 | warning" in text


class _Cluster:
    addresses: ClassVar = {"n1": "10.0.0.1"}

    def __init__(self, clean: bool) -> None:
        self.clean = clean

    def pids(self, name: str, command: str = "") -> list[int]:
        return [3] if command or self.clean else [3, 7]

    def run(self, *command: str) -> str:
        return "" if self.clean else "torch_7\n"


def test_whatever_is_left_is_found(tmp_path: Path) -> None:
    def wait(holds: Callable[[], bool], timeout_s: float, problem: str) -> None:
        if not holds():
            raise SoakError(problem)

    run_dir, logs = tmp_path / "run", tmp_path / "slurm" / "logs"
    (run_dir / "checkpoints" / "images-0000000008").mkdir(parents=True)
    logs.mkdir(parents=True)
    desk = SimpleNamespace(clone=tmp_path)
    watch: Any = SimpleNamespace(cluster=_Cluster(clean=True), run_dir=run_dir, desk=desk, wait=wait)
    assert command.leftovers(watch) == []
    watch.cluster.clean = False
    (run_dir / "checkpoints" / ".tmp-images-0000000016").mkdir()
    (logs / ".restart-1").touch()
    script = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    arguments = [sys.executable, "-c", script, str(run_dir / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        left = command.leftovers(watch)
        holder.communicate(b"\n")
    assert [name.removeprefix(f"{tmp_path}/") for name in left] == [
        "process 7 on n1",
        "/dev/shm/torch_7",
        "run/checkpoints/.tmp-images-0000000016",
        "slurm/logs/.restart-1",
        "the run folder's lock",
    ]
