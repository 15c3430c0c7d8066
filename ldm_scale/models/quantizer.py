"""The codebook of a VQ-regularised autoencoder (arXiv:1711.00937; arXiv:2012.09841, eq. 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm_kernels import vector_quantize


class Quantizer(nn.Module):
    """Replaces every latent vector by the nearest code; a module of its own, so that ZeRO stage 3 gathers the codes.

    The search runs in fp32 whatever the weights' type: rounded distances would choose other codes.
    """

    def __init__(self, codebook_size: int, channels: int) -> None:
        super().__init__()
        self.backend = "auto"
        # Between -1/K and 1/K as in VQGAN: all codes start as near to zero as the latents do.
        self.codebook = nn.Parameter(
            torch.empty(codebook_size, channels).uniform_(-1 / codebook_size, 1 / codebook_size)
        )

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of latents and their numbers; the gradient of the codes goes to the codebook alone.

        Shapes: z (B, c, h, w); returns (B, c, h, w) in fp32 and (B, h, w) int64.
        """
        batch, channels, height, width = z.shape
        vectors = z.permute(0, 2, 3, 1).reshape(-1, channels).float()
        codes, indices = vector_quantize(vectors, self.codebook.float(), backend=self.backend)
        return (
            codes.view(batch, height, width, channels).permute(0, 3, 1, 2),
            indices.view(batch, height, width),
        )
