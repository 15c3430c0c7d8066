"""The PatchGAN discriminator of stage 1, its losses and its regularisers.

A stack of 4x4 convolutions judges overlapping patches rather than the whole image (arXiv:1611.07004, section 3.2). The
published network has BatchNorm. Batch statistics depend on how many images one forward pass sees, so that one rank with
16 images, two ranks with 8 and two accumulated micro-batches of 8 would train three different networks; hence
GroupNorm by default, and BatchNorm as an option that validation lets pass on one rank without accumulation. Both norms
have one scale and one shift per channel, so the parameters are counted alike (2,765,633 at the defaults) and bear the
same names.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.errors import ConfigError

_KERNEL_SIZE = 4
_NEGATIVE_SLOPE = 0.2
_MAX_CHANNEL_MULTIPLIER = 8
_INIT_STD = 0.02

AdversarialLoss = Literal["hinge", "non_saturating"]


class PatchDiscriminator(nn.Module):
    """Logits of the patches of an image: above 0 is "real".

    Channels double with every stride-2 layer up to 8 x base_channels. A group norm over C channels has
    gcd(norm_groups, C) groups, so that any width works and the published ones get norm_groups.

    Shapes: pixels (B, in_channels, H, W); returns (B, 1, H / 2**num_layers - 2, W / 2**num_layers - 2), rounded down.
    Source: arXiv:1611.07004, section 6.1.2 (70x70 patches at num_layers = 3); arXiv:2012.09841 for its use here.
    """

    def __init__(
        self,
        base_channels: int = 64,
        num_layers: int = 3,
        in_channels: int = 3,
        norm: Literal["group", "batch"] = "group",
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        for name, value in (
            ("base_channels", base_channels), ("num_layers", num_layers), ("in_channels", in_channels),
            ("norm_groups", norm_groups),
        ):  # fmt: skip
            if value < 1:
                raise ConfigError(f"discriminator: {name} = {value}, but it must be at least 1")
        self.num_layers = num_layers
        # Not in place: hooks that wrap a module's output (as ZeRO's do) hand on a view, which autograd then refuses.
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, base_channels, _KERNEL_SIZE, stride=2, padding=1),
            nn.LeakyReLU(_NEGATIVE_SLOPE),
        ]
        channels = base_channels
        for i in range(1, num_layers + 1):
            widened = base_channels * min(2**i, _MAX_CHANNEL_MULTIPLIER)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(channels, widened, _KERNEL_SIZE, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widened) if norm == "batch" else nn.GroupNorm(math.gcd(norm_groups, widened), widened),
                nn.LeakyReLU(_NEGATIVE_SLOPE),
            ]
            channels = widened
        layers.append(nn.Conv2d(channels, 1, _KERNEL_SIZE, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        self.reset_parameters()

    @property
    def min_resolution(self) -> int:
        """Smallest side of an image that leaves at least one patch, in pixels."""
        return int(3 * 2**self.num_layers)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights drawn as in the published network: convolutions N(0, 0.02), norm scales N(1, 0.02), biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, _INIT_STD, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, _INIT_STD, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the patches; raises ConfigError if the image is too small to hold one."""
        height, width = x.shape[-2:]
        if min(height, width) < self.min_resolution:
            raise ConfigError(
                f"discriminator: images of {height}x{width} pixels leave no patch; with num_layers = {self.num_layers} "
                f"each side needs at least {self.min_resolution}: use fewer layers "
                "(autoencoder_loss.discriminator_layers) or a higher data.resolution"
            )
        logits: Tensor = self.layers(x)
        return logits


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """Scalar, half the sum of what real and what fake patches cost.

    hinge: 0 once real patches are above 1 and fake ones below -1; non_saturating: the cross-entropy of both.
    The factor one half is that of arXiv:2012.09841's training code; it only scales the discriminator's gradients.
    Source: arXiv:1705.02894, eq. 4; arXiv:1406.2661, eq. 1.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


def generator_loss(logits_fake: Tensor, kind: AdversarialLoss) -> Tensor:
    """Scalar: hinge: minus the mean logit of generated patches; non_saturating: their cross-entropy as real ones.

    Source: arXiv:1705.02894, eq. 5; arXiv:1406.2661, section 3 (the loss that does not saturate).
    """
    return -logits_fake.mean() if kind == "hinge" else F.softplus(-logits_fake).mean()


def gradient_penalty(logits_real: Tensor, x: Tensor) -> Tensor:
    """Scalar R1: the squared gradient, at the pixels of real images, of each image's mean logit; averaged over images.

    The mean over patches stands for the image's one logit, so that the penalty does not grow with their number.
    Shapes: logits (B, 1, h, w) computed from x (B, 3, H, W), which requires a gradient.
    Source: arXiv:1801.04406, eq. 9 (without its factor gamma / 2).
    """
    per_image = logits_real.mean(dim=(1, 2, 3)).sum()
    (gradient,) = torch.autograd.grad(per_image, x, create_graph=True)
    return gradient.float().square().sum(dim=(1, 2, 3)).mean()


def lecam_penalty(logits_real: Tensor, logits_fake: Tensor, average_real: float, average_fake: float) -> Tensor:
    """Scalar: how far real logits are from the running average of fake ones, and fake logits from that of real ones.

    Source: arXiv:2104.03310, eq. 4.
    """
    return (logits_real - average_fake).square().mean() + (logits_fake - average_real).square().mean()
