"""Modules around the fused operations of ldm_kernels; the networks use these and never call a kernel themselves.

Which implementation runs is decided in each operation's op.py. This file hands over what the configuration asks for
(`set_kernels`) and says afterwards what was taken (`describe_kernels`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ldm_kernels import attention, geglu, group_norm_silu
from ldm_kernels.attention.tables import MAX_HEAD_DIM
from ldm_kernels.common import launch
from ldm_scale.config.schema import KernelsConfig
from ldm_scale.errors import ConfigError
from ldm_scale.models.quantizer import Quantizer


class GroupNorm(nn.Module):
    """GroupNorm followed by SiLU (or nothing), with a convolution's bias and the timestep's shift added before, or the
    timestep's scale and shift applied between the two.

    A module of its own, not a function: ZeRO stage 3 gathers parameters in the hooks of the module that owns them.
    """

    channel_bias: nn.Parameter | None

    def __init__(self, num_groups: int, channels: int, eps: float, activation: Literal["silu"] | None = "silu") -> None:
        super().__init__()
        self.num_groups, self.eps, self.activation = num_groups, eps, activation
        self.backend = "auto"
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_parameter("channel_bias", None)

    def take_bias(self, convolution: nn.Conv2d) -> None:
        """Adds the bias of the convolution in front from now on, in its place.

        A convolution on a GPU adds its bias in a pass of its own over the features; the norm reads them anyway.
        """
        self.channel_bias = cast(nn.Parameter, convolution.bias)
        convolution.register_parameter("bias", None)

    def give_bias(self, convolution: nn.Conv2d) -> None:
        """The inverse of `take_bias`: a convolution on a CPU adds its bias for nothing."""
        convolution.register_parameter("bias", self.channel_bias)
        self.register_parameter("channel_bias", None)

    def forward(
        self,
        x: Tensor,
        sample_shift: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """act(GN(x + sample_shift) * (1 + scale) + shift). Shapes: x (B, C, H, W), the others (B, C); returns x's."""
        return group_norm_silu(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            self.activation,
            channel_bias=self.channel_bias,
            sample_shift=sample_shift,
            scale=scale,
            shift=shift,
            backend=self.backend,
        )


class Attention(nn.Module):
    """softmax(q k^T / sqrt(head_dim)) v; a module so that the choice of the implementation has a place."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.backend = "auto"

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Shapes: q (B, heads, T, head_dim), k and v (B, heads, M, head_dim); returns q's shape."""
        return attention(q, k, v, backend=self.backend)


class FeedForward(nn.Module):
    """The transformer's feed-forward layer with GEGLU (arXiv:2002.05202), inner width 4x."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.backend = "auto"
        self.in_projection = nn.Linear(channels, 8 * channels)
        self.dropout = nn.Dropout(dropout)
        self.out_projection = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, C) to (B, T, C)."""
        hidden: Tensor = self.dropout(geglu(self.in_projection(x), backend=self.backend))
        return self.out_projection(hidden)  # type: ignore[no-any-return]


def set_kernels(network: nn.Module, kernels: KernelsConfig) -> None:
    """Makes every fused operation of the network take the implementation that `kernels` names.

    Raises: ConfigError if our attention is asked for and a layer's heads are larger than it serves.
    """
    if kernels.attention == "triton":
        sizes = {m.head_dim for m in network.modules() if isinstance(m, Attention) and m.head_dim > MAX_HEAD_DIM}
        if sizes:
            raise ConfigError(
                f"kernels.attention=triton serves head dims up to {MAX_HEAD_DIM}, and this network has layers of "
                f"{', '.join(map(str, sorted(sizes)))}; set kernels.attention=auto, which takes sdpa there"
            )
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.backend = kernels.group_norm_silu
        elif isinstance(module, Attention):
            module.backend = kernels.attention
        elif isinstance(module, FeedForward):
            module.backend = kernels.geglu
        elif isinstance(module, Quantizer):
            module.backend = kernels.vector_quantize


def check_kernels(kernels: KernelsConfig, device: torch.device) -> None:
    """Returns if this device and this installation can run what `kernels` names.

    Raises: ConfigError.
    """
    for name, backend in dataclasses.asdict(kernels).items():
        needs_gpu = backend == "xformers" or (backend == "triton" and not launch.INTERPRETED)
        if needs_gpu and device.type != "cuda":
            raise ConfigError(
                f"kernels.{name}={backend} needs a CUDA device, and this run is on {device.type}; "
                f"set kernels.{name}=auto"
            )
        package = {"triton": "triton", "xformers": "xformers"}.get(backend)
        if package and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"kernels.{name}={backend} needs the package {package}, which is not installed; "
                f"set kernels.{name}=auto, or pip install {package}"
            )


def describe_kernels() -> str:
    """One line: the path that each operation took so far in this process, with its number of calls."""
    paths: dict[str, list[str]] = {}
    for (operation, path), calls in sorted(launch.outcomes().items()):
        paths.setdefault(operation, []).append(f"{path} x{calls}")
    return "; ".join(f"{operation}: {', '.join(taken)}" for operation, taken in paths.items())
