"""Peak memory and time of conversions, as a ratio to the size of the model that is converted.

A diffusion model with random weights becomes an artifact, and from it a checkpoint that two ranks write. Each
conversion is a fresh process: it converts a tiny model first, so that libraries are loaded and warm, sets the kernel's
high-water mark of resident memory back, and converts the large one. The figure is how far the mark rose over what was
resident before, in bytes of the model (fp32, autoencoder and text encoder included). The mark counts everything that
is mapped and touched, pages of mapped files too, which the system could take back; what the system holds of files
beside that (the page cache) is not the process's. glibc is told to give back what is freed, as in benchmarks.memory.

    OMP_NUM_THREADS=1 python -m benchmarks.convert_memory [--case 1b] [--step artifact:diffusers] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measured import RESULTS, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ConditioningConfig,
    Config,
    DataConfig,
    TextConditioningConfig,
    TrainConfig,
    UNetConfig,
)

GOAL = 1.3
MARK = "result: "
TINY = "tiny"
ARTIFACT, CHECKPOINT, DIFFUSERS = "artifact", "checkpoint", "diffusers"
FOLDERS = {ARTIFACT: "artifact", CHECKPOINT: "checkpoints/images-0000000064", DIFFUSERS: "diffusers"}
LOAD = "load_diffusion"
STEPS = (  # source:what becomes of it
    "artifact:safetensors",
    "artifact:diffusers",
    "diffusers:safetensors",
    "checkpoint:safetensors",
    "checkpoint:diffusers",
    "artifact:load_diffusion",
    "checkpoint:load_diffusion",
)


def config_of(case: str, artifact: str = "") -> Config:
    """A text-to-image model: SD-2's at several widths."""
    width, text_width, depth, first = {
        TINY: (32, 32, 1, 32),
        "small": (64, 128, 2, 32),
        "300m": (192, 512, 4, 64),
        "1b": (320, 1024, 8, 128),
    }[case]
    return Config(
        stage="diffusion",
        artifact=artifact,
        autoencoder=AutoencoderConfig(base_channels=first),
        unet=UNetConfig(base_channels=width, head_dim=32),
        conditioning=ConditioningConfig(text=TextConditioningConfig(width=text_width, depth=depth, num_heads=4)),
        data=DataConfig(resolution=256),
    )


def main(argv: Sequence[str]) -> int:
    """0 if every conversion took less than GOAL times the model's size."""
    parser = argparse.ArgumentParser(description="Peak memory of conversions, as a ratio to the model's size.")
    parser.add_argument("--case", choices=("small", "300m", "1b"), default="1b", help="size of the model; default: 1b")
    parser.add_argument("--step", choices=STEPS, action="append", help="a conversion, in this order; default: all")
    parser.add_argument("--folder", type=Path, help="where files lie, on the disk that is meant; 4 times the model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--one", nargs="+", metavar=("FOLDER", "CASE STEP"), help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    parser.add_argument("--rank-of", nargs=2, metavar=("FOLDER", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        folder, case, *steps = arguments.one
        for step in steps:
            print(MARK + json.dumps({"step": step} | convert(Path(folder), case, step)))
    elif arguments.make:
        make_artifact_folder(Path(arguments.make[0]), arguments.make[1])
    elif arguments.rank_of:
        write_checkpoint(Path(arguments.rank_of[0]), arguments.rank_of[1])
    else:
        if arguments.folder:
            arguments.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="convert", dir=arguments.folder) as folder:
            for results in measure(Path(folder), arguments.case, arguments.step or STEPS):
                print(table(results))
                write_results(arguments.out, "convert_memory", torch.device("cpu"), {arguments.case: results})
        return int(any(step["ratio"] >= GOAL for step in results["steps"]))
    return 0


def measure(folder: Path, case: str, steps: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The model's size, and peak memory and time of the conversions so far, after each."""
    for name in (TINY, case):
        _run("benchmarks.convert_memory", "--make", str(folder), name)
    size = size_of(folder, case)
    results: list[dict[str, Any]] = []
    for step in tqdm(steps, desc="conversions", unit="conversion"):
        if step.startswith(CHECKPOINT) and not (folder / case / FOLDERS[CHECKPOINT]).exists():
            ranks = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
            for name in (TINY, case):
                _run(*ranks, "benchmarks.convert_memory", "--rank-of", str(folder), name)
        results += run_steps(folder, case, [step])
        yield {"bytes": size, "parameters": size // 4, "steps": results}


def run_steps(folder: Path, case: str, steps: Sequence[str]) -> list[dict[str, Any]]:
    """What conversions of a model in the folder take, one after the other in a process of their own."""
    lines = _run("benchmarks.convert_memory", "--one", str(folder), case, *steps).splitlines()
    found = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    return [step | {"ratio": step["peak_bytes"] / size_of(folder, case)} for step in found]


def size_of(folder: Path, case: str) -> int:
    """Bytes of the model's files."""
    return sum(path.stat().st_size for path in (folder / case / ARTIFACT).rglob("*.safetensors"))


def make_artifact_folder(folder: Path, case: str) -> None:
    """Nothing; the artifact of the untrained model is there."""
    from ldm_scale.interchange.artifact import DiffusionArtifact, write_artifact, write_diffusion_artifact
    from ldm_scale.interchange.publish import untrained_artifact

    made = untrained_artifact(config_of(case), seed=0)
    assert isinstance(made, DiffusionArtifact), "a stage-2 configuration"
    write_diffusion_artifact(folder / case / ARTIFACT, made)
    first = made.autoencoder
    write_artifact(folder / case / "autoencoder", first.state, first.config, first.statistics, first.provenance)


def write_checkpoint(folder: Path, case: str) -> None:
    """Nothing; the checkpoint of the artifact's weights is there, as ranks of ZeRO write it. Collective: all ranks."""
    from ldm_scale.config.convert import config_to_dict
    from ldm_scale.engine import env
    from ldm_scale.engine.folder_write import FolderWrite
    from ldm_scale.engine.rank_files import Piece
    from ldm_scale.interchange.artifact import read_diffusion_artifact

    here = env.start(env.read_launch(), TrainConfig(device="cpu"))
    made, pieces = read_diffusion_artifact(folder / case / ARTIFACT), []
    for name, values in made.state.items():
        # Boundaries of ranks run through tensors.
        begin, end = (values.numel() * rank // here.world_size for rank in (here.rank, here.rank + 1))
        pieces.append(Piece("diffusion", "weight", name, tuple(values.shape), begin, values.reshape(-1)[begin:end]))
    write = FolderWrite((folder / case / FOLDERS[CHECKPOINT]).parent, 64, here.rank)
    write.begin()
    write.write(pieces)
    write.exchange(
        {
            "models": {"diffusion": {"optimizer_steps": 0, "zero_stage": 1}},
            "state": {"autoencoder_hash": made.autoencoder.content_hash},
            "config": config_to_dict(config_of(case, str(folder / case / "autoencoder"))),
        }
    )
    write.publish()
    write.confirm()
    env.stop()


def table(results: dict[str, Any]) -> str:
    """A line per conversion."""
    lines = [f"{results['parameters'] / 1e6:,.0f}M parameters, {results['bytes'] / 1e9:.2f} GB"]
    lines.append(f"{'from:to':<28}{'peak GB':>9}{'ratio':>7}{'s':>8}{'CPU s':>8}")
    for step in results["steps"]:
        lines.append(
            f"{step['step']:<28}{step['peak_bytes'] / 1e9:>9.2f}{step['ratio']:>7.2f}"
            f"{step['seconds']:>8.1f}{step['cpu_seconds']:>8.1f}"
        )
    return "\n".join(lines)


def convert(folder: Path, case: str, step: str) -> dict[str, float]:
    """Bytes beyond what was resident before, and seconds, of one conversion in this process."""
    _once(folder / TINY, step)
    # 5: the mark is what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    before, begun, cpu = _status("VmRSS"), time.perf_counter(), time.process_time()
    _once(folder / case, step)
    seconds = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
    return {"before_bytes": before, "peak_bytes": _status("VmHWM") - before, **seconds}


def _once(folder: Path, step: str) -> None:
    """Nothing; the conversion is done. A diffusers folder stays, for the way back."""
    name, what = step.split(":")
    source = folder / FOLDERS[name]
    if what == LOAD:
        import ldm_scale

        model = ldm_scale.load_diffusion(source)
        side = model.side_multiple
        model.sample(["a red apple"], seeds=[0], num_steps=1, guidance_scale=1.0, height=side, width=side)
        return
    from ldm_scale import export

    out = folder / (FOLDERS[DIFFUSERS] if what == "diffusers" else "out")
    export.main([str(source), "--to", what, "--out", str(out)])
    if out.name == "out":
        shutil.rmtree(out)


def _run(*module: str) -> str:
    command = [sys.executable, "-m", *module]
    # Else glibc keeps what was freed, and the mark is of that, too.
    variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=variables).stdout


def _status(field: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
