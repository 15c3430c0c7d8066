"""Which of DeepSpeed's compiled ops exist here, asked of a process of its own: importing deepspeed prints to stdout.

This project needs none of them: Adam is torch's fused one, communication NCCL's or gloo's (`zero.import_deepspeed`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

TIMEOUT_S = 120.0


def read_ops(device_type: str) -> dict[str, dict[str, bool]] | None:
    """Op name -> whether it is "installed" (built beforehand) and "compatible" (could be built here); None if unknown.

    Takes seconds.
    """
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environ["DS_ACCELERATOR"] = "cuda" if device_type == "cuda" else "cpu"
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__], capture_output=True, text=True, timeout=TIMEOUT_S, env=environ, check=True
        )
        ops: dict[str, dict[str, bool]] = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError, OSError):
        return None
    return ops


def _print_ops() -> None:
    """Nothing; the last line of stdout is the JSON object that `read_ops` returns."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    from deepspeed.ops.op_builder.builder import probe_is_compatible

    def describe(name: str, builder: Any) -> dict[str, bool]:
        return {
            "installed": bool(installed_ops.get(name, False)),
            "compatible": bool(probe_is_compatible(builder, False)),
        }

    sys.stdout.write("\n" + json.dumps({name: describe(name, builder) for name, builder in ALL_OPS.items()}) + "\n")


if __name__ == "__main__":
    _print_ops()
