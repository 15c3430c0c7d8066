"""A job whose log and folder lie on a full disk comes back all the same; Slurm's commands are stand-ins here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _command(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("status", "is_requeued"), [(75, True), (1, False)])
def test_a_job_on_a_full_disk_comes_back(tmp_path: Path, status: int, is_requeued: bool) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("settings.sh", "logs"))
    _command(tmp_path / ".venv" / "bin" / "python", "exit 0")
    _command(tmp_path / "bin" / "srun", f'case "$*" in *rank.sh*) exit {status};; esac')  # and leaves no file
    _command(tmp_path / "bin" / "scontrol", f'/bin/echo "$@" >> {tmp_path}/asked')
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
    }
    environment.pop("SLURM_SUBMIT_DIR", None)
    with open("/dev/full", "w") as disk:
        command = ["bash", str(tmp_path / "slurm" / "train_ldm.sh")]
        ended = subprocess.run(command, stdout=disk, stderr=disk, env=environment, timeout=60, check=False)
    assert ended.returncode == (0 if is_requeued else status)
    assert ("requeue 7" in (tmp_path / "asked").read_text().splitlines()) == is_requeued
