"""A bound on jobs that come back and get nowhere: they would occupy a cluster for ever without anybody noticing.

Slurm counts how often it has started a job again (SLURM_RESTART_COUNT). A file beside the work says at which of these
starts of the job it was found to have come further; nothing needs to be written, as a full disk may not allow, for
those that find it where it was. A job submitted by a person begins anew.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.errors import CheckpointError
from ldm_scale.telemetry.side_files import side_write

STARTS = "starts.json"
MAX_WITHOUT_PROGRESS = 5


def count_start(folder: Path, progress: int) -> None:
    """Nothing; notes this start of the work in `folder`, which has come as far as `progress`. For one rank.

    Raises: CheckpointError if it was started again too often without getting any further.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return
    job, start = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    path = folder / STARTS
    try:
        before = json.loads(path.read_bytes())
        is_further = before["job"] != job or progress > int(before["progress"]) or start == 0
        idle = 0 if is_further else start - int(before["start"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        is_further, idle = True, 0  # the first start never came this far, or the file was damaged
    if idle > MAX_WITHOUT_PROGRESS:
        raise CheckpointError(
            f"{folder}: the job came back {idle} times in a row without a new checkpoint and stops for good; read its "
            "log for what ended it, then submit the same command again"
        )
    if is_further:
        with side_write(path):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps({"job": job, "start": start, "progress": progress}) + "\n")
