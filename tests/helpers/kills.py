"""Ranks of which one is killed at a named point of a save, and what a run that is started again finds."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config, EmaConfig
from ldm_scale.engine import collectives
from ldm_scale.engine.background_save import HostMemory
from ldm_scale.engine.checkpoint import Trained, save_checkpoint, start_save
from ldm_scale.engine.ema import RAW, ShardedEma
from ldm_scale.engine.verification import newest_verified
from ldm_scale.engine.weights import read_full_tensors
from tests.helpers.faulty import faults_set
from tests.helpers.ranks import free_port, import_before_fork, nothing_to_collect, run_ranks
from tests.helpers.sharded import BATCH, masters, network, sharded, train_step

RANKS, STAGE = 2, 2
EMA = EmaConfig(half_life_images=10.0, warmup_ratio=0.0)
# What each rank passes. Rank 0 has four tensors of the network, rank 1 has more.
POINTS = (
    "save.begin",
    "save.write,nth=1",
    "save.write,nth=2",
    "save.write,nth=4",
    "save.sync",
    "save.reports",
    "save.manifest",
    "save.rename",
    "save.renamed",
    "save.retain",
)
MODES = ("first", "later", "again", "background")


class Case(NamedTuple):
    """Where which rank is killed, and in what kind of save."""

    point: str
    rank: int
    mode: str

    def __str__(self) -> str:
        return f"{self.mode}-{self.point}-rank{self.rank}"


CASES = [Case(point, rank, mode) for mode in MODES for point in POINTS for rank in range(RANKS)]


def weights_after(steps: int) -> dict[str, Tensor]:
    """The network's weights after so many undisturbed steps."""
    return run_ranks(_weights_after, RANKS, steps)[0]  # type: ignore[no-any-return]


def killed_save(root: Path, case: Case) -> None:
    """Nothing; the save was made on all ranks, and the case's rank killed in it.

    Raises: AssertionError if no rank was killed: the point is not passed there.
    """
    import_before_fork()
    context = multiprocessing.get_context("fork")
    port = free_port()
    ranks = [context.Process(target=_main, args=(rank, port, root, case)) for rank in range(RANKS)]
    with nothing_to_collect():
        for process in ranks:
            process.start()
    wait([process.sentinel for process in ranks], timeout=60)
    ranks[case.rank].join(20)
    for process in ranks:  # as a launcher ends the others
        process.kill()
        process.join()
    assert ranks[case.rank].exitcode == -signal.SIGKILL, f"{case}: rank ended with {ranks[case.rank].exitcode}"
    assert not (root / "not killed").exists(), case


def found_after(root: Path) -> tuple[int, dict[str, Tensor]]:
    """Images and weights of the checkpoint that a run started again continues from (0: none), and can save after."""
    found = newest_verified(root, rank=0)
    if found is None:
        return 0, {}
    return found.manifest["images"], read_full_tensors(found.path, "net", RAW)


def _start() -> dict[str, Trained]:
    model = sharded(network(), STAGE)
    return {"net": Trained(model, ShardedEma(model, EMA))}


def _weights_after(steps: int) -> dict[str, Tensor]:
    trained = _start()
    for step in range(steps):
        train_step(trained["net"].model, step, 1e-2)
    return masters(trained["net"].model)


def _save(root: Path, trained: dict[str, Trained], images: int, in_background: bool) -> None:
    state, config = {"cur_images": images}, config_to_dict(Config())
    if not in_background:
        save_checkpoint(root, images, trained, state, config, keep=1)
        return
    save = start_save(root, images, trained, state, config, keep=1, memory=HostMemory())
    train_step(trained["net"].model, 99, 1e-1)  # training changes what is being written
    while save.advance() is None:
        train_step(trained["net"].model, 98, 1e-1)


def _main(rank: int, port: int, root: Path, case: Case) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # gloo tells on stderr that its peer is gone.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    trained = _start()
    if case.mode != "first":
        train_step(trained["net"].model, 0, 1e-2)
        if case.mode == "again":  # a folder of the same images, of a run that was then set back
            _save(root, trained, 2 * BATCH, False)
        _save(root, trained, BATCH, False)
        train_step(trained["net"].model, 1, 1e-2)
    collectives.barrier()
    with faults_set(f"kill:at={case.point},rank={case.rank}", rank):
        _save(root, trained, 2 * BATCH, case.mode == "background")
    if rank == case.rank:
        (root / "not killed").touch()
    os._exit(0)
