"""Who is compared: every implementation of an operation that this installation offers, by name.

`ours` are the Triton kernels, through the public function and, where a kernel has variants, each variant by itself.
The others are plain torch in both layouts, torch.compile, SDPA's backends one by one, xformers, and the group norms of
Liger and apex where they are installed. Liger's GEGLU is another function (tanh) and so no candidate.

A candidate that cannot serve a case says why (`Unavailable`); it is listed with that reason and not timed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.cases import EPS, Problem, parameter_sizes
from ldm_kernels.common import launch

MATH_SCORE_BYTES = 2**31  # of the attention matrix, above which SDPA's plain backend is left out
DISTANCE_BYTES = 2**33  # of the distance matrix, above which the plain search for codes is left out

Function = Callable[..., Tensor]


class Unavailable(Exception):
    """This implementation cannot serve this case here; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation. `build` returns the function on a problem's leaves, by name.

    `backend` is the name under which `auto` could take it, None if it could not. `nchw`: it is measured on tensors in
    the plain layout, others on channels_last (where an operation has images at all).
    """

    name: str
    build: Callable[[Problem], Function]
    backend: str | None = None
    ours: bool = False
    nchw: bool = False
    describe: Callable[[Problem], str] = lambda problem: ""


def implementations(operation: str, max_autotune: bool = False) -> list[Implementation]:
    """Every implementation of the operation, ours first."""
    mode = "max-autotune-no-cudagraphs" if max_autotune else "default"
    return [*_REGISTRY[operation](), Implementation("torch.compile", lambda problem: _compiled(problem, mode))]


def _compiled(problem: Problem, mode: str) -> Function:
    if problem.case.operation in ("attention", "ema_update"):
        raise Unavailable("torch.compile leaves this operation to the same library call")
    if problem.case.operation == "vector_quantize":
        _require_distance_memory(problem)
    # Its limit on recompilations would otherwise turn later shapes into eager code.
    torch.compiler.reset()
    if not problem.leaves[next(iter(problem.leaves))].is_cuda:
        return torch.compile(problem.plain, dynamic=False, fullgraph=True, backend="aot_eager")
    return torch.compile(problem.plain, dynamic=False, fullgraph=True, mode=mode)


def _group_norm_silu() -> list[Implementation]:
    variants = ("two_pass", "registers", "cluster")
    return [
        Implementation("triton", _public_norm, backend="triton", ours=True, describe=_norm_plan),
        *(
            Implementation(f"triton {variant}", lambda problem, v=variant: _norm_variant(problem, v), ours=True)
            for variant in variants
        ),
        Implementation("eager channels_last", lambda problem: problem.plain, backend="reference"),
        Implementation("eager NCHW", lambda problem: problem.plain, nchw=True),
        Implementation("liger NCHW", _liger_norm, nchw=True),
        Implementation("apex", _apex_norm),
    ]


def _public_norm(problem: Problem) -> Function:
    _require_kernels(problem)
    from ldm_kernels import group_norm_silu

    shape = problem.case.shape
    activation = "silu" if shape["silu"] else None

    def run(x: Tensor, weight: Tensor, bias: Tensor, **optional: Tensor) -> Tensor:
        return group_norm_silu(x, shape["groups"], weight, bias, EPS, activation, **optional, backend="triton")

    return run


def _norm_plan(problem: Problem) -> str:
    """The variants that the table takes, forward and backward."""
    from ldm_kernels.group_norm_silu import kernel

    x, groups = problem.leaves["x"], problem.case.shape["groups"]
    forward, backward = (kernel.plan_for(x, groups, backward=b).variant for b in (False, True))
    return f"forward {forward}, backward {backward}"


def _norm_variant(problem: Problem, variant: str) -> Function:
    _require_kernels(problem)
    shape = problem.case.shape

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        channel_bias: Tensor | None = None,
        sample_shift: Tensor | None = None,
    ) -> Tensor:
        arguments = (variant, shape["groups"], bool(shape["silu"]), x, weight, bias, channel_bias, sample_shift)
        return _NormVariant.apply(*arguments)

    return run


class _NormVariant(torch.autograd.Function):
    """One variant of our group norm; the public function leaves the choice to the table."""

    @staticmethod
    def forward(ctx: Any, variant: str, groups: int, silu: bool, *tensors: Tensor | None) -> Tensor:
        from ldm_kernels.group_norm_silu import kernel

        x, weight, bias, channel_bias, sample_shift = tensors
        y, mean, rstd = kernel.group_norm_silu_fwd(
            x, groups, weight, bias, EPS, silu, channel_bias, sample_shift, None, None, variant=variant
        )
        ctx.save_for_backward(*tensors, mean, rstd)
        ctx.settings = variant, groups, silu
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from ldm_kernels.group_norm_silu import kernel

        variant, groups, silu = ctx.settings
        x, weight, bias, channel_bias, sample_shift, mean, rstd = ctx.saved_tensors
        gradients = kernel.group_norm_silu_bwd(
            dy, x, mean, rstd, groups, weight, bias, silu, channel_bias, sample_shift, None, None, variant=variant
        )
        given = (x, weight, bias, channel_bias, sample_shift)
        wanted = (g if tensor is not None else None for g, tensor in zip(gradients, given, strict=False))
        return (None, None, None, *wanted)


def _liger_norm(problem: Problem) -> Function:
    ops = _module("liger_kernel.ops.group_norm")
    _require_cuda(problem)
    if "sample_shift" in problem.leaves:
        raise Unavailable("it takes no shift before the norm")
    shape = problem.case.shape

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = ops.LigerGroupNormFunction.apply(x, weight, bias, shape["channels"], shape["groups"], EPS)
        return F.silu(y) if shape["silu"] else y

    return run


def _apex_norm(problem: Problem) -> Function:
    module = _module("apex.contrib.group_norm")
    _require_cuda(problem)
    if "sample_shift" in problem.leaves:
        raise Unavailable("it takes no shift before the norm")
    shape, x = problem.case.shape, problem.leaves["x"]
    layer = module.GroupNorm(
        shape["groups"],
        shape["channels"],
        eps=EPS,
        act="silu" if shape["silu"] else "",
        device=x.device,
        dtype=x.dtype,
    )

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    return run


def _attention() -> list[Implementation]:
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    return [
        Implementation("triton", _triton_attention, backend="triton", ours=True),
        Implementation("sdpa", lambda problem: _sdpa, backend="sdpa"),
        *(
            Implementation(f"sdpa {name.lower()}", lambda problem, name=name: _sdpa_backend(problem, name))
            for name in backends
        ),
        Implementation("xformers", _xformers, backend="xformers", describe=_xformers_operator),
    ]


def _triton_attention(problem: Problem) -> Function:
    _require_kernels(problem)
    from ldm_kernels import attention
    from ldm_kernels.attention.op import kernel_for

    q, k = problem.leaves["q"], problem.leaves["k"]
    if kernel_for(q, k) is None:
        raise Unavailable(f"no kernel serves head dim {q.shape[-1]}")
    return lambda q, k, v: attention(q, k, v, backend="triton")


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def _sdpa_backend(problem: Problem, name: str) -> Function:
    q, k = problem.leaves["q"], problem.leaves["k"]
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()
    if name == "MATH" and scores > MATH_SCORE_BYTES:
        raise Unavailable(f"its attention matrix takes {scores / 2**30:.1f} GiB")
    if name != "MATH" and not q.is_cuda:
        raise Unavailable("needs CUDA")
    backend = getattr(SDPBackend, name)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _xformers(problem: Problem) -> Function:
    _module("xformers.ops")
    _require_cuda(problem)
    from ldm_kernels import attention

    return lambda q, k, v: attention(q, k, v, backend="xformers")


def _xformers_operator(problem: Problem) -> str:
    from ldm_kernels.attention.op import xformers_operator

    return f"operator {xformers_operator(**problem.leaves)}"


def _geglu() -> list[Implementation]:
    return [
        Implementation("triton", _triton_geglu, backend="triton", ours=True),
        Implementation("eager", lambda problem: problem.plain, backend="reference"),
    ]


def _triton_geglu(problem: Problem) -> Function:
    _require_kernels(problem)
    from ldm_kernels import geglu

    return lambda projection: geglu(projection, backend="triton")


def _vector_quantize() -> list[Implementation]:
    return [
        Implementation("triton", lambda problem: _codes(problem, "triton"), backend="triton", ours=True),
        Implementation("reference", lambda problem: _codes(problem, "reference"), backend="reference"),
        Implementation("eager cdist", _cdist),
    ]


def _codes(problem: Problem, backend: str) -> Function:
    if backend == "triton":
        _require_kernels(problem)
    from ldm_kernels import vector_quantize

    return lambda z, codebook: vector_quantize(z, codebook, backend=backend)[1]


def _cdist(problem: Problem) -> Function:
    _require_distance_memory(problem)
    return problem.plain


def _require_distance_memory(problem: Problem) -> None:
    size = 4 * problem.leaves["z"].shape[0] * problem.leaves["codebook"].shape[0]
    if size > DISTANCE_BYTES:
        raise Unavailable(f"its distance matrix takes {size / 2**30:.1f} GiB")


def _ema_update() -> list[Implementation]:
    return [
        Implementation("triton", lambda problem: _averages(problem, "triton"), backend="triton", ours=True),
        Implementation("eager", lambda problem: _averages(problem, "reference"), backend="reference"),
    ]


def _averages(problem: Problem, backend: str) -> Function:
    """Updates one flat buffer per decay in place, through views of the size of a UNet's weights."""
    if backend == "triton":
        _require_kernels(problem)
    from ldm_kernels import ema_update

    averages, weights = problem.leaves["averages"], problem.leaves["weights"]
    buffer = averages.repeat(len(problem.decays))
    sizes = parameter_sizes(averages.numel())
    split = [list(part.split(sizes)) for part in buffer.chunk(len(problem.decays))]
    pieces = list(weights.split(sizes))
    single = len(problem.decays) == 1

    def run(averages: Tensor, weights: Tensor) -> Tensor:
        ema_update(split[0] if single else split, pieces, problem.decays[0] if single else problem.decays, backend)
        return buffer

    return run


def _require_kernels(problem: Problem) -> None:
    if importlib.util.find_spec("triton") is None:
        raise Unavailable("triton is not installed")
    if not launch.runs_kernels(problem.leaves[next(iter(problem.leaves))]):
        raise Unavailable("needs CUDA and capability 8.0, or TRITON_INTERPRET=1 in a dry run")


def _require_cuda(problem: Problem) -> None:
    if not problem.leaves[next(iter(problem.leaves))].is_cuda:
        raise Unavailable("needs CUDA")


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name.partition('.')[0]} is not installed: {error}") from error


_REGISTRY: dict[str, Callable[[], list[Implementation]]] = {
    "group_norm_silu": _group_norm_silu,
    "attention": _attention,
    "geglu": _geglu,
    "vector_quantize": _vector_quantize,
    "ema_update": _ema_update,
}
