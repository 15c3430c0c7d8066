"""Memory checks on a GPU: what the kernels promise not to allocate, and offsets that do not fit in 32 bits.

    python -m benchmarks.gpu_proof.memory --out memory.json

Peaks are those of torch's allocator above what was held before the call, the limits follow from the tensors' sizes.
Plain torch's peak stands beside each for comparison. Exit status 1 if a check fails, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

MIB = 2**20
TYPE = torch.bfloat16


@dataclass(frozen=True)
class Result:
    """One check. `passed` None: it needs more memory than the device has."""

    operation: str
    name: str
    passed: bool | None
    detail: str


def peak_mib(call: Callable[[], object]) -> float:
    """Peak allocation of the call above what is held before it, after one run that compiles and warms caches up."""
    call()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    del result
    return peak / MIB


def vector_quantize_without_distances() -> Result:
    """65,536 vectors and 16,384 codes: the distances alone would take 4 GiB in fp32."""
    from ldm_kernels import vector_quantize

    z = torch.randn(65_536, 4, device="cuda")
    codebook = torch.randn(16_384, 4, device="cuda")
    ours = peak_mib(lambda: vector_quantize(z, codebook, backend="triton"))
    plain = peak_mib(lambda: torch.cdist(z, codebook).argmin(1))
    return _within("vector_quantize", "65,536 x 16,384", ours, 1024, f"plain torch {plain:.0f} MiB")


def attention_without_scores() -> Result:
    """16,384 tokens, forward and backward: one head's scores would take 512 MiB in bf16."""
    from ldm_kernels import attention

    tokens, heads, head_dim = 16_384, 5, 64
    q, k, v = (_random(1, heads, tokens, head_dim).requires_grad_() for _ in range(3))
    grad_output = _random(1, heads, tokens, head_dim)

    def both(backend: str) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(q, k, v, backend=backend), (q, k, v), grad_output)

    ours, sdpa = peak_mib(lambda: both("triton")), peak_mib(lambda: both("sdpa"))
    # The output and its copies, three gradients, a number a query: a quarter of one head's scores is ample.
    return _within("attention", "16,384 tokens", ours, tokens * tokens * 2 / 4 / MIB, f"SDPA {sdpa:.0f} MiB")


def group_norm_keeps_nothing_but_its_input() -> Result:
    """Forward and backward: the output, x's gradient, and partial sums; a normalised copy of x would be one more."""
    from ldm_kernels import group_norm_silu

    x = _random(32, 320, 64, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (_random(320).requires_grad_() for _ in range(2))
    grad_output = torch.randn_like(x)

    def both(backend: str) -> tuple[Tensor, ...]:
        y = group_norm_silu(x, 32, weight, bias, backend=backend)
        return torch.autograd.grad(y, (x, weight, bias), grad_output)

    size = x.numel() * x.element_size() / MIB
    ours, plain = peak_mib(lambda: both("triton")), peak_mib(lambda: both("reference"))
    return _within("group_norm_silu", "forward and backward", ours, 2.25 * size, f"plain torch {plain:.0f} MiB")


def group_norm_beyond_32_bits() -> Result:
    """The last sample of a tensor of more than 2**31 elements equals the same sample alone, both ways."""
    from ldm_kernels import group_norm_silu

    batch = 65  # x 128 x 512 x 512 = 2.18e9 elements
    lacking = _lacks(4 * batch * 128 * 512 * 512 * 2)
    if lacking:
        return Result("group_norm_silu", "more than 2**31 elements", None, lacking)
    weight, bias = (1 + 0.1 * _random(128) for _ in range(2))

    def both(x: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        x.requires_grad_()
        y = group_norm_silu(x, 32, weight, bias, backend="triton")
        return y.detach()[-1:], torch.autograd.grad(y, x, grad_output)[0][-1:]

    x = torch.empty(batch, 128, 512, 512, device="cuda", dtype=TYPE, memory_format=torch.channels_last)
    grad_output = torch.empty_like(x)
    for tensor in (x, grad_output):
        tensor.normal_(-2.3, 0.5)
    last = [t[-1:].clone(memory_format=torch.channels_last) for t in (x, grad_output)]
    return _same("group_norm_silu", both(x, grad_output), both(*last))


def geglu_beyond_32_bits() -> Result:
    """The last rows of a projection of more than 2**31 elements equal the same rows alone, both ways."""
    from ldm_kernels import geglu

    rows, width = 2**20 + 3, 1280
    lacking = _lacks(6 * rows * width * 2)
    if lacking:
        return Result("geglu", "more than 2**31 elements", None, lacking)

    def both(projection: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        projection.requires_grad_()
        out = geglu(projection, backend="triton")
        return out.detach()[-5:], torch.autograd.grad(out, projection, grad_output)[0][-5:]

    projection = torch.empty(rows, 2 * width, device="cuda", dtype=TYPE).normal_()
    grad_output = torch.empty(rows, width, device="cuda", dtype=TYPE).normal_()
    last = projection[-5:].clone(), grad_output[-5:].clone()
    return _same("geglu", both(projection, grad_output), both(*last))


CHECKS = (
    vector_quantize_without_distances,
    attention_without_scores,
    group_norm_keeps_nothing_but_its_input,
    group_norm_beyond_32_bits,
    geglu_beyond_32_bits,
)


def main(argv: Sequence[str]) -> int:
    """0 if every check passed or lacked memory."""
    parser = argparse.ArgumentParser(description="Memory checks of the fused kernels.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("error: the memory checks need a CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    results = []
    for check in CHECKS:
        try:
            result = check()
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            result = Result(_operation(check.__name__), check.__name__, False, reason)
        results.append(result)
        # Written each time: a check may take the process with it.
        arguments.out.write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")
        print(f"{result.operation}, {result.name}: {result.passed}, {result.detail}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    return 1 if any(result.passed is False for result in results) else 0


def _operation(name: str) -> str:
    operations = {"group": "group_norm_silu", "vector": "vector_quantize"}
    first = name.partition("_")[0]
    return operations.get(first, first)


def _random(*size: int) -> Tensor:
    return torch.randn(*size, device="cuda", dtype=TYPE)


def _within(operation: str, name: str, found_mib: float, limit_mib: float, other: str) -> Result:
    detail = f"peak {found_mib:.0f} MiB, limit {limit_mib:.0f} MiB; {other}"
    return Result(operation, name, found_mib <= limit_mib, detail)


def _same(operation: str, large: tuple[Tensor, Tensor], small: tuple[Tensor, Tensor]) -> Result:
    """The variants may differ, so a rounding in the last place is allowed."""
    worst = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(large, small, strict=True))
    return Result(operation, "more than 2**31 elements", worst <= 8e-3, f"relative difference {worst:.2g}")


def _lacks(num_bytes: int) -> str:
    """Why there is not enough memory for that much, or nothing."""
    free = torch.cuda.mem_get_info()[0]
    needed = 1.25 * num_bytes
    return "" if free > needed else f"needs {needed / 2**30:.0f} GiB free, has {free / 2**30:.0f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
