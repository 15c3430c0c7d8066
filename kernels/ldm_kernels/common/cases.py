"""Which calls of the operations are compiled ahead of time, and what each launches.

A case calls an operation's own `_fwd` or `_bwd` function with tensors of the meta device, in the layouts that the
models give them (heads as slices of a joint projection, channels_last images), and keeps the launches. All shapes come
in bfloat16; float32, other layouts and other arguments on the SD-2 UNet at latents of 64, whose shapes are typical, and
float16, whose code differs from bfloat16's in conversions, on that UNet's finest level on sm_90.

Hundreds of binaries come of that, most of them alike. A class is what shares a kernel, its tile, types, warps and
architecture; the committed table has one row a class, of the case that asks most of it. The norm's many channel counts
in the LDM UNets have none: their tiles are the SD UNets', masked in other places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_kernels.attention.tables import MAX_HEAD_DIM
from ldm_kernels.common import launch
from ldm_kernels.common.compilation import CLUSTERS
from ldm_kernels.common.launch import Launch
from ldm_kernels.common.shapes import TYPICAL, Shape, all_shapes

ARCHITECTURES = (80, 90, 100)
LARGEST_BATCH = 64  # compiled shapes have batch 8; the largest is only held to the limits on grids
BATCH = 8
_SCALE = 0.125  # of attention's scores; a run-time number
_EMA_SIZES = (320 * 320 * 9, 1280 * 10240, 320, 7)  # a convolution, a feed-forward layer, a bias; an odd one
_FORWARD_ONLY = ("vector_quantize", "ema_update")
# Of group_norm_silu: a group's channels and how many groups, which only mask; what is computed beside the sums; and how
# the merging of partial sums is cut, a small kernel.
_VARY_IN_A_CLASS = ("CPG", "GROUPS", "SILU", "INPUT", "COLUMNS", "BLOCK", "BLOCK_CHUNKS")


@dataclass(frozen=True)
class Case:
    """One call: an operation in one direction, at one shape, in one type; `option` is what departs from the default."""

    shape: Shape
    direction: str  # "fwd" or "bwd"
    dtype: torch.dtype
    option: str = ""
    batch: int = BATCH

    @property
    def name(self) -> str:
        option = f" {self.option}" if self.option else ""
        return f"{self.shape.model} {self.shape.name} batch {self.batch}{option}"

    @property
    def in_table(self) -> bool:
        """Whether its classes are among the table's rows."""
        return _has_rows(self.shape)

    def launches(self, architecture: int) -> list[Launch]:
        """What the call launches on a GPU of that architecture."""
        with launch.recording(architecture) as recorded:
            try:
                _CALLS[self.shape.operation](self)
            except Exception as error:
                error.add_note(f"while recording {self.shape.operation}.{self.direction} {self.dtype} {self.name}")
                raise
        return recorded.launches


def all_cases(architecture: int) -> Iterator[Case]:
    """Every case for that architecture: the typical model first, those without rows of their own last.

    Between them what asks most of a kernel comes first.

    Beyond sm_90 the typical model's finest level alone, in bfloat16.
    """

    def rank(shape: Shape) -> tuple[bool, bool, bool, bool]:
        without_rows = not _has_rows(shape)
        return shape.model != TYPICAL, without_rows, not shape.get("shifted"), not shape.get("silu")

    for shape in sorted(all_shapes(), key=rank):
        if "attention" in shape.operation and shape["head_dim"] > MAX_HEAD_DIM:
            continue  # torch's own attention serves it
        if architecture > 90 and not (_is_finest(shape) or shape.operation in _FORWARD_ONLY):
            continue
        for direction in ("fwd",) if shape.operation in _FORWARD_ONLY else ("fwd", "bwd"):
            for dtype, option in _choices(shape, direction, architecture):
                yield Case(shape, direction, dtype, option)


def class_of(launched: Launch, architecture: int) -> tuple[Any, ...]:
    """What launches of one class have in common.

    Within a class vary the constants named below, whether optional arguments are there, and which run-time sizes are
    divisible by 16. How far a group's run of channels is aligned decides the width of loads, so that is kept.
    """
    constants = dict(launched.constants)
    run = constants.get("CPG", 8), constants.get("GROUPS", 1)
    alignment = math.gcd(int(run[0] or 8) * int(run[1] or 1), 8)
    dtypes = tuple(sorted({str(a.dtype) for a in launched.arguments.values() if isinstance(a, Tensor)}))
    varying = (*_VARY_IN_A_CLASS, "BLOCK_C") if "BLOCK_CHUNKS" in constants else _VARY_IN_A_CLASS
    tile = tuple(sorted((name, value) for name, value in constants.items() if name not in varying))
    options = launched.num_warps, launched.num_stages, launched.num_ctas
    return launched.kernel.__name__, architecture, alignment, dtypes, tile, options


def _has_rows(shape: Shape) -> bool:
    return shape.operation != "group_norm_silu" or not shape.model.startswith("ldm")


def _choices(shape: Shape, direction: str, architecture: int) -> Iterator[tuple[torch.dtype, str]]:
    """Types and options in which a shape is compiled."""
    yield torch.bfloat16, ""
    if shape.operation == "ema_update":
        yield torch.float32, ""  # of the weights: masters; the averages always are
        return
    typical = shape.model == TYPICAL
    norm, pixels = shape.operation == "group_norm_silu", _pixels(shape)
    if typical and norm and architecture == 90 and CLUSTERS and _takes_a_cluster(shape, direction):
        yield torch.bfloat16, "cluster"
    if architecture > 90:
        return
    # Of the norm's shapes the largest, which is read twice, and the smallest, which is read once.
    if shape.operation == "vector_quantize" or (typical and (not norm or (shape["shifted"] and pixels in (64, 4096)))):
        yield torch.float32, ""
    if _is_finest(shape) and architecture == 90:
        yield torch.float16, ""
    if typical and norm:
        yield torch.bfloat16, "NCHW"
        if shape["shifted"]:
            yield torch.bfloat16, "fp32 weights"
            yield torch.bfloat16, "adaptive"


def _is_finest(shape: Shape) -> bool:
    """Whether it is of the typical model's finest level."""
    return shape.model == TYPICAL and _pixels(shape) == 64 * 64


def _pixels(shape: Shape) -> int:
    """Of the feature map that the operation works on."""
    return shape.get("tokens") or shape.get("queries") or shape.get("height") * shape.get("width")


def _takes_a_cluster(shape: Shape, direction: str) -> bool:
    """Whether a cluster of blocks would read the shape once where the default reads it twice."""
    from ldm_kernels.group_norm_silu import plan

    size = shape["channels"], shape["groups"], _pixels(shape)
    return plan.variant_for(BATCH, *size, 2, True, 90, direction == "bwd", clusters=True).variant == "cluster"


def _group_norm_silu(case: Case) -> None:
    from ldm_kernels.group_norm_silu import kernel

    shape, batch, channels = case.shape, case.batch, case.shape["channels"]
    layout = torch.contiguous_format if case.option == "NCHW" else torch.channels_last
    x = _empty(batch, channels, shape["height"], shape["width"], dtype=case.dtype).contiguous(memory_format=layout)
    weight = _empty(channels, dtype=torch.float32 if case.option == "fp32 weights" else case.dtype)
    per_sample = _empty(batch, channels, dtype=case.dtype)
    # In a residual block the norm behind the timestep's shift also takes over the bias of the convolution before it.
    channel_bias, sample_shift = (weight, per_sample) if shape["shifted"] else (None, None)
    # Adaptive norms read scale and shift as halves of one projection.
    halves = _empty(batch, 2 * channels, dtype=case.dtype).chunk(2, dim=1)
    scale, shift = halves if case.option == "adaptive" else (None, None)
    silu, groups = bool(shape["silu"]), shape["groups"]
    variant: Any = "cluster" if case.option == "cluster" else None
    if case.direction == "fwd":
        kernel.group_norm_silu_fwd(
            x, groups, weight, weight, 1e-5, silu, channel_bias, sample_shift, scale, shift, variant
        )
        return
    mean = _empty(batch, groups, dtype=torch.float32)
    dy = torch.empty_like(x)
    kernel.group_norm_silu_bwd(
        dy, x, mean, mean, groups, weight, weight, silu, channel_bias, sample_shift, scale, shift, variant
    )


def _attention(case: Case) -> None:
    q, k, v = _joint(case, "queries", 3)
    _self_attention(case, q, k, v)


def _cross_attention(case: Case) -> None:
    from ldm_kernels.attention import cross_kernel, tables

    (q,), (k, v) = _joint(case, "queries", 1), _joint(case, "keys", 2)
    if not tables.serves_cross(q.shape[3], k.shape[2], q.dtype, launch.architecture(q)):
        _self_attention(case, q, k, v)
    elif case.direction == "fwd":
        cross_kernel.cross_attention_fwd(q, k, v, _SCALE)
    else:
        cross_kernel.cross_attention_bwd(_like_tokens(q), q, k, v, _SCALE)


def _self_attention(case: Case, q: Tensor, k: Tensor, v: Tensor) -> None:
    from ldm_kernels.attention import kernel

    if case.direction == "fwd":
        kernel.attention_fwd(q, k, v, _SCALE)
        return
    lse = _empty(*q.shape[:3], dtype=torch.float32)
    kernel.attention_bwd(_like_tokens(q), q, k, v, _like_tokens(q), lse, _SCALE)


def _geglu(case: Case) -> None:
    from ldm_kernels.geglu import kernel

    tokens, width = case.shape["tokens"], case.shape["width"]
    projection = _empty(case.batch, tokens, 2 * width, dtype=case.dtype)
    if case.direction == "fwd":
        kernel.geglu_fwd(projection)
    else:
        kernel.geglu_bwd(_empty(case.batch, tokens, width, dtype=case.dtype), projection)


def _vector_quantize(case: Case) -> None:
    from ldm_kernels.vector_quantize import kernel

    z = _empty(case.batch * case.shape["vectors"], case.shape["dim"], dtype=case.dtype)
    kernel.nearest_codes(z, _empty(case.shape["codes"], case.shape["dim"], dtype=case.dtype))


def _ema_update(case: Case) -> None:
    from ldm_kernels.ema_update import kernel

    decays = [0.999, 0.9999][: case.shape["decays"]]
    weights = [_empty(size, dtype=case.dtype) for size in _EMA_SIZES]
    averages = [[_empty(size, dtype=torch.float32) for size in _EMA_SIZES] for _ in decays]
    kernel.ema_update_(averages, weights, decays)


def _empty(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _joint(case: Case, tokens: str, parts: int) -> tuple[Tensor, ...]:
    """(B, heads, tokens, head_dim) views into one projection of that many parts."""
    heads, head_dim = case.shape["heads"], case.shape["head_dim"]
    joint = _empty(case.batch, case.shape[tokens], parts * heads * head_dim, dtype=case.dtype)
    split = joint.view(case.batch, case.shape[tokens], parts, heads, head_dim)
    return tuple(split[:, :, part].transpose(1, 2) for part in range(parts))


def _like_tokens(q: Tensor) -> Tensor:
    """A tensor of q's shape, laid out as (B, tokens, heads, head_dim): an output, or the gradient of one."""
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


_CALLS: dict[str, Callable[[Case], None]] = {
    "group_norm_silu": _group_norm_silu,
    "attention": _attention,
    "cross_attention": _cross_attention,
    "geglu": _geglu,
    "vector_quantize": _vector_quantize,
    "ema_update": _ema_update,
}
