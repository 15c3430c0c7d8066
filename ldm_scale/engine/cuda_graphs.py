"""CUDA graphs: forward and backward pass of a micro-batch recorded once and replayed, without Python between kernels.

A graph is of one shape and reads and writes the same memory every time. So the inputs are copied to where the recorded
ones lay, the weights must stay where they are (at ZeRO stage 0 they do: the optimizer writes in place), and what was
kept for backward stays allocated between the steps. Noise and times are drawn outside, by the images' numbers, and the
loss is computed outside, on the output: no random number is recorded, and none is repeated.

Gradients, too, come in memory that the next replay overwrites: each is copied before it is kept or added to another, or
the micro-batches of a step would all count as its last one.

torch's `make_graphed_callables` records; the optimizer's step, ZeRO's bookkeeping and the conditioner run as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm_scale.config.schema import Config
from ldm_scale.errors import ConfigError

# From a network whose forward pass takes these inputs to one that replays it: (module, samples) -> callable.
Recorder = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., Tensor]]
WARM_UP = 11  # passes before the recording: cuDNN measures its algorithms, Triton and torch.compile compile


def check_cuda_graphs(config: Config, world_size: int, device: torch.device | None = None) -> None:
    """Returns if a run with train.cuda_graphs=true is possible, as far as its configuration and `device` tell.

    Raises: ConfigError with the first reason why it is not.
    """
    reasons = (
        (config.stage == "autoencoder", "is for stage=diffusion and classifier: stage 1 has two networks in turn"),
        (
            config.train.device == "cpu" or (device is not None and device.type != "cuda"),
            "needs a CUDA device, and this run is on the CPU",
        ),
        (config.zero.stage > 0, f"needs zero.stage=0, got {config.zero.stage}: the others move gradients and weights"),
        (world_size > 1, f"is for one rank, got {world_size}: gradients are not yet reduced inside a graph"),
        (config.unet.dropout > 0, f"needs unet.dropout=0, got {config.unet.dropout}: its masks would be repeated"),
        (
            config.train.activation_checkpointing != "none",
            f"needs train.activation_checkpointing=none, got {config.train.activation_checkpointing}: recomputation "
            "starts a backward pass of its own, which cannot be recorded",
        ),
    )
    for is_so, why in reasons:
        if is_so:
            raise ConfigError(f"train.cuda_graphs=true {why}; change it, or set train.cuda_graphs=false")


def record_on_cuda(network: nn.Module, samples: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The network's recorded forward and backward pass, by torch."""
    # torch's default, "global", forbids all threads of the process what may not be recorded, and the loader's threads
    # allocate pinned memory meanwhile: the recording would fail. What other threads queue is not recorded either way.
    recorded = torch.cuda.make_graphed_callables(
        network, samples, num_warmup_iters=WARM_UP, capture_error_mode="thread_local"
    )
    return cast(Callable[..., Tensor], recorded)


class ReplayedForward:
    """A network's forward that is recorded when training first calls it, and replayed in every later step.

    Outside of training mode, and where no gradient is asked for, the network computes as it did before. Inputs that are
    None stay None.
    """

    def __init__(self, network: nn.Module, recorder: Recorder = record_on_cuda) -> None:
        self._network, self._recorder = network, recorder
        self._plain: Callable[..., Tensor] = network.forward
        self._replay: Callable[..., Tensor] | None = None
        self._recorded: list[Any] = []
        network.forward = self

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        if not (self._network.training and torch.is_grad_enabled()):
            return self._plain(*inputs)
        given = tuple(x for x in inputs if x is not None)
        signature = [None if x is None else (tuple(x.shape), x.dtype, x.requires_grad) for x in inputs]
        if self._replay is None:
            # Tensors of the recording's own: the caller's die, and the graph goes on reading from their memory.
            samples = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in given)
            self._replay = self._recorder(_Plain(self._network, self._plain, [x is None for x in inputs]), samples)
            self._recorded = signature
            for parameter in self._network.parameters():
                parameter.register_hook(torch.clone)  # type: ignore[no-untyped-call]
        if signature != self._recorded:
            shapes = ", ".join(str(s and list(s[0])) for s in signature)
            recorded = ", ".join(str(s and list(s[0])) for s in self._recorded)
            raise ConfigError(
                f"train.cuda_graphs=true: the recorded step takes inputs of {recorded}, and a batch has {shapes}; a "
                "graph is of one shape: train on data of one size, or set train.cuda_graphs=false"
            )
        return self._replay(*given)


class _Plain(nn.Module):
    """The network computing as it did before its forward was replaced: what a recorder calls, with its weights."""

    def __init__(self, network: nn.Module, forward: Callable[..., Tensor], is_none: list[bool]) -> None:
        super().__init__()
        self.network, self._run, self._is_none = network, forward, is_none

    def forward(self, *given: Tensor) -> Tensor:
        rest = iter(given)
        return self._run(*(None if is_none else next(rest) for is_none in self._is_none))
