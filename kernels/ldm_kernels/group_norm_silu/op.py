"""Group norm with SiLU and what surrounds it: checks, choice of implementation, and the kernels as torch operators.

Default without a measured winner: the kernels wherever Triton serves the tensors, because torch's own group norm turns
channels_last into the plain layout and back, under autocast in fp32, and plain torch elsewhere.

The operators have no autocast rule: x stays in its type, and weights of another type are converted in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.library import custom_op

from ldm_kernels.common import launch, tuning
from ldm_kernels.group_norm_silu import reference

_NAME = "group_norm_silu"
# Offsets inside a tile are 32-bit: 64 channels of this many pixels, or a chunk of 2,048 pixels of this many channels.
_MAX_PIXELS = 2**24
_MAX_CHANNELS = 2**19


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    activation: Literal["silu"] | None = "silu",
    channel_bias: Tensor | None = None,
    sample_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = act((GN(x + channel_bias + sample_shift) * weight + bias) * (1 + scale) + shift), in x's type and layout.

    `backend` is auto, triton or reference. An x in neither of the two layouts is brought to channels_last. Gradients
    of every tensor, once: the kernels have no second derivative, the reference has.

    Shapes: x (N, C, H, W); weight, bias, channel_bias (C,); sample_shift, scale, shift (N, C).
    Raises: ValueError if a shape, a device, the activation or the backend does not fit; TypeError if a type does not.
    Source: arXiv:1803.08494, eq. 1 (GroupNorm); arXiv:2105.05233, section 3 (AdaGN's scale and shift).
    """
    vectors = {
        "weight": weight,
        "bias": bias,
        "channel_bias": channel_bias,
        "sample_shift": sample_shift,
        "scale": scale,
        "shift": shift,
    }
    _check(x, num_groups, activation, vectors)
    batch, channels, height, width = x.shape
    shape = {"batch": batch, "channels": channels, "groups": num_groups, "pixels": height * width}
    chosen = tuning.choose(_NAME, backend, ("triton", "reference"), x, shape)
    if chosen is None:
        chosen = "triton" if tuning.serves(x) and _fits(x) else "reference"
    if chosen == "triton" and not _fits(x):
        raise ValueError(
            f"{_NAME}: backend 'triton' takes at most {_MAX_CHANNELS} channels and {_MAX_PIXELS} pixels a sample, not "
            f"{channels} and {height * width}; take backend 'reference'"
        )
    if not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous(memory_format=torch.channels_last)
    if chosen == "reference":
        launch.note_outcome(_NAME, "reference")
        return reference.group_norm_silu(
            x, num_groups, weight, bias, eps, activation, channel_bias, sample_shift, scale, shift
        )
    silu = activation == "silu"
    y: Tensor = _fwd(x, num_groups, weight, bias, eps, silu, channel_bias, sample_shift, scale, shift)[0]
    return y


def _fits(x: Tensor) -> bool:
    return x.shape[1] <= _MAX_CHANNELS and x.shape[2] * x.shape[3] <= _MAX_PIXELS


def _check(x: Tensor, num_groups: int, activation: str | None, vectors: dict[str, Tensor | None]) -> None:
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{_NAME}: x must be (N, C, H, W) with at least one channel and one pixel: {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{_NAME}: x must be of a floating-point type, not {x.dtype}; convert it")
    batch, channels = x.shape[:2]
    if weight_missing := [name for name in ("weight", "bias") if vectors[name] is None]:
        raise TypeError(f"{_NAME}: {weight_missing[0]} is None; give ones for a weight, zeros for a bias")
    if type(num_groups) is not int:
        raise TypeError(f"{_NAME}: num_groups is {num_groups!r}; it must be an int")
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{_NAME}: {channels} channels do not divide into {num_groups} groups; take a divisor of them")
    if activation not in ("silu", None):
        raise ValueError(f"{_NAME}: activation {activation!r} is unknown; take 'silu' or None")
    for name, vector in vectors.items():
        if vector is None:
            continue
        expected = (batch, channels) if name in ("sample_shift", "scale", "shift") else (channels,)
        if tuple(vector.shape) != expected:
            raise ValueError(
                f"{_NAME}: {name} has shape {tuple(vector.shape)}; with x {tuple(x.shape)} it must be {expected}"
            )
        if vector.device != x.device:
            raise ValueError(f"{_NAME}: {name} is on {vector.device} and x on {x.device}; move one to the other")
        if vector.dtype not in (x.dtype, *tuning.KERNEL_DTYPES):
            raise TypeError(
                f"{_NAME}: {name} is {vector.dtype}; with x {x.dtype} it must be of that type, float32, float16 or "
                "bfloat16; convert it"
            )


@custom_op("ldm_kernels::group_norm_silu_fwd", mutates_args=())
def _fwd(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    channel_bias: Tensor | None,
    sample_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from ldm_kernels.group_norm_silu import kernel

    launch.note_outcome(_NAME, f"triton {kernel.plan_for(x, num_groups, backward=False).variant}")
    return kernel.group_norm_silu_fwd(x, num_groups, weight, bias, eps, silu, channel_bias, sample_shift, scale, shift)


@_fwd.register_fake
def _fwd_fake(x: Tensor, num_groups: int, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


@custom_op("ldm_kernels::group_norm_silu_bwd", mutates_args=())
def _bwd(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    channel_bias: Tensor | None,
    sample_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ldm_kernels.group_norm_silu import kernel

    return kernel.group_norm_silu_bwd(
        dy, x, mean, rstd, num_groups, weight, bias, silu, channel_bias, sample_shift, scale, shift, needs=needs
    )


@_bwd.register_fake
def _bwd_fake(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    silu: bool,
    channel_bias: Tensor | None,
    sample_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    tensors = (x, weight, bias, channel_bias, sample_shift, scale, shift)
    return [
        x.new_empty(0)
        if tensor is None or not needed
        else torch.empty_like(tensor, memory_format=torch.preserve_format if tensor is x else torch.contiguous_format)
        for tensor, needed in zip(tensors, needs, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ctx.num_groups, weight, bias, _, ctx.silu, *optional = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias, *optional)
    # Nobody sees mean and rstd: their gradients need not be made of zeros.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dmean: None, drstd: None) -> tuple[Tensor | None, ...]:
    of_x, _, of_weight, of_bias, _, _, *of_optional = ctx.needs_input_grad
    needs = [of_x, of_weight, of_bias, *of_optional]
    if dy is None:
        return (None,) * 10
    x, mean, rstd, weight, bias, *optional = ctx.saved_tensors
    gradients = _bwd(dy, x, mean, rstd, ctx.num_groups, weight, bias, ctx.silu, *optional, needs)
    dx, dweight, dbias, *others = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return dx, None, dweight, dbias, None, None, *others


_fwd.register_autograd(_backward, setup_context=_setup_context)
