"""What the benchmarks of steps share: their command line, spread, what they ran on, and their result file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_scale.engine.env import cpu_threads
from ldm_scale.errors import ConfigError

RESULTS = Path(__file__).resolve().parent / "results"
MIN_TIMED = 10  # rounds or pairs; fewer are a trial: printed, not written


def command_line(
    description: str, cases: Iterable[str], counted: str, default: int, default_case: str = "all"
) -> argparse.ArgumentParser:
    """A parser of --device, --case, --out, and how often is timed: `counted` is "pairs" or "rounds", and the option."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", choices=tuple(cases), action="append", help=f"default: {default_case}")
    parser.add_argument(
        f"--{counted}",
        type=at_least_two,
        default=default,
        help=f"timed {counted} (below {MIN_TIMED}: a trial; {default})",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser


def at_least_two(text: str) -> int:
    """A number of timings, which have a spread.

    Raises: ArgumentTypeError for less than two.
    """
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: one timing has no spread; give a whole number from 2 up")
    return int(text)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, and the folder of --out before anything is timed; ends the process without the device.

    Raises: ConfigError for a folder that cannot be written to, or a wrong OMP_NUM_THREADS.
    """
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    threads()
    make_folder(arguments.out)
    return arguments


def make_folder(out: Path) -> None:
    """Nothing; the folder of --out is there and can be written to, which is tried before minutes are spent.

    Raises: ConfigError if not.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"--out {out}: is no folder to write to ({error.strerror}); give another") from error


def threads(processes: int = 1) -> int:
    """Threads that each of so many processes on this host computes with on a CPU: OMP_NUM_THREADS, where it is set.

    Else as training has it, which does not ask that variable: its share of the cores.
    Raises: ConfigError if the variable is no number of threads.
    """
    wanted = os.environ.get("OMP_NUM_THREADS")
    if wanted is None:
        return cpu_threads(processes)
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ConfigError(f"OMP_NUM_THREADS={wanted}: must be a whole number from 1 up; set it so, or unset it")
    return int(wanted)


def set_threads(device: torch.device, processes: int = 1) -> None:
    """Nothing; on a CPU this process computes with `threads` threads from now on."""
    if device.type == "cpu":
        torch.set_num_threads(threads(processes))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, quartiles and maximum."""
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return {
        "min": min(values),
        "lower_quartile": lower,
        "median": median,
        "upper_quartile": upper,
        "max": max(values),
    }


def is_trial(timed: int, counted: str) -> bool:
    """Whether so few were timed that nothing is to be written, and says so."""
    if timed < MIN_TIMED:
        print(f"a trial: below {MIN_TIMED} {counted} nothing is written")
    return timed < MIN_TIMED


def write_results(out: Path, benchmark: str, device: torch.device, results: dict[str, Any]) -> Path:
    """OUT/BENCHMARK-DEVICE-DATE.json, which is written, and said so."""
    date = datetime.now(UTC).date().isoformat()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{benchmark}-{device.type}-{date}.json"
    document = {"benchmark": benchmark, "environment": environment(device, date), "results": results}
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"written to {path}")
    return path


def write_cases(out: Path, benchmark: str, device: torch.device, results: dict[str, dict[str, Any]]) -> Path:
    """As `write_results`, of results by case: the day's other cases stay, each with what it was measured on."""
    date = datetime.now(UTC).date().isoformat()
    path = out / f"{benchmark}-{device.type}-{date}.json"
    kept: dict[str, Any] = {}
    if path.is_file():
        before = json.loads(path.read_text())
        kept = {name: {"environment": before["environment"]} | case for name, case in before["results"].items()}
    here = environment(device, date)
    measured = {name: case | {"environment": here} for name, case in results.items()}
    return write_results(out, benchmark, device, kept | measured)


def environment(device: torch.device, date: str) -> dict[str, Any]:
    """What was measured on."""
    return {
        "date": date,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
    }


def _cpu_name() -> str:
    """The processor as the kernel names it; Python's own answer is often empty."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def wall_clock(device: torch.device) -> Callable[[], float]:
    """Seconds that pass, read after the device's work on CUDA."""

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized if device.type == "cuda" else time.perf_counter


def step_clock(device: torch.device, ranks: int) -> Callable[[], float]:
    """Seconds: after the device's work on CUDA; of this process's CPU where it computes alone on one thread.

    Several threads wait actively for each other, which counts as work: only one thread's time is its own.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1 and ranks == 1
    return time.process_time if alone else wall_clock(device)


@contextmanager
def own_peak(
    device: torch.device, network: nn.Module, optimizer: torch.optim.Optimizer, peaks: dict[str, float], name: str
) -> Iterator[None]:
    """Notes the most GiB that a step in the block takes on CUDA, as if nothing else lay there; a CPU counts none."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before, own = torch.cuda.memory_allocated(device), own_bytes(network, optimizer)
    yield
    torch.cuda.synchronize()
    peaks[name] = (torch.cuda.max_memory_allocated(device) - before + own) / 2**30


def own_bytes(network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of weights, gradients and the optimizer's states."""
    tensors = [x for p in network.parameters() for x in (p.detach(), p.grad) if x is not None]
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in (*tensors, *states))
