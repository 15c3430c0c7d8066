"""How much of a GPU's data-sheet rates software reaches: the constants of the step-time model, and where each is from.

An operation takes `operation_s` + max(FLOPs / (share * peak), bytes / (share * bandwidth)). The first term is what
makes small micro-batches slow: filling and emptying the GPU and waiting for a launch take the same time for any size.
"""

from __future__ import annotations

from dataclasses import dataclass

# A copy of large tensors on an H100: 3,013 of 3,350 GB/s (benchmarks/results/kernels-h100-2026-11-26). Other GPUs were
# not measured here and are taken to reach the same share.
MEMORY_SHARE = 0.9
# SDPA on an H100 at SD-2's 4,096 tokens, head_dim 64, batch 32: 492 TFLOP/s forward, 458 backward, of 989 (same file).
# On an A100 FlashAttention-2 reaches up to 73% forward and 63% backward at its best (arXiv:2307.08691, abstract and
# section 4.1), with head_dim 64 less.
ATTENTION_SHARE = 0.48


@dataclass(frozen=True)
class Software:
    """What an implementation reaches on one kind of GPU."""

    matrix_share: float  # of the peak, convolutions and matrix products of large sizes
    operation_s: float  # each operation, whatever its size
    source: str
    attention_share: float = ATTENTION_SHARE
    memory_share: float = MEMORY_SHARE


# matrix_share and operation_s come out of `python -m benchmarks.plan_against_published --fit`, which keeps them in
# benchmarks/published/constants.json: of our own step on an H100, and on A100s of MosaicML's, trained as ours with
# separate launches. What other GPUs reach with these shapes was measured by nobody: they are taken to be alike.
_OWN = Software(0.451, 9.914e-6, "fitted: SD-2's step of this program on an H100, operation_s of MosaicML's")
_MOSAIC = Software(0.3077, 9.914e-6, "fitted: MosaicML's SD-2 at 256 and 512 px on 8 A100")
_UNMEASURED = Software(_OWN.matrix_share, _OWN.operation_s, "the H100's constants: not measured on this GPU")

SOFTWARE: dict[str, Software] = {
    "v100": _UNMEASURED,
    "a100-40": _MOSAIC,
    "a100-80": _MOSAIC,
    "h100": _OWN,
    "h200": _UNMEASURED,
    "b200": _UNMEASURED,
    "l40s": _UNMEASURED,
}
