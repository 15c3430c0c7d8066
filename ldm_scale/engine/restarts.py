"""A bound on jobs that come back and get nowhere: they would occupy a cluster for ever without anybody noticing.

Slurm counts how often it has started a job again (SLURM_RESTART_COUNT). Each such start that finds no more progress
than the one before is counted in a file beside the work; a job submitted by a person begins at 0.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ldm_scale.errors import CheckpointError

STARTS = "starts.json"
MAX_WITHOUT_PROGRESS = 5


def count_start(folder: Path, progress: int) -> None:
    """Nothing; notes this start of the work in `folder`, which has come as far as `progress`. For one rank.

    Raises: CheckpointError if it was started again too often without getting any further.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return
    path = folder / STARTS
    idle = 0
    if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
        try:
            before = json.loads(path.read_text())
            idle = int(before["without_progress"]) + 1 if progress <= int(before["progress"]) else 0
            progress = max(progress, int(before["progress"]))
        except (OSError, ValueError, KeyError, TypeError):
            idle = 0  # the first start never came this far, or the file was damaged
    if idle > MAX_WITHOUT_PROGRESS:
        raise CheckpointError(
            f"{folder}: the job came back {idle} times in a row without a new checkpoint and stops for good; read its "
            "log for what ended it, then submit the same command again"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"progress": progress, "without_progress": idle}) + "\n")
