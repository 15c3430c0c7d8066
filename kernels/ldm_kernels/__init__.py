"""The operations that decide the speed of latent diffusion training, behind one function each.

Each operation has a folder: `reference.py` is the definition in plain torch that every faster implementation must
reproduce, `kernel.py` its Triton kernels, `op.py` the public function that chooses between them. The package sees torch
and triton alone, and triton only where a kernel runs: it can be used without ldm_scale, and imported without triton.
"""

from ldm_kernels.attention.op import attention
from ldm_kernels.ema_update.op import ema_update
from ldm_kernels.geglu.op import geglu
from ldm_kernels.group_norm_silu.op import group_norm_silu
from ldm_kernels.vector_quantize.op import vector_quantize

__all__ = ["attention", "ema_update", "geglu", "group_norm_silu", "vector_quantize"]
