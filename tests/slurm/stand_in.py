"""Stands in for a training that would take long to start: counts, and meets signals as ldm_scale/train.py does.

Called as `stand_in.py SCRIPT ARGUMENT...` in the place of Python; run_dir=, steps= and seconds= count.
Rank 0 keeps the count in run_dir/count; every rank appends its signals to run_dir/rank-N.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

received: list[str] = []


def note(number: int, frame: FrameType | None) -> None:
    received.append(signal.Signals(number).name)
    with (run_dir / f"rank-{rank}").open("a") as file:
        file.write(f"{received[-1]}\n")


values = dict(argument.split("=", 1) for argument in sys.argv[2:] if "=" in argument)
rank, run_dir = int(os.environ["SLURM_PROCID"]), Path(values["run_dir"])
run_dir.mkdir(parents=True, exist_ok=True)
for caught in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(caught, note)
(run_dir / f"rank-{rank}").touch()
count = run_dir / "count"
done = int(count.read_text()) if count.exists() else 0
sys.stdout.write(f"at {done} on {os.environ['SLURMD_NODENAME']}\n")
sys.stdout.flush()
while done < int(values["steps"]):
    time.sleep(float(values["seconds"]))
    done += 1
    if rank == 0:
        count.write_text(str(done))
    if received:
        sys.exit(75 if {"SIGUSR1", "SIGUSR2"} & set(received) else 0)
