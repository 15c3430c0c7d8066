"""Runs a function on several ranks: forked processes of this one, joined by gloo on the loopback interface."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """The results of function(*args), called on every rank, in rank order.

    Forked, so that the imports of this process are there at once; it must not have a process group of its own.
    Raises: AssertionError with the ranks' tracebacks if any of them failed or did not end in time.
    """
    _import_before_fork()
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
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


def _import_before_fork() -> None:
    """Loads here, once, what every rank would otherwise load by itself when it starts DeepSpeed (eight seconds)."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # loads torch._dynamo


def _receive(pipe: Connection, timeout_s: float) -> tuple[bool, Any]:
    try:
        return pickle.loads(pipe.recv_bytes()) if pipe.poll(timeout_s) else (False, f"no result within {timeout_s} s")
    except EOFError:
        return False, "the process ended without a result"


def _rank_main(
    rank: int, world_size: int, port: int, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
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
    try:
        outcome = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    # By value: a Connection would send tensors as handles to memory of this process, which is about to end.
    sender.send_bytes(pickle.dumps(outcome))
    sender.close()
    # Without this, exit handlers of the parent's libraries run in the child as well.
    os._exit(0)


def free_port() -> int:
    """A TCP port on which nobody listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
