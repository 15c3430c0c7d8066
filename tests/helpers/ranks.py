"""Runs a function on several ranks: forked processes of this one, joined by gloo on the loopback interface."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess as Process
from pathlib import Path
from typing import Any

import torch


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """The results of function(*args), called on every rank, in rank order.

    Forked, so that the imports of this process are there at once; it must not have a process group of its own.
    Raises: AssertionError with the ranks' tracebacks if any of them failed or did not end in time.
    """
    import_before_fork()
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    with nothing_to_collect():
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(rank, world_size, port, sender, function, args))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
    outcomes = [_receive(pipe, timeout_s) for pipe in pipes]
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
    failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
    assert not failures, "\n".join(failures)
    return [value for _, value in outcomes]


@dataclass
class Rank:
    """A rank that may end in any way."""

    process: Process
    log: Path

    @property
    def output(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text()

    def end(self, timeout_s: float = 90.0) -> int:
        """Its exit status, negative for a signal.

        Raises: AssertionError with its output if it does not end.
        """
        self.process.join(timeout_s)
        assert self.process.exitcode is not None, f"did not end within {timeout_s} s:\n{self.output}"
        return int(self.process.exitcode)


@contextmanager
def started_ranks(function: Callable[..., Any], world_size: int, logs: Path, *args: Any) -> Iterator[list[Rank]]:
    """Ranks that call function(*args), their output in files below `logs`; they are killed when the block is left."""
    import_before_fork()
    context = multiprocessing.get_context("fork")
    port = free_port()
    logs.mkdir(parents=True, exist_ok=True)
    ranks = []
    with nothing_to_collect():
        for rank in range(world_size):
            log = logs / f"rank-{rank}.log"
            process = context.Process(target=_logged_main, args=(rank, world_size, port, log, function, args))
            process.start()
            ranks.append(Rank(process, log))
    try:
        yield ranks
    finally:
        for started in ranks:
            started.process.kill()
            started.process.join()


def _logged_main(
    rank: int, world_size: int, port: int, log: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    _set_place(rank, world_size, port)
    status = 0
    try:
        status = int(function(*args) or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@contextmanager
def nothing_to_collect() -> Iterator[None]:
    """Forks made in the block leave this process's objects alone when they collect garbage.

    Looking through a million objects takes time, and writes to each, which copies the page that it shares.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def import_before_fork() -> None:
    """Loads here, once, what every rank would otherwise load by itself when it starts DeepSpeed (eight seconds)."""
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer

    assert deepspeed.ops.__compatible_ops__  # asks compilers, once
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads torch._dynamo


def _receive(pipe: Connection, timeout_s: float) -> tuple[bool, Any]:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(timeout_s) else (False, f"no result within {timeout_s} s")
    except EOFError:
        return False, "the process ended without a result"


def _rank_main(
    rank: int, world_size: int, port: int, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    _set_place(rank, world_size, port)
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    # By value: a Connection would send tensors as handles to memory of this process, which is about to end.
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    # Without this, exit handlers of the parent's libraries run in the child as well.
    os._exit(0)


def _set_place(rank: int, world_size: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        # One thread a rank, even of one rank alone: on a busy machine two threads keep waiting for each other.
        "LOCAL_WORLD_SIZE": str(max(world_size, os.cpu_count() or 1)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)


def free_port() -> int:
    """A TCP port on which nobody listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
