"""Launches of the kernels: what each variant of plan.py allocates, and in which order it runs what.

The kernels are in two_pass.py, two_pass_backward.py and single_read.py; parts.py has what they share, with the sums
over samples that end a backward. Forward and backward choose their variants apart: all leave and take the same mean and
rstd.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ldm_kernels.common import launch
from ldm_kernels.common.launch import Launch, cdiv, next_power_of_2
from ldm_kernels.group_norm_silu import parts, single_read, two_pass, two_pass_backward
from ldm_kernels.group_norm_silu.plan import Plan, Variant, variant_for

# What the backward can give, in the order in which it gives it.
GRADIENTS = ("x", "weight", "bias", "channel_bias", "sample_shift", "scale", "shift")

# Triton 3.6 fails to compile sums across the thread blocks of a cluster.
CLUSTERS_COMPILE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)

_MERGE_BLOCK = 1024  # partial sums that a program merges at a time
_MERGE_CHANNELS = (16, 64)  # of them in a row, where rows are chunks: at least 64 bytes
_PARAMETERS_BLOCK = (32, 32)  # samples and channels in the sums over samples


def plan_for(x: Tensor, num_groups: int, backward: bool, variant: Variant | None = None) -> Plan:
    """The plan for this tensor (contiguous in one of the two layouts) on the GPU that the launch is for.

    The cluster variant is taken only where LDM_KERNELS_CLUSTER=1 asks for it and Triton is 3.8 or newer.

    Raises: ValueError if the variant asked for cannot hold this shape, or this Triton cannot compile it.
    """
    if variant == "cluster" and not CLUSTERS_COMPILE:
        raise ValueError(f"group_norm_silu: variant 'cluster' needs Triton 3.8 or newer, not {triton.__version__}")
    return variant_for(
        x.shape[0],
        x.shape[1],
        num_groups,
        x.shape[2] * x.shape[3],
        x.element_size(),
        _is_channels_last(x),
        launch.architecture(x),
        backward,
        CLUSTERS_COMPILE and os.environ.get("LDM_KERNELS_CLUSTER") == "1",
        variant,
    )


def group_norm_silu_fwd(
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
    variant: Variant | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd): y in x's type and layout, mean and rstd of x + channel_bias + sample_shift in fp32.

    Shapes: x (N, C, H, W), contiguous or channels_last; weight, bias, channel_bias (C,); sample_shift, scale, shift
    (N, C); mean and rstd (N, G).
    """
    plan = plan_for(x, num_groups, backward=False, variant=variant)
    call = _Call(plan, x, num_groups, weight, bias, silu, channel_bias, sample_shift, scale, shift)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device) for _ in range(2))
    own = {"p_y": y, "p_mean": mean, "p_rstd": rstd, "eps": eps}
    if plan.variant != "two_pass":
        call.run(single_read._group_norm_silu_single_fwd_kernel, call.blocks_grid, own)
        return y, mean, rstd
    partial = call.sums(2, plan.chunks)
    block = min(_MERGE_BLOCK, next_power_of_2(plan.chunks * call.cpg))
    merge = {**own, "p_partial": partial, "plane": partial[0].numel(), "BLOCK": block}
    call.run(two_pass._group_norm_silu_stats_kernel, call.first_pass_grid, merge)
    call.run(two_pass._group_norm_silu_merge_fwd_kernel, call.groups_grid, merge)
    call.run(two_pass._group_norm_silu_apply_fwd_kernel, call.second_pass_grid, {**own, **call.second_pass})
    return y, mean, rstd


def group_norm_silu_bwd(
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
    variant: Variant | None = None,
    needs: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The seven gradients of GRADIENTS, each in its tensor's type, dx in x's layout.

    `needs` says, in that order, which are wanted; without it, those of every tensor given. The others come as tensors
    without elements, and nothing is computed for their sake alone.

    Shapes: dy, x (N, C, H, W); mean and rstd (N, G); the others as in the forward.
    """
    plan = plan_for(x, num_groups, backward=True, variant=variant)
    call = _Call(plan, x, num_groups, weight, bias, silu, channel_bias, sample_shift, scale, shift)
    tensors = (x, weight, bias, channel_bias, sample_shift, scale, shift)
    gradients = {
        name: _empty_gradient(tensor)
        for name, tensor, needed in zip(GRADIENTS, tensors, needs or (True,) * len(tensors), strict=True)
        if tensor is not None and needed
    }
    dx = gradients.get("x")
    of_vectors = any(name != "x" for name in gradients)
    of_added = "channel_bias" in gradients or "sample_shift" in gradients
    own: dict[str, Any] = {"p_dy": _in_layout_of(dy, x), "p_mean": mean, "p_rstd": rstd, "p_dx": dx, "INPUT": of_added}
    if gradients and plan.variant == "two_pass":
        sums, means = _two_pass_sums(call, own, of_vectors, of_added)
        if dx is not None:
            own |= {"p_means": means, **call.second_pass}
            call.run(two_pass_backward._group_norm_silu_apply_bwd_kernel, call.second_pass_grid, own)
    elif gradients:
        sums = call.sums(3 if of_added else 2) if of_vectors else None
        means = call.means() if of_added else None
        own |= {"p_sums": sums, "p_means": means, "plane": x.shape[0] * x.shape[1]}
        call.run(single_read._group_norm_silu_single_bwd_kernel, call.blocks_grid, own)
    if of_vectors:
        block_n, block_c = min(_PARAMETERS_BLOCK[0], next_power_of_2(x.shape[0])), _PARAMETERS_BLOCK[1]
        own |= {f"p_d{name}": gradients.get(name) for name in GRADIENTS[1:]}
        own |= {"p_sums": sums, "p_means": means if of_added else None, "plane": x.shape[0] * x.shape[1]}
        own |= {"BLOCK_N": block_n, "BLOCK_C": block_c}
        call.run(parts._group_norm_silu_parameters_kernel, (cdiv(x.shape[1], block_c),), own, num_warps=4)
    first, *others = (gradients[name] if name in gradients else x.new_empty(0) for name in GRADIENTS)
    return first, others[0], others[1], others[2], others[3], others[4], others[5]


def _two_pass_sums(
    call: _Call, own: dict[str, Any], of_vectors: bool, of_added: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sums over all pixels (2 or 3, N, C) and the groups' k1 and k2 (N, G, 2), each if anyone wants them."""
    chunks = call.plan.chunks
    partial = call.sums(3 if of_added else 2, chunks)
    plane = partial[0].numel()
    reduce = {**own, "p_partial": partial, "plane": plane}
    call.run(two_pass_backward._group_norm_silu_reduce_kernel, call.first_pass_grid, reduce)
    # The sums of a single chunk are the sums over all pixels.
    sums = call.sums(len(partial)) if of_vectors and chunks > 1 else None
    if own["p_dx"] is None and not of_added and sums is None:
        return partial, None
    means = call.means()
    fewest, most = _MERGE_CHANNELS
    columns = min(max(next_power_of_2(call.cpg), fewest), most)
    rows = min(_MERGE_BLOCK // columns, next_power_of_2(chunks))
    merge = {**reduce, "p_sums": sums, "p_means": means, "sums_plane": plane // chunks}
    blocks = {"BLOCK_CHUNKS": rows, "BLOCK_C": columns}
    # In four warps ptxas spills two registers at 8 x 32 on compute capability 8.0.
    call.run(two_pass_backward._group_norm_silu_merge_bwd_kernel, call.groups_grid, {**merge, **blocks}, num_warps=8)
    return partial if sums is None else sums, means


class _Call:
    """One call's arguments under the names that the kernels give them, and the grids that its plan stands for."""

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        num_groups: int,
        weight: Tensor,
        bias: Tensor,
        silu: bool,
        channel_bias: Tensor | None,
        sample_shift: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> None:
        batch, channels = x.shape[:2]
        pixels = x.shape[2] * x.shape[3]
        slabs, tiles = cdiv(channels, plan.block_c), cdiv(pixels, plan.block_hw)
        blocks = num_groups // plan.groups
        applied = cdiv(tiles, plan.apply_tiles)
        self.plan, self.cpg = plan, channels // num_groups
        self._x = x
        self.first_pass_grid = (batch * plan.chunks, slabs)
        self.second_pass_grid = (batch * applied, slabs)
        self.second_pass = {"chunks": applied, "chunk_tiles": plan.apply_tiles}
        self.groups_grid = (batch * num_groups,)
        self.blocks_grid = (batch * blocks,)
        channels_last = _is_channels_last(x)
        rows = {name: _rows(vector) for name, vector in zip(GRADIENTS[4:], (sample_shift, scale, shift), strict=True)}
        self._shared: dict[str, Any] = {
            "p_x": x,
            "p_weight": weight.contiguous(),
            "p_bias": bias.contiguous(),
            "p_channel_bias": None if channel_bias is None else channel_bias.contiguous(),
            **{f"p_{name}": vector for name, vector in rows.items()},
            **{f"stride_{name}": 0 if vector is None else vector.stride(0) for name, vector in rows.items()},
            "stride_hw": channels if channels_last else 1,
            "stride_c": 1 if channels_last else pixels,
            "batch": batch,
            "channels": channels,
            "num_groups": num_groups,
            "cpg": self.cpg,
            "pixels": pixels,
            "chunks": plan.chunks,
            "chunk_tiles": plan.chunk_tiles,
            "chunk_pixels": plan.chunk_tiles * plan.block_hw,
            "blocks": blocks,
            "SILU": silu,
            "CPG": self.cpg,
            "GROUPS": plan.groups,
            "COLUMNS": max(plan.groups, plan.num_ctas) if plan.groups > 1 else 1,
            "BLOCK_HW": plan.block_hw,
            "BLOCK_C": plan.block_c,
            "LANES": plan.block_c,
            "FULL": plan.block_hw == pixels,
        }

    def run(self, kernel: Any, grid: tuple[int, ...], own: dict[str, Any], num_warps: int | None = None) -> None:
        """Launches with what the kernel names, of `own` first; names in capitals are compile-time constants.

        With `num_warps` given, in one thread block a program, whatever the plan says.
        """
        values = {**self._shared, **own}
        arguments = {name: values[name] for name in kernel.arg_names if not name.isupper()}
        constants = {name: values[name] for name in kernel.arg_names if name.isupper()}
        num_ctas = self.plan.num_ctas if num_warps is None else 1
        num_warps = num_warps or self.plan.num_warps
        launch.run(Launch(kernel, grid, arguments, constants, num_warps=num_warps, num_ctas=num_ctas))

    def sums(self, count: int, chunks: int | None = None) -> Tensor:
        """Room for `count` sums per channel of each sample, or of each chunk of it."""
        batch, channels = self._x.shape[:2]
        shape = (count, batch, channels) if chunks is None else (count, batch, chunks, channels)
        return torch.empty(shape, dtype=torch.float32, device=self._x.device)

    def means(self) -> Tensor:
        """Room for k1 and k2 of every group."""
        shape = (*self.groups_grid, 2)
        return torch.empty(shape, dtype=torch.float32, device=self._x.device)


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _in_layout_of(dy: Tensor, x: Tensor) -> Tensor:
    return dy.contiguous(memory_format=torch.channels_last if _is_channels_last(x) else torch.contiguous_format)


def _rows(vector: Tensor | None) -> Tensor | None:
    """A (N, C) tensor with neighbouring channels side by side: halves of a projection are read where they are."""
    return vector if vector is None or vector.stride(1) == 1 else vector.contiguous()


def _empty_gradient(tensor: Tensor) -> Tensor:
    dense = torch.preserve_format if tensor.dim() == 4 else torch.contiguous_format
    return torch.empty_like(tensor, memory_format=dense)
