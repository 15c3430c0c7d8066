"""Bytes, FLOPs and the time below which no implementation of an operation can go, by GPU.

    python -m ldm_kernels.common.roofline [--batch 8] [--model sd2-64]     a table in Markdown

The fewest bytes read each input once and write each output once; the bytes moved are those of a variant that reads
some of them twice. Both count DRAM alone: what a cache serves (keys that every tile of queries reads again, say) is
free here. Two rates bound the time, memory's and that of the unit that does the arithmetic, both from data sheets:
a real copy reaches about nine tenths of the first. Exponentials (attention with head dims of 40, say) can bind
before the matrix units do and are not modelled. Every time here is computed; none was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ldm_kernels.attention.tables import cross_splits
from ldm_kernels.common.shapes import TYPICAL, Shape, all_shapes

Direction = Literal["fwd", "bwd"]
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Work:
    """What a call must do at least, and what a variant of it moves."""

    bytes_minimum: int
    bytes_moved: int
    flops: int  # the fewest: what a variant computes again is not among them; a fused multiply-add counts two
    matrix: bool  # whether they are matrix products of the input's type; else fp32 arithmetic, one by one


@dataclass(frozen=True)
class Gpu:
    """Data-sheet rates: bytes and FLOPs in a second, without structured sparsity."""

    name: str
    memory_bytes_per_s: float
    bf16_flops_per_s: float  # dense matrix products; fp16 has the same
    tf32_flops_per_s: float  # the same
    fp32_flops_per_s: float  # one by one

    def matrix_flops_per_s(self, dtype: str) -> float:
        """Of matrix products with fp32's own error in fp32: one by one, or three TF32 products for each."""
        if dtype != "float32":
            return self.bf16_flops_per_s
        return max(self.fp32_flops_per_s, self.tf32_flops_per_s / 3)


GPUS = {
    # NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB.
    "A100": Gpu("A100", 2.039e12, 312e12, 156e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: 3.35 TB/s; TFLOP/s with sparsity 1,979 and 989; in fp32 67.
    "H100": Gpu("H100", 3.35e12, 989.5e12, 494.5e12, 67e12),
    # NVIDIA H200 Tensor Core GPU data sheet, SXM: the same arithmetic, 4.8 TB/s.
    "H200": Gpu("H200", 4.8e12, 989.5e12, 494.5e12, 67e12),
    # NVIDIA HGX B200 data sheet, an eighth of eight GPUs: 64 TB/s; PFLOP/s with sparsity 36 and 18;
    # in fp32 0.6.
    "B200": Gpu("B200", 8.0e12, 2250e12, 1125e12, 75e12),
}

# fp32 operations per element, counted in the formulas (kernel READMEs); an exponential or a division counts one.
_NORM_FLOPS = {"fwd": 10, "bwd": 25}
_GEGLU_FLOPS = {"fwd": 20, "bwd": 30}
# Passes over tensors of x's size: x and y forward, x, dy and dx backward; two passes read the inputs once more.
_NORM_UNITS = {"fwd": (2, 3), "bwd": (3, 5)}


def work(
    operation: str,
    direction: Direction,
    shape: Shape,
    dtype: str = "bfloat16",
    variant: str | None = None,
    batch: int = 1,
) -> Work:
    """Bytes and FLOPs of one call on that many images. `variant` None is the one that moves the fewest bytes.

    Variants: group_norm_silu two_pass (its partial sums, a few percent, are left out), registers, cluster;
    cross_attention cross, self (the kernels for any number of keys); ema_update reference (a pass per decay), triton.

    Raises: ValueError if the operation, its direction or its variant is unknown.
    """
    counted = _COUNTS.get((operation, direction))
    if counted is None:
        known = ", ".join(".".join(key) for key in sorted(_COUNTS))
        raise ValueError(f"{operation}.{direction} is not counted; take one of {known}")
    return counted(shape, ITEM_BYTES[dtype], variant, batch)


def roofline_s(counted: Work, gpu: Gpu, dtype: str = "bfloat16", moved: bool = False) -> float:
    """Seconds below which the call cannot go on that GPU: its fewest bytes, or with `moved` those of its variant."""
    return max(memory_s(counted, gpu, moved), compute_s(counted, gpu, dtype))


def memory_s(counted: Work, gpu: Gpu, moved: bool = False) -> float:
    """Seconds that the bytes alone take at the data sheet's bandwidth."""
    return (counted.bytes_moved if moved else counted.bytes_minimum) / gpu.memory_bytes_per_s


def compute_s(counted: Work, gpu: Gpu, dtype: str = "bfloat16") -> float:
    """Seconds that the arithmetic alone takes."""
    return counted.flops / (gpu.matrix_flops_per_s(dtype) if counted.matrix else gpu.fp32_flops_per_s)


def _group_norm_silu(direction: Direction) -> Callable[[Shape, int, str | None, int], Work]:
    def count(shape: Shape, item: int, variant: str | None, batch: int) -> Work:
        elements = batch * shape["channels"] * shape["height"] * shape["width"]
        # Weight and bias, the timestep's shift, mean and rstd in fp32; backward also writes what has a gradient.
        vectors = 2 * shape["channels"] + shape["shifted"] * batch * shape["channels"]
        small = vectors * item * (2 if direction == "bwd" else 1) + 2 * batch * shape["groups"] * 4
        once, twice = (units * elements * item + small for units in _NORM_UNITS[direction])
        _require(shape.operation, variant, ("two_pass", "registers", "cluster"))
        return Work(once, twice if variant == "two_pass" else once, _NORM_FLOPS[direction] * elements, matrix=False)

    return count


def _attention(direction: Direction, cross: bool) -> Callable[[Shape, int, str | None, int], Work]:
    def count(shape: Shape, item: int, variant: str | None, batch: int) -> Work:
        _require(shape.operation, variant, ("cross", "self") if cross else ())
        heads, queries, keys = batch * shape["heads"], shape["queries"], shape["keys"]
        of_queries, of_keys = (heads * tokens * shape["head_dim"] * item for tokens in (queries, keys))
        product = 2 * heads * queries * keys * shape["head_dim"]
        of_rows = 4 * heads * queries  # one fp32 number a query
        in_one = cross and variant != "self"
        if direction == "fwd":
            # Q, K, V in, O out; the logarithms of the rows' denominators are kept only for a backward in two kernels.
            fewest = 2 * of_queries + 2 * of_keys
            return Work(fewest, fewest if in_one else fewest + of_rows, 2 * product, matrix=True)
        # Q, dO, K, V in, dQ, dK, dV out, and five products: S, dP, dQ, dK, dV.
        fewest = 3 * of_queries + 4 * of_keys
        if in_one:
            # Each part of the queries leaves its dK and dV in fp32, which are read again to be added.
            parts = cross_splits(heads, queries)
            of_parts = 4 * parts * (of_keys // item * 4) if parts > 1 else 0
            return Work(fewest, fewest + of_parts, 5 * product, matrix=True)
        # A kernel for dQ (Q, dO, O, K, V in) and one for dK and dV (Q, dO, K, V in), two numbers a row between them.
        return Work(fewest, 6 * of_queries + 6 * of_keys + 4 * of_rows, 5 * product, matrix=True)

    return count


def _geglu(direction: Direction) -> Callable[[Shape, int, str | None, int], Work]:
    def count(shape: Shape, item: int, variant: str | None, batch: int) -> Work:
        _require(shape.operation, variant, ())
        elements = batch * shape["tokens"] * shape["width"]
        # Value and gate in, result out; backward the result's gradient too, and both halves' gradients out.
        fewest = (3 if direction == "fwd" else 5) * elements * item
        return Work(fewest, fewest, _GEGLU_FLOPS[direction] * elements, matrix=False)

    return count


def _vector_quantize(shape: Shape, item: int, variant: str | None, batch: int) -> Work:
    _require(shape.operation, variant, ())
    vectors = batch * shape["vectors"]
    fewest = (vectors + shape["codes"]) * shape["dim"] * item + 8 * vectors
    # One product z codebook^T; a distance takes an addition and a comparison more, which are left out.
    return Work(fewest, fewest, 2 * vectors * shape["codes"] * shape["dim"], matrix=True)


def _ema_update(shape: Shape, item: int, variant: str | None, batch: int) -> Work:
    _require(shape.operation, variant, ("reference", "triton"))
    parameters, decays = shape["parameters"], shape["decays"]
    # fp32 whatever the model's type: the weights once, each average in and out.
    fewest = 4 * parameters * (1 + 2 * decays)
    moved = 12 * parameters * decays if variant == "reference" else fewest
    return Work(fewest, moved, 3 * parameters * decays, matrix=False)


def _require(operation: str, variant: str | None, known: tuple[str, ...]) -> None:
    if variant is not None and variant not in known:
        choice = f"one of {', '.join(known)}" if known else "None"
        raise ValueError(f"{operation} has no variant {variant!r}; take {choice}")


_COUNTS: dict[tuple[str, str], Callable[[Shape, int, str | None, int], Work]] = {
    ("group_norm_silu", "fwd"): _group_norm_silu("fwd"),
    ("group_norm_silu", "bwd"): _group_norm_silu("bwd"),
    ("attention", "fwd"): _attention("fwd", cross=False),
    ("attention", "bwd"): _attention("bwd", cross=False),
    ("cross_attention", "fwd"): _attention("fwd", cross=True),
    ("cross_attention", "bwd"): _attention("bwd", cross=True),
    ("geglu", "fwd"): _geglu("fwd"),
    ("geglu", "bwd"): _geglu("bwd"),
    ("vector_quantize", "fwd"): _vector_quantize,
    ("ema_update", "fwd"): _ema_update,
}


def table(model: str, batch: int, dtype: str = "bfloat16") -> str:
    """Markdown: each operation and shape of the model with its time at the roofline and what bounds it.

    Units: times in microseconds for the whole batch, bytes in MB (10 ** 6).

    Raises: ValueError if there is no such model.
    """
    models = sorted({shape.model for shape in all_shapes()})
    if model not in models:
        raise ValueError(f"there are no shapes of a model {model!r}; take one of {', '.join(models)}")
    head = ["operation", "shape", "times", "MB", "GFLOP", *(f"{name}, us" for name in GPUS), "bound"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 3) + "---|"]
    for shape in all_shapes():
        for direction in ("fwd", "bwd"):
            if shape.model == model and (shape.operation, direction) in _COUNTS:
                lines.append("| " + " | ".join(_cells(shape, direction, dtype, batch)) + " |")
    return "\n".join(lines) + "\n"


def _cells(shape: Shape, direction: Direction, dtype: str, batch: int) -> list[str]:
    counted = work(shape.operation, direction, shape, dtype, batch=batch)
    bounds = {
        name: "memory" if memory_s(counted, gpu) >= compute_s(counted, gpu, dtype) else "compute"
        for name, gpu in GPUS.items()
    }
    kinds = set(bounds.values())
    bound = kinds.pop() if len(kinds) == 1 else ", ".join(f"{kind} on {name}" for name, kind in bounds.items())
    return [
        f"{shape.operation} {direction}",
        shape.name,
        str(shape.count),
        f"{counted.bytes_minimum / 1e6:.1f}",
        f"{counted.flops / 1e9:.2f}",
        *(f"{roofline_s(counted, gpu, dtype) * 1e6:.1f}" for gpu in GPUS.values()),
        bound,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 0."""
    parser = argparse.ArgumentParser(prog="python -m ldm_kernels.common.roofline", description="Times at the roofline")
    parser.add_argument("--batch", type=int, default=8, help="images (default 8)")
    parser.add_argument("--model", default=TYPICAL, choices=sorted({shape.model for shape in all_shapes()}))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(ITEM_BYTES))
    options = parser.parse_args(arguments)
    sys.stdout.write(f"{options.model}, batch {options.batch}, {options.dtype}; computed, not measured\n\n")
    sys.stdout.write(table(options.model, options.batch, options.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
