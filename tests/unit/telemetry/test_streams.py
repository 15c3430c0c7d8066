"""A command whose messages go to a full disk ends as it would have ended otherwise."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from ldm_scale.telemetry.streams import enduring

COMMAND = """
import sys
from ldm_scale.__main__ import run_command
from ldm_scale.errors import Restart
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.streams import enduring
from ldm_scale.telemetry.throughput import TrainProgress

def command(_):
    sys.stdout = enduring(sys.stdout)
    get_logger(0).info("begins")
    with TrainProgress(total_images=64) as progress:
        progress.update(8, {"loss": 1.0})
        progress._write_plain()
    print("a library's word")
    sys.stdout.flush()
    raise Restart("comes back")

sys.exit(run_command(command, None))
"""


@pytest.mark.parametrize("full", ["stdout", "stderr"])
def test_a_full_disk_under_the_log_changes_nothing(full: str) -> None:
    other = "stderr" if full == "stdout" else "stdout"
    with open("/dev/full", "w") as disk:
        streams = {full: disk, other: subprocess.PIPE}
        ended = subprocess.run([sys.executable, "-c", COMMAND], text=True, check=False, **streams)  # type: ignore[call-overload]
    assert ended.returncode == 75
    assert ("error: comes back" in ended.stderr) if other == "stderr" else (ended.stdout == "a library's word\n")


def test_what_others_put_in_the_place_of_a_stream_stays() -> None:
    stream = io.StringIO()
    assert enduring(stream) is stream
