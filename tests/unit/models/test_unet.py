"""The UNet: shapes and layout for odd architectures, zero output at initialisation, what each input does to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_scale.config.schema import Recomputation, UNetConfig
from ldm_scale.models.attention import image_from_tokens, tokens_from_image
from ldm_scale.models.embedding import sinusoidal_embedding
from ldm_scale.models.unet import UNet, UNetEncoder, num_heads
from tests.helpers.runs import set_random_outputs

CONTEXT = 6
SMALL = UNetConfig(
    base_channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_dim=8, norm_groups=4
)
ODD = [
    SMALL,
    dataclasses.replace(SMALL, channel_multipliers=(1,), attention_levels=()),
    dataclasses.replace(SMALL, channel_multipliers=(3, 1, 2), num_res_blocks=2, attention_levels=(0, 2)),
    dataclasses.replace(SMALL, channel_multipliers=(1, 5), num_res_blocks=3, attention_levels=(), transformer_depth=2),
    dataclasses.replace(SMALL, channel_multipliers=(2, 2, 3), attention_levels=(1,), head_dim=None, num_heads=2),
]


PLAIN = dataclasses.replace(SMALL, attention="self")
WITHOUT_CONTEXT = [
    PLAIN,
    dataclasses.replace(PLAIN, attention_levels=(), head_dim=None, num_heads=2),
    dataclasses.replace(PLAIN, scale_shift_norm=True, residual_resampling=True, num_res_blocks=2),
]
EVERY = [*ODD, *WITHOUT_CONTEXT, dataclasses.replace(ODD[2], scale_shift_norm=True, residual_resampling=True)]


def _inputs(channels: int, side: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, channels, side, side), torch.arange(batch) * 300 + 5, torch.randn(batch, 3, CONTEXT)


def _unet(config: UNetConfig, in_channels: int, out_channels: int) -> tuple[UNet, int | None]:
    """The UNet, and the number of tensors it takes: z and t, and a context where it has transformers."""
    transformers = config.attention == "transformer"
    return UNet(config, in_channels, out_channels, CONTEXT if transformers else None), None if transformers else 2


@pytest.mark.parametrize("config", EVERY)
@pytest.mark.parametrize(("in_channels", "out_channels"), [(4, 4), (7, 3)])
def test_output_has_the_latents_shape_in_channels_last(config: UNetConfig, in_channels: int, out_channels: int) -> None:
    unet, taken = _unet(config, in_channels, out_channels)
    set_random_outputs(unet, seed=1)
    side = 3 * 2 ** (len(config.channel_multipliers) - 1)
    z, *others = _inputs(in_channels, side)[:taken]
    y = unet(z, *others)
    assert y.shape == (2, out_channels, side, side)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.std() > 0
    wide = torch.randn(2, in_channels, side, 2 * side)
    assert unet(wide, *others).shape == (2, out_channels, side, 2 * side)


@pytest.mark.parametrize("config", ODD)
def test_every_skip_connection_is_used_once(config: UNetConfig) -> None:
    unet: Any = UNet(config, 4, 4, CONTEXT)
    levels, blocks = len(config.channel_multipliers), config.num_res_blocks
    widths = [config.base_channels * m for m in config.channel_multipliers]
    assert [len(level.blocks) for level in unet.down] == [blocks] * levels
    assert [len(level.blocks) for level in unet.up] == [blocks + 1] * levels
    assert len(unet.downsamples) == len(unet.upsamples) == levels - 1
    attended = [level in config.attention_levels for level in range(levels)]
    assert [len(level.attentions) for level in unet.down] == [blocks * a for a in attended]
    assert [len(level.attentions) for level in unet.up] == [(blocks + 1) * a for a in attended]
    # What comes across: the outputs of conv_in, of each block and of each downsampling, the last one first.
    stack = [widths[0]]
    for level, width in enumerate(widths):
        stack += [width] * blocks + [width] * (level < levels - 1)
    below = widths[-1]
    for level in reversed(range(levels)):
        for block in unet.up[level].blocks:
            assert block.conv1.in_channels == below + stack.pop()
            below = block.conv1.out_channels
            assert below == widths[level]
    assert stack == []


@pytest.mark.parametrize("config", EVERY)
def test_every_parameter_has_a_gradient(config: UNetConfig) -> None:
    unet, taken = _unet(config, 4, 4)
    set_random_outputs(unet, seed=1)
    unet(*_inputs(4, 2 ** (len(config.channel_multipliers) + 1))[:taken]).square().sum().backward()
    without = [n for n, p in unet.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("config", [ODD[2], EVERY[-1], *WITHOUT_CONTEXT])
def test_gradients_do_not_depend_on_checkpointing(config: UNetConfig, dropout: float) -> None:
    unet, taken = _unet(dataclasses.replace(config, dropout=dropout), 4, 4)
    set_random_outputs(unet.double(), seed=1)
    inputs = [x.double() for x in _inputs(4, 2 ** (len(config.channel_multipliers) + 1))[:taken]]
    watched = [*unet.parameters(), *(x.requires_grad_() for x in inputs[2:])]
    calls: list[str] = []
    unet.middle.block1.register_forward_hook(lambda *_: calls.append("middle"))
    found = []
    modes: tuple[Recomputation, ...] = ("none", "full", "selective")
    for mode in modes:
        unet.checkpoint_activations = mode
        torch.manual_seed(3)
        y = unet(*inputs)
        y.square().sum().backward()
        found.append([y.detach(), *(tensor.grad for tensor in watched)])
        for tensor in watched:
            tensor.grad = None
    for plain, *again in zip(*found, strict=True):
        for other in again:
            torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-9)
    assert len(calls) == 4, "with full checkpointing alone the middle is computed twice"
    with torch.no_grad():
        unet(*inputs)
    assert len(calls) == 5


def test_the_encoder_half_stands_alone() -> None:
    config = dataclasses.replace(ODD[2], num_res_blocks=1)
    whole = UNet(config, 4, 4, CONTEXT)
    set_random_outputs(whole, seed=1)
    half = UNetEncoder(config, 4, CONTEXT)
    names = half.state_dict().keys()
    state = {name: tensor for name, tensor in whole.state_dict().items() if name in names}
    rows = half.context_projection.to_kv.weight.shape[0]
    state["context_projection.to_kv.weight"] = state["context_projection.to_kv.weight"][:rows]
    half.load_state_dict(state)
    z, t, context = _inputs(4, 8)
    found, skips = half.encode(z, half.time_embedding(t), half.keys_values(context))
    expected, _ = whole.encode(z, whole.time_embedding(t), whole.keys_values(context))
    assert torch.equal(found, expected)
    assert found.shape == (2, 8 * config.channel_multipliers[-1], 2, 2)
    assert [skip.shape[2] for skip in skips] == [8, 8, 4, 4, 2, 2]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_time_may_be_any_number(dtype: torch.dtype) -> None:
    unet, _ = _unet(PLAIN, 4, 4)
    set_random_outputs(unet, seed=1)
    z, t, _ = _inputs(4, 8)
    assert torch.equal(unet(z, t.to(dtype)), unet(z, t))
    if dtype.is_floating_point:
        assert not torch.allclose(unet(z, t.to(dtype) + 0.25), unet(z, t), atol=1e-6)


def test_output_is_zero_at_initialisation() -> None:
    unet = UNet(ODD[2], 4, 4, CONTEXT)
    assert not unet(*_inputs(4, 8)).any()
    # With the last layer drawn at random, its input must be what conv_in and the resamplings alone make of z: the
    # residual branches and the attention add nothing.
    nn.init.normal_(unet.conv_out.weight)
    z, t, context = _inputs(4, 8)
    y = unet(z, t, context)
    assert y.any()
    assert torch.equal(unet(z, t * 0, context), y), "the timestep comes through a branch that must start at zero"
    assert torch.equal(unet(z, t, context * 0), y), "the context comes through a branch that must start at zero"


def test_timestep_and_context_are_felt_once_branches_have_weights() -> None:
    unet = UNet(SMALL, 4, 4, CONTEXT)
    set_random_outputs(unet, seed=1)
    z, t, context = _inputs(4, 8)
    y = unet(z, t, context)
    assert not torch.allclose(unet(z, t + 1, context), y, atol=1e-6)
    assert not torch.allclose(unet(z, t, context * 2), y, atol=1e-6)
    # Each image has its own timestep and context.
    changed = unet(z, t + torch.tensor([0, 400]), torch.cat([context[:1], context[1:] + 1]))
    assert torch.allclose(changed[0], y[0], atol=1e-6)
    assert not torch.allclose(changed[1], y[1], atol=1e-4)


def test_context_is_a_set_for_cross_attention() -> None:
    unet = UNet(SMALL, 4, 4, CONTEXT)
    set_random_outputs(unet, seed=1)
    z, t, context = _inputs(4, 8)
    assert torch.allclose(unet(z, t, context.flip(1)), unet(z, t, context), atol=1e-5)
    assert torch.allclose(unet(z, t, context.repeat(1, 2, 1)), unet(z, t, context), atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    unet = UNet(dataclasses.replace(SMALL, dropout=0.5), 4, 4, CONTEXT)
    set_random_outputs(unet, seed=1)
    inputs = _inputs(4, 8)
    assert not torch.equal(unet(*inputs), unet(*inputs))
    unet.eval()
    assert torch.equal(unet(*inputs), unet(*inputs))


def test_heads_are_counted_or_measured() -> None:
    assert num_heads(dataclasses.replace(SMALL, head_dim=16, num_heads=None), 64) == 4
    assert num_heads(dataclasses.replace(SMALL, head_dim=None, num_heads=8), 64) == 8


def test_tokens_run_row_by_row_and_back() -> None:
    x = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4).float()
    tokens = tokens_from_image(x)
    assert tokens.shape == (2, 8, 3)
    assert tokens[1, 5].tolist() == x[1, :, 1, 1].tolist()
    assert torch.equal(image_from_tokens(tokens, 2, 4), x)
    laid_out = x.contiguous(memory_format=torch.channels_last)
    assert tokens_from_image(laid_out).data_ptr() == laid_out.data_ptr(), "a copy of a channels_last image"


def test_embedding_has_cosines_then_sines_from_1_to_1_over_10000() -> None:
    t = torch.tensor([0, 1, 999])
    y = sinusoidal_embedding(t, 8).double()
    for k in range(4):
        frequency = 10_000.0 ** (-k / 4)
        assert y[:, k].tolist() == pytest.approx((t.double() * frequency).cos().tolist(), abs=1e-4)
        assert y[:, 4 + k].tolist() == pytest.approx((t.double() * frequency).sin().tolist(), abs=1e-4)
