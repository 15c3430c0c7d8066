"""The operations that decide the speed of latent diffusion training, behind one function each.

Each operation has a folder; `reference.py` in it is the definition, in plain torch, that every faster
implementation must reproduce. The package sees torch alone (and, for compiled kernels, triton): it can be used
without ldm_scale.
"""

from ldm_kernels.attention.reference import attention
from ldm_kernels.ema_update.reference import ema_update
from ldm_kernels.geglu.reference import geglu
from ldm_kernels.group_norm_silu.reference import group_norm_silu

__all__ = ["attention", "ema_update", "geglu", "group_norm_silu"]
