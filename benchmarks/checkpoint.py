"""Checkpoints: writing, verifying and loading ours against DeepSpeed's own, of the same engine's state.

In turns, in one process: our save (written, synced, published) as a run makes it that is asked to stop, and the same
without checksums; DeepSpeed's save_checkpoint followed by an fsync of each of its files and folders, without which it
is not on the disk; our save that is read back from the disk; and our background save, of which the stall is timed, the
part that training waits for. Removal of older ones is not timed. Then, each time with the files' pages forgotten by the
system, our verification and load, our load alone, and DeepSpeed's load_checkpoint. Who goes first changes from round to
round.

The state is weights, AdamW's moments and no average, which DeepSpeed does not know. It also writes the weights that
compute beside the masters; the result has the bytes of both.

    python -m benchmarks.checkpoint [--device cuda] [--case mid] [--stage 1] [--rounds 20] [--folder DIR]
    torchrun --nproc-per-node 2 -m benchmarks.checkpoint --case mid
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.nn.functional as F

from benchmarks.harness import Way, take_turns
from benchmarks.measured import command_line, is_trial, parse, set_threads, spread, write_results
from benchmarks.unet_step import Case, random_batch
from benchmarks.unet_step import common_cases as cases
from ldm_scale.__main__ import run_command
from ldm_scale.config.schema import OptimizerConfig, TrainConfig, ZeroConfig
from ldm_scale.engine import collectives, env
from ldm_scale.engine.background_save import HostMemory
from ldm_scale.engine.checkpoint import Trained, load_checkpoint, save_checkpoint, start_save
from ldm_scale.engine.rank_files import complete_folders
from ldm_scale.engine.tensor_file import sync_folder
from ldm_scale.engine.verification import newest_verified
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.models.build import build_seeded, build_unet

LEARNING_RATE = 1e-5
WARMUP_ROUNDS = 1
MANY = 99  # checkpoints that are kept: removing files takes time too, which DeepSpeed leaves to others


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = command_line("Checkpoints: ours against DeepSpeed's.", cases(), "rounds", 20)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1, help="of ZeRO")
    parser.add_argument("--folder", type=Path, help="where to write, on the disk that is meant (default: a temporary)")
    arguments = parse(parser, argv)
    here = env.start(env.read_launch(), TrainConfig(device=arguments.device))
    set_threads(here.device, here.launch.local_world_size)
    results: dict[str, Any] = {}
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.case or cases():
        made = tempfile.mkdtemp(prefix="checkpoints-", dir=arguments.folder) if here.is_main else None
        folder = Path(collectives.broadcast_object(made))
        case = cases()[name]
        try:
            measured = Measurement(case, here, arguments.stage, folder).run(arguments.rounds, name)
            results[name] = {"case": asdict(case)} | measured
        finally:
            collectives.barrier()
            shutil.rmtree(folder, ignore_errors=True)
    if here.is_main:
        print(table(results))
        if not is_trial(arguments.rounds, "rounds"):
            write_results(arguments.out, "checkpoint", here.device, results)
    env.stop()
    return 0


class Measurement:
    """One engine with a state, and the two ways to save and load it."""

    def __init__(self, case: Case, here: env.Environment, stage: int, folder: Path) -> None:
        self._here, self._stage = here, stage
        self._ours, self._theirs = folder / "ours" / "checkpoints", folder / "theirs"
        module = build_seeded(
            lambda: build_unet(case.unet, case.latent_channels, case.latent_channels, case.context_width), seed=0
        )
        self._model = ShardedModel(
            module.train(),
            optimizer=OptimizerConfig(),
            zero=ZeroConfig(),
            stage=stage,
            micro_batch=case.batch,
            accumulation_steps=1,
            environment=here,
        )
        batch = random_batch(case, here.device)
        prediction = self._model(batch.z_t, batch.t, batch.context)
        self._model.backward(F.mse_loss(prediction.float(), batch.noise))
        self._model.step(LEARNING_RATE)  # moments that are not zero
        self._trained = {"unet": Trained(self._model)}
        self._images = 0
        self._memory = HostMemory()

    def run(self, num_rounds: int, name: str) -> dict[str, Any]:
        """Times, ratios and bytes."""
        shown = self._here.is_main
        turns = take_turns(self._ways(), num_rounds, warmup=WARMUP_ROUNDS, clock=_clock, name=name, shows=shown)
        ratios = {
            "save_ours_to_deepspeed_synced": ("save", "deepspeed_save_and_sync"),
            "save_to_save_without_checksum": ("save", "save_without_checksum"),
            "save_read_back_to_save": ("save_read_back", "save"),
            "verify_and_load_to_load": ("verify_and_load", "load"),
            "verify_and_load_to_deepspeed_load": ("verify_and_load", "deepspeed_load"),
            "stall_share_of_save_read_back": ("stall", "save_read_back"),
        }
        return {
            "zero_stage": self._stage,
            "ranks": self._here.world_size,
            "rounds": num_rounds,
            "bytes": {"ours": _bytes(self._ours), "deepspeed": _bytes(self._theirs)},
            "seconds": turns.spreads(),
            "ratios": {what: spread(turns.ratios(*pair)) for what, pair in ratios.items()},
        }

    def _ways(self) -> dict[str, Way]:
        """Saves before loads, so that there is something to load in the first round."""
        return {
            "save": Way(partial(self._save, None), self._saving),
            "save_without_checksum": Way(partial(self._save, None), self._saving_without_checksum),
            "save_read_back": Way(partial(self._save, MANY), self._saving),
            "deepspeed_save_and_sync": Way(self._save_theirs, self._saving_theirs),
            "verify_and_load": Way(self._verify_and_load, partial(_from_disk, self._ours)),
            "load": Way(self._load, partial(_from_disk, self._ours)),
            "deepspeed_load": Way(self._load_theirs, partial(_from_disk, self._theirs)),
            "stall": Way(self._save_in_background, self._saving, times_itself=True),
        }

    def _save(self, keep: int | None) -> None:
        save_checkpoint(self._ours, self._images, self._trained, {}, {}, keep)

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Only the newest of ours is there afterwards."""
        self._images += 1
        yield
        collectives.barrier()
        for folder in complete_folders(self._ours)[:-1] if self._here.is_main else ():
            shutil.rmtree(folder)
        collectives.barrier()

    @contextmanager
    def _saving_without_checksum(self) -> Iterator[None]:
        with self._saving(), mock.patch("zlib.crc32", lambda data, value=0: value):
            yield

    @contextmanager
    def _saving_theirs(self) -> Iterator[None]:
        if self._here.is_main:
            shutil.rmtree(self._theirs, ignore_errors=True)
        yield

    def _save_theirs(self) -> None:
        self._model.engine.save_checkpoint(str(self._theirs), tag="t")
        collectives.barrier()
        if self._here.is_main:
            for path in [*self._theirs.rglob("*"), self._theirs, self._theirs.parent]:
                sync_folder(path)  # a file as well

    def _verify_and_load(self) -> None:
        found = newest_verified(self._ours, self._here.rank)
        assert found is not None, "just written"
        load_checkpoint(found.path, self._trained, verified=True)

    def _load(self) -> None:
        load_checkpoint(complete_folders(self._ours)[-1], self._trained, verified=True)

    def _load_theirs(self) -> None:
        self._model.engine.load_checkpoint(str(self._theirs), tag="t")

    def _save_in_background(self) -> float:
        """Seconds that training would stand still."""
        begin_s = _clock()
        save = start_save(self._ours, self._images, self._trained, {}, {}, MANY, self._memory)
        stall_s = _clock() - begin_s
        folder = None
        while folder is None:
            while collectives.any_rank(save.is_working, self._here.device):
                time.sleep(0.01)
            begin_s = time.perf_counter()
            folder = save.advance()
            stall_s += time.perf_counter() - begin_s
        return stall_s


def table(results: dict[str, Any]) -> str:
    """Lines per case: seconds, then ratios."""
    lines = [f"{'':<44}{'median':>9}{'quartiles':>20}"]
    for name, result in results.items():
        sizes = ", ".join(f"{who} {size / 2**20:.1f} MiB" for who, size in result["bytes"].items())
        lines.append(f"{name}: ZeRO {result['zero_stage']}, {result['ranks']} rank(s); {sizes}")
        for what, values in (result["seconds"] | result["ratios"]).items():
            unit = " (s)" if what in result["seconds"] else ""
            quartiles = f"{values['lower_quartile']:.3f} .. {values['upper_quartile']:.3f}"
            lines.append(f"  {what + unit:<42}{values['median']:>9.3f}{quartiles:>20}")
    return "\n".join(lines)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _clock() -> float:
    """Seconds, once all ranks are here. Collective: all ranks."""
    collectives.barrier()
    return time.perf_counter()


@contextmanager
def _from_disk(folder: Path) -> Iterator[None]:
    forget(folder)
    yield


def forget(folder: Path) -> None:
    """Nothing; the system holds no pages of the folder's files, so that the disk answers."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
