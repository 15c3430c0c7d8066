"""What the proof consists of, in which order, and how much of the time each phase may take.

A phase that is done early leaves its time to the next. Correctness runs many processes at once, since most of its time
goes into compiling kernels; whatever is timed has the GPU for itself.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_proof.pieces import ROOT, Piece, python
from benchmarks.kernels.unet_step_gpu import REPLAYED, WAYS

# Ends of the phases, as shares of the whole time.
MEMORY_ENDS, CORRECTNESS_ENDS, SD2_ENDS, UNET_ENDS, WAYS_END = 0.12, 0.42, 0.66, 0.77, 0.92
TESTS_STOP_S = 25.0  # before a phase's end no further test begins
COMPILING_S = 1200.0  # a proof shorter than this has no time for torch.compile to make SD-2's graphs
SWEEP_STOP_S = 25.0  # and no further case is timed
CHECKERS_STOP_S = 40.0  # or checked, which compiles beside many others
# Processes for the tests of a file; the others have one. Each compiles kernels of its own.
SHARES = {"test_group_norm_silu": 3, "test_attention": 2}
RANDOM_SHARES = {"group_norm_silu": 4, "attention": 3, "geglu": 1, "vector_quantize": 1, "ema_update": 1}
# Not of the GPU: ahead-of-time compilation has its own command, the counts and the interpreter's trainings theirs.
RANDOM = "test_random_shapes"
NOT_OF_THE_GPU = ("test_aot", "test_compil", "test_roofline", "test_shapes", "test_training")
CHECKERS = 4  # processes that check SD-2's shapes during the tests; what they compile is there for the timing
CHECKER_MEMORY = 0.1  # of the GPU each
TIMED = "kernels"  # folder of the sweeps that time, in the work folder
BENCHMARK = ("benchmarks/kernels/run.py",)
SD2 = ("--model", "sd2-64", "--model", "sd2-32", "--batch", "32", "--batch", "8")
ALL = ("--batch", "8", "--batch", "32", "--batch", "1", "--batch", "64")


@dataclass(frozen=True)
class Phase:
    """Pieces that run together, at most `parallel` at once, until `until_s` (Unix time)."""

    name: str
    pieces: Sequence[Piece]
    until_s: float
    parallel: int = 1


def phases(work: Path, begin_s: float, end_s: float, dry_run: bool = False) -> list[Phase]:
    """The proof's phases by priority; `work` is where the pieces leave what they found."""
    if dry_run:
        return _dry_phases(work, end_s)
    span_s = end_s - begin_s
    ends = (MEMORY_ENDS, CORRECTNESS_ENDS, SD2_ENDS, UNET_ENDS, WAYS_END)
    memory_s, correctness_s, sd2_s, unet_s, ways_s = (begin_s + share * span_s for share in ends)
    ways = WAYS if span_s >= COMPILING_S else (REPLAYED,)
    memory = Piece("memory", python("-m", "benchmarks.gpu_proof.memory", "--out", str(work / "memory.json")))
    workers = max(2, (os.cpu_count() or 2) - 2)
    unet = ("-m", "benchmarks.kernels.unet_step_gpu", "--out", str(work / "unet.json"))
    # The step stops by itself a little before its piece is stopped.
    unet_seconds = str(max(20.0, (UNET_ENDS - SD2_ENDS) * span_s - 10))
    return [
        Phase("device", [device(work)], memory_s),
        # By itself: beside other processes the tensors beyond 2**31 elements might not fit.
        Phase("memory", [memory], memory_s),
        Phase("correctness", correctness(work, correctness_s), correctness_s, workers),
        Phase("SD-2 shapes", [_benchmark(work, "SD-2 shapes", SD2, sd2_s - SWEEP_STOP_S)], sd2_s),
        Phase("UNet step", [Piece("UNet step", python(*unet, "--seconds", unet_seconds))], unet_s),
        Phase("ways to compute", [unet_way(work, way, (ways_s - unet_s) / len(ways) - 5) for way in ways], ways_s),
        Phase("other shapes", [_benchmark(work, "other shapes", ALL, end_s - SWEEP_STOP_S)], end_s),
    ]


def device(work: Path, *arguments: str) -> Piece:
    """The machine and its ceilings, read by a process of its own."""
    return Piece("device", python("-m", "benchmarks.kernels.device", "--out", str(work / "device.json"), *arguments))


def unet_way(work: Path, way: str, seconds: float) -> Piece:
    """SD-2's step computed that way, beside the plain one."""
    arguments = ("--way", way, "--seconds", str(max(10.0, seconds)), "--out", str(work / way_file(way)))
    return Piece(f"UNet step, {way}", python("-m", "benchmarks.kernels.unet_step_gpu", *arguments))


def way_file(way: str) -> str:
    """Where a way's step is written, in the work folder."""
    return f"unet-{way.replace(' ', '-')}.json"


def correctness(work: Path, until_s: float) -> list[Piece]:
    """Checks of SD-2's shapes, which end first, then kernel tests by file and share: longest first."""
    names = [path.stem for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py"))]
    chosen = [name for name in names if not name.startswith((*NOT_OF_THE_GPU, RANDOM))]
    chosen.sort(key=lambda name: -SHARES.get(name, 1))
    pieces = []
    for i in range(1, CHECKERS + 1):
        limits = ("--share", f"{i}/{CHECKERS}", "--memory-share", str(CHECKER_MEMORY))
        arguments = (*SD2, "--check-only", *limits)
        piece = _benchmark(work, f"check {i}", arguments, until_s - CHECKERS_STOP_S, f"check{i}")
        # Each would start a pool of compilers of its own.
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        pieces.append(Piece(piece.name, piece.command, environment))
    for name in chosen:
        shares = SHARES.get(name, 1)
        pieces += [kernel_tests(work, name, f"{i}/{shares}", until_s - TESTS_STOP_S) for i in range(1, shares + 1)]
    # By operation, so that one that compiles for long does not keep the others from their draws.
    for operation, shares in RANDOM_SHARES.items():
        for i in range(1, shares + 1):
            only = ("-k", f"test_{operation}")
            pieces.append(kernel_tests(work, RANDOM, f"{i}/{shares}", until_s - TESTS_STOP_S, None, *only))
    return pieces


def kernel_tests(
    work: Path, name: str, share: str, stop_s: float, environment: dict[str, str] | None = None, *arguments: str
) -> Piece:
    """A share of a file of kernel tests, or of what `arguments` leave of it."""
    title = " ".join([name, *(argument for argument in arguments if argument != "-k"), share])
    record = work / f"{title.replace('/', '_').replace(' ', '-')}.jsonl"
    # Options of pyproject.toml that need plugins are left aside: pytest alone must do.
    command = python("-m", "pytest", f"tests/kernels/{name}.py", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider")
    command += ("-p", "benchmarks.gpu_proof.recorder", "-o", "addopts=--import-mode=importlib")
    # A machine that is not ours may have an older pytest than the project asks for.
    command += ("-o", "minversion=7", *arguments)
    variables = {
        "GPU_PROOF_RECORD": str(record),
        "GPU_PROOF_SHARE": share,
        "GPU_PROOF_DEADLINE": str(stop_s),
        "OMP_NUM_THREADS": "1",
    }
    return Piece(title, command, variables | (environment or {}), record)


def _benchmark(work: Path, name: str, arguments: Sequence[str], stop_s: float, folder: str = TIMED) -> Piece:
    """A sweep; those that time share a journal, so that the later one takes up what the earlier left.

    None writes a report of its own: the summary has everything, and drawing could take longer than is left.
    """
    stop = ("--stop-at", str(stop_s), "--no-report")
    # What hung while it was checked would hang again where it is timed.
    checked = [f"--avoid={work / f'check{i}'}" for i in range(1, CHECKERS + 1) if folder == TIMED]
    return Piece(name, python(*BENCHMARK, "--out", str(work / folder), *stop, *checked, *arguments))


def _dry_phases(work: Path, end_s: float) -> list[Phase]:
    tested: list[Piece] = []
    if importlib.util.find_spec("triton") is not None and (ROOT / f"tests/kernels/{RANDOM}.py").exists():
        # The interpreter is slow: one operation stands for all.
        interpreted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        tested = [kernel_tests(work, RANDOM, "1/1", end_s, interpreted, "-k", "geglu")]
    unet = ("-m", "benchmarks.kernels.unet_step_gpu", "--dry-run", "--seconds", "1", "--out", str(work / "unet.json"))
    sweep = (*BENCHMARK, "--dry-run", "--out", str(work / TIMED), "--stop-at", str(end_s))
    return [
        Phase("device", [device(work, "--dry-run")], end_s),
        Phase("correctness", tested, end_s),
        Phase("SD-2 shapes", [Piece("SD-2 shapes", python(*sweep))], end_s),
        Phase("UNet step", [Piece("UNet step", python(*unet))], end_s),
        # Compilation takes long on a CPU, and what it makes there says nothing of a GPU's.
        Phase("ways to compute", [_dry_way(work, REPLAYED)], end_s),
    ]


def _dry_way(work: Path, way: str) -> Piece:
    piece = unet_way(work, way, 0.0)
    return Piece(piece.name, (*piece.command, "--dry-run"))
