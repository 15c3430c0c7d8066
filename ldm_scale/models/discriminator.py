"""The PatchGAN discriminator of stage 1 and its hinge losses.

A stack of 4x4 convolutions judges overlapping patches rather than the whole image (arXiv:1611.07004, section 3.2). One
thing differs from the published network: GroupNorm stands where it has BatchNorm. Batch statistics depend on how many
images one forward pass sees, so that one rank with 16 images, two ranks with 8 and two accumulated micro-batches of 8
would train three different networks; and its running averages would be state that neither optimizer nor ZeRO knows of.
Both norms have one scale and one shift per channel, so the parameters are counted alike (2,765,633 at the defaults).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.errors import ConfigError

_KERNEL_SIZE = 4
_NEGATIVE_SLOPE = 0.2
_MAX_CHANNEL_MULTIPLIER = 8
_INIT_STD = 0.02


class PatchDiscriminator(nn.Module):
    """Logits of the patches of an image: above 0 is "real".

    Channels double with every stride-2 layer up to 8 x base_channels. A norm over C channels has gcd(norm_groups, C)
    groups, so that any width works and the published ones get norm_groups.

    Shapes: pixels (B, in_channels, H, W); returns (B, 1, H / 2**num_layers - 2, W / 2**num_layers - 2), rounded down.
    Source: arXiv:1611.07004, section 6.1.2 (70x70 patches at num_layers = 3); arXiv:2012.09841 for its use here.
    """

    def __init__(
        self, base_channels: int = 64, num_layers: int = 3, in_channels: int = 3, norm_groups: int = 32
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
                nn.GroupNorm(math.gcd(norm_groups, widened), widened),
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
            elif isinstance(module, nn.GroupNorm):
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


def hinge_discriminator_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Scalar, half the sum of the two hinges: 0 once real patches are above 1 and fake ones below -1.

    The factor one half is that of arXiv:2012.09841's training code; it only scales the discriminator's gradients.
    Source: arXiv:1705.02894, eq. 4.
    """
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def hinge_generator_loss(logits_fake: Tensor) -> Tensor:
    """Scalar, minus the mean logit of generated patches (arXiv:1705.02894, eq. 5)."""
    return -logits_fake.mean()
