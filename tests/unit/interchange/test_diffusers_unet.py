"""Every kind of UNet computes what diffusers' does with the same weights, or is refused with the part that differs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from ldm_scale.config.schema import UNetConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.diffusers_unet import empty_unet
from ldm_scale.interchange.name_maps import translate, unet_names
from ldm_scale.models.build import build_seeded, build_unet
from tests.helpers.runs import set_random_outputs

CONTEXT = 6
BASE = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2, 3), num_res_blocks=1, attention_levels=(1,), head_dim=8, norm_groups=4
)
SELF = dataclasses.replace(BASE, attention="self")
ALIKE = {
    "transformer": BASE,
    "transformer, scale and shift": dataclasses.replace(BASE, scale_shift_norm=True),
    "transformer in the middle alone": dataclasses.replace(BASE, attention_levels=()),
    "self": SELF,
    "self in the middle alone": dataclasses.replace(SELF, attention_levels=(), head_dim=None, num_heads=3),
    "self, one head everywhere alike": dataclasses.replace(
        SELF, channel_multipliers=(1, 1), attention_levels=(0, 1), head_dim=None, num_heads=1
    ),
    "self, scale and shift": dataclasses.replace(SELF, scale_shift_norm=True),
    "self, residual resampling": dataclasses.replace(SELF, residual_resampling=True, num_res_blocks=2),
    # As LSUN-Churches, whose last level has no attention; the first one has.
    "self, both": dataclasses.replace(
        SELF, scale_shift_norm=True, residual_resampling=True, attention_levels=(0, 1), channel_multipliers=(1, 2, 2)
    ),
}


@pytest.mark.parametrize("spatial_channels", [0, 3])
@pytest.mark.parametrize("config", ALIKE.values(), ids=ALIKE.keys())
def test_output_and_gradient_equal_diffusers(config: UNetConfig, spatial_channels: int) -> None:
    context_dim = CONTEXT if config.attention == "transformer" else None
    ours = build_seeded(lambda: build_unet(config, 4 + spatial_channels, 4, context_dim), seed=3)
    set_random_outputs(ours, seed=4)
    theirs: Any = empty_unet(config, 4, context_dim, 16, spatial_channels).to_empty(device="cpu")
    assert isinstance(theirs, UNet2DModel if context_dim is None else UNet2DConditionModel)
    theirs.load_state_dict(translate(ours.state_dict(), unet_names(config), theirs.state_dict(), "the UNet"))
    ours.eval()
    theirs.eval()

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 4 + spatial_channels, 16, 8, generator=generator)
    t = torch.tensor([3, 871])
    context = [] if context_dim is None else [torch.randn(2, 5, CONTEXT, generator=generator)]
    outputs, gradients = [], []
    for network in (ours, theirs):
        given = z.clone().requires_grad_()
        y = network(given, t, *context)
        y = y if isinstance(y, torch.Tensor) else y.sample
        (gradient,) = torch.autograd.grad(y.square().sum(), given)
        outputs.append(y.detach())
        gradients.append(gradient)
    for mine, other in (outputs, gradients):
        assert (mine - other).norm() / other.norm() < 1e-5
    assert outputs[0].std() > 1e-3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(BASE, residual_resampling=True), "unet.residual_resampling=true with unet.attention="),
        (
            dataclasses.replace(SELF, attention_levels=(1, 2), head_dim=None, num_heads=4),
            "unet.num_heads=4 with unet.attention=self: heads of 8 to 12",
        ),
        (dataclasses.replace(SELF, channel_multipliers=(2, 4)), r"unet.channel_multipliers\[0\]=2"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(config: UNetConfig, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        empty_unet(config, 4, CONTEXT if config.attention == "transformer" else None, 16)
