from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm_scale import faults
from ldm_scale.errors import ConfigError


@pytest.fixture(autouse=True)
def off_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_rules", ())
    monkeypatch.setattr(faults, "_file", None)


def _configure(monkeypatch: pytest.MonkeyPatch, text: str, rank: int = 0) -> list[str]:
    said: list[str] = []
    monkeypatch.setenv(faults.VARIABLE, text)
    faults.configure(rank, said.append)
    return said


def test_without_the_variable_nothing_happens_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _configure(monkeypatch, "") == []
    file = tmp_path / "x"
    file.write_bytes(b"content")
    for point in faults.POINTS:
        faults.reach(point, file)
        assert faults.poison(point, torch.ones(3)).tolist() == [1, 1, 1]
    assert file.read_bytes() == b"content"


def test_a_rule_happens_at_its_point_rank_and_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "enospc:at=save.write,rank=1,nth=2,times=2; eio:at=save.sync"
    assert len(_configure(monkeypatch, text, rank=1)) == 2
    happened = []
    for _ in range(5):
        try:
            faults.reach("save.write")
            happened.append(0)
        except OSError as error:
            happened.append(error.errno or -1)
        faults.reach("save.rename")
    assert happened == [0, errno.ENOSPC, errno.ENOSPC, 0, 0]
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        faults.reach("save.sync")
    _configure(monkeypatch, text, rank=0)
    for _ in range(5):
        faults.reach("save.write")


def test_values_and_files_are_damaged_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _configure(monkeypatch, "nan:at=step.loss,nth=2; flip:at=weights; flip:at=save.renamed; truncate:at=load.verify")
    assert torch.isfinite(faults.poison("step.loss", torch.tensor(2.0)))
    assert torch.isnan(faults.poison("step.loss", torch.tensor(2.0)))
    weight = torch.ones(2, 2)
    faults.poison("weights", weight)
    assert (weight != 1).sum() == 1
    assert abs(weight[0, 0].item() - 1) < 1e-6
    file = tmp_path / "x"
    file.write_bytes(bytes(100))
    faults.reach("save.renamed", file)
    assert sum(byte.bit_count() for byte in file.read_bytes()) == 1
    faults.reach("load.verify", file)
    assert file.stat().st_size == 50


def test_rules_of_a_file_come_and_go_while_the_process_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "faults"

    def order(text: str) -> None:
        (tmp_path / "new").write_text(text)
        (tmp_path / "new").replace(file)

    def fails() -> bool:
        try:
            faults.reach("save.write")
        except OSError:
            return True
        return False

    said = _configure(monkeypatch, str(file))
    assert (fails(), said) == (False, [])
    order("enospc:at=save.write,nth=2; nan:at=step.loss")
    assert torch.isnan(faults.poison("step.loss", torch.tensor(2.0)))
    assert [fails() for _ in range(3)] == [False, True, False]
    assert len(said) == 2
    order("eio:at=save.write")
    assert [fails() for _ in range(2)] == [True, False]
    file.unlink()
    order("eio:at=save.write")
    assert fails()
    file.unlink()
    assert not fails()
    order("burn:at=save.write")
    with pytest.raises(ConfigError, match="is no rule"):
        fails()


def test_a_kill_is_a_kill() -> None:
    script = "from ldm_scale import faults; faults.configure(0, print); faults.reach('step.update'); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {faults.VARIABLE: "kill:at=step.update"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert b"alive" not in done.stdout


@pytest.mark.parametrize("text", ["kill", "kill:at=nowhere", "burn:at=save.write", "kill:at=save.write,rank=x", "x:y"])
def test_what_is_no_rule_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    with pytest.raises(ConfigError, match="is no rule"):
        _configure(monkeypatch, text)
