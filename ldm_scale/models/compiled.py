"""Regional compilation: a UNet's repeated blocks through torch.compile, one graph for each kind of block and shape.

Compiling the whole network takes minutes and has to be redone for every change; a block of a kind and shape is
compiled once, whichever of them asks first, because its weights are inputs of the graph (the UNet of SD-2 has 38 such
blocks of 18 kinds and shapes). What lies between the blocks stays as it is: activation checkpointing, skip
connections, and ZeRO stage 3, which gathers the weights of a block in hooks around its forward (`compiled_kinds` tells
it to gather them for the block as a whole).

Only a network in training mode computes by its graphs: validation and sampling come with batches of other sizes, each
of which would be compiled anew. The forward method is replaced on the block itself, so that no name in a state dict
changes. Graphs are whole or an error: nothing falls back to plain torch without a word.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ldm_scale.errors import ConfigError
from ldm_scale.models.attention import ImageSelfAttention, SpatialTransformer
from ldm_scale.models.blocks import ResidualBlock

KINDS: tuple[type[nn.Module], ...] = (ResidualBlock, SpatialTransformer, ImageSelfAttention)
# Dynamo keeps the graphs of a function in one list and gives up beyond a length meant for code that runs wild; here
# every kind, shape, type and bucket of resolutions is an entry on purpose.
MAX_GRAPHS = 1024
MAX_REASON = 500  # characters of what torch says


def compile_blocks(network: nn.Module, backend: str = "inductor") -> int:
    """Number of blocks that compute by compiled graphs from now on, where the network is in training mode.

    `backend` is torch.compile's. Nothing is compiled before the first step.
    """
    import torch._dynamo.config

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, len(KINDS) * MAX_GRAPHS
    )
    forwards = {kind: _forward(kind, backend) for kind in KINDS}
    blocks = [module for module in network.modules() if type(module) in forwards]
    for block in blocks:
        block.forward = MethodType(forwards[type(block)], block)
    return len(blocks)


def compiled_kinds(network: nn.Module) -> list[type[nn.Module]]:
    """Kinds of blocks of the network that `compile_blocks` has seen to; none where it was not called."""
    return [kind for kind in KINDS if any(type(m) is kind and "forward" in vars(m) for m in network.modules())]


def check_compiler(device: torch.device, environ: dict[str, str] | None = None) -> None:
    """Returns if graphs can be compiled for this kind of device here.

    Raises: ConfigError if there is no C++ compiler (CPU), or no C compiler or Triton (CUDA), by whose names in PATH, or
    in CXX or CC, torch looks for them.
    """
    variables = dict(os.environ) if environ is None else environ
    variable, names = ("CC", ("gcc", "clang", "cc")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    wanted = (variables[variable],) if variables.get(variable) else names
    if not any(shutil.which(name, path=variables.get("PATH")) for name in wanted):
        raise ConfigError(
            f"train.compile=blocks needs a compiler for what it generates on {device.type}, and none of "
            f"{', '.join(wanted)} is in PATH; install g++ (or set {variable}), or set train.compile=none"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "train.compile=blocks generates Triton kernels on cuda, and the package triton is not installed; "
            "pip install triton, or set train.compile=none"
        )


class CompileReport:
    """What was compiled in this process since it was made: graphs, and the time of the step that asked for them."""

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks, self._graphs, self._began_s = num_blocks, _num_graphs(), time.perf_counter()

    def __str__(self) -> str:
        seconds = time.perf_counter() - self._began_s
        return (
            f"train.compile=blocks: {_num_graphs() - self._graphs} graphs for {self._num_blocks} blocks, compiled in "
            f"the first step, which ended {seconds:.0f} s after the networks were built"
        )


def _num_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _forward(kind: type[nn.Module], backend: str) -> Callable[..., Any]:
    """A forward method for blocks of that kind."""
    plain: Callable[..., Any] = kind.forward
    # Shapes are never made symbolic: the second size of a block is another graph, as fast as the first.
    compiled = torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)

    def forward(block: nn.Module, *arguments: Any) -> Any:
        if not block.training:
            return plain(block, *arguments)
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return compiled(block, *arguments)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            reason = " ".join(str(error).split())[:MAX_REASON]
            raise ConfigError(
                f"train.compile=blocks: a {kind.__name__} cannot be compiled by {backend} ({reason}); set "
                "train.compile=none"
            ) from error

    return forward
