"""Classifier of noised latents: the UNet's way down and middle, pooled by attention (arXiv:2105.05233, section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.config.schema import ClassifierConfig, UNetConfig
from ldm_scale.models.attention import tokens_from_image
from ldm_scale.models.fused import GroupNorm
from ldm_scale.models.unet import NORM_EPS, UNetEncoder, zero_branches


class AttentionPool(nn.Module):
    """One vector of a feature map: what the mean of its pixels attends to among them.

    As CLIP's image encoder pools (arXiv:2103.00020, section 2.3), without positions, so that it takes any size.
    """

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = channels // head_dim
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) to (B, C)."""
        tokens = tokens_from_image(x)
        mean = tokens.mean(dim=1, keepdim=True)
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.to_q(mean), *self.to_kv(torch.cat([mean, tokens], dim=1)).chunk(2, dim=-1))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1)


class LatentClassifier(nn.Module):
    """Class logits of noised latents at any noise level."""

    def __init__(self, unet: UNetConfig, classifier: ClassifierConfig, in_channels: int) -> None:
        super().__init__()
        channels = unet.base_channels * unet.channel_multipliers[-1]
        self.body = UNetEncoder(unet, in_channels, None)
        self.norm_out = GroupNorm(unet.norm_groups, channels, NORM_EPS)
        self.pool = AttentionPool(channels, classifier.pool_head_dim)
        self.head = nn.Linear(channels, classifier.num_classes)
        zero_branches(self)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Shapes: z (B, in_channels, H, W) and t (B,) as `Process` hands them to a network; returns (B, classes)."""
        features, _ = self.body.encode(z, self.body.time_embedding(t), self.body.keys_values(None))
        return self.head(self.pool(self.norm_out(features)))  # type: ignore[no-any-return]
