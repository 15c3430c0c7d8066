"""Classifier-free guidance: the arithmetic of both passes, and how many passes are paid for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm_scale.diffusion.guidance import guided

Z = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([5, 500, 999])
CONTEXT = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
NULL = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(2))


class CountingDenoiser:
    """A denoiser whose result depends on every argument of its own image; keeps the batch sizes it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        assert z.shape[0] == t.shape[0] == context.shape[0]
        self.batches.append(z.shape[0])
        return z * context.mean(dim=(1, 2)).reshape(-1, 1, 1, 1) + t.reshape(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.5, 1.0, 3.0, 7.5])
@pytest.mark.parametrize("null", [NULL, NULL.expand(3, -1, -1)])
def test_guidance_mixes_the_two_passes(scale: float, null: Tensor) -> None:
    plain = CountingDenoiser()
    conditional, unconditional = plain(Z, T, CONTEXT), plain(Z, T, NULL.expand(3, -1, -1))
    denoiser = CountingDenoiser()
    result = guided(denoiser, CONTEXT, null, scale)(Z, T)
    torch.testing.assert_close(result, (1 - scale) * unconditional + scale * conditional)
    assert denoiser.batches == ([3] if scale in (0.0, 1.0) else [6])
