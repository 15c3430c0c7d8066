"""What was measured on: the machine, its versions and clocks as found, and the two ceilings that it reaches."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.timing import CudaClock, quartiles

PACKAGES = ("triton", "xformers", "liger-kernel", "apex", "numpy", "matplotlib")
_QUERY = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"
COPY_BYTES = 2**31  # of the source; the target is as large
MATMUL_SIZE = 8192


def environment(device: torch.device) -> dict[str, Any]:
    """Date, device, driver, clocks (read, never set), versions."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in PACKAGES},
    }
    if device.type != "cuda":
        return found | {"device": platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvidia_smi": _nvidia_smi(),
    }


def ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth (bytes read plus written) in GB/s and the rate of a bf16 matrix product in TFLOP/s, measured."""
    if device.type != "cuda":
        return {}
    clock = CudaClock()
    source = torch.randn(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = clock.prepare(lambda: torch.mul(source, 1.5, out=target), capture=False)
    copy_us = quartiles(clock.cold(copy, 20))["median"]
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.bfloat16) for _ in range(2))
    product_us = quartiles(clock.cold(clock.prepare(lambda: a @ b, capture=False), 20))["median"]
    return {
        "copy_gb_per_s": 2 * COPY_BYTES / copy_us / 1e3,
        "matmul_tflop_per_s": 2 * MATMUL_SIZE**3 / product_us / 1e6,
    }


def lines(found: dict[str, Any], measured: dict[str, float]) -> list[str]:
    """Both as lines of Markdown."""
    rows = [f"- {name}: {value}" for name, value in found.items() if value is not None]
    if measured:
        rows.append(f"- measured: copy {measured['copy_gb_per_s']:.0f} GB/s (bytes read plus bytes written), bf16 ")
        rows[-1] += f"matrix product {measured['matmul_tflop_per_s']:.0f} TFLOP/s"
    return rows


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not read: {error}"
    return "; ".join(done.stdout.strip().splitlines()) + f" (read at {time.strftime('%H:%M:%S')})"


def main(argv: Sequence[str]) -> int:
    """Writes both to a file. Exit status 0."""
    parser = argparse.ArgumentParser(description="The machine, and the ceilings measured on it.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--dry-run", action="store_true", help="of the CPU, without ceilings")
    arguments = parser.parse_args(argv)
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    found = {"environment": environment(device), "ceilings": ceilings(device)}
    # Clocks under load say more than those of an idle GPU.
    if device.type == "cuda":
        found["environment"]["nvidia_smi_after_load"] = _nvidia_smi()
    arguments.out.write_text(json.dumps(found, indent=2) + "\n")
    print("\n".join(lines(found["environment"], found["ceilings"])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
