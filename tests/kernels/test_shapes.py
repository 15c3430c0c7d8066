"""The enumerated shapes are those that the real networks call the operations with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from ldm_kernels.common import shapes
from ldm_kernels.common.shapes import Shape
from ldm_scale.config.schema import AutoencoderConfig, UNetConfig
from ldm_scale.models.attention import CrossAttention, SelfAttention
from ldm_scale.models.autoencoder import Autoencoder
from ldm_scale.models.build import build_unet
from ldm_scale.models.fused import FeedForward, GroupNorm

Met = Counter[tuple[str, tuple[tuple[str, int], ...]]]


def counted(listed: list[Shape]) -> Met:
    met: Met = Counter()
    for shape in listed:
        met[shape.operation, shape.dims] += shape.count
    return met


def hooked(network: nn.Module) -> Met:
    """Fills up while the network runs: what each of its modules asks of an operation."""
    met: Met = Counter()

    def note_norm(module: GroupNorm, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        _, channels, height, width = args[0].shape
        shifted = len(args) > 1 or kwargs.get("sample_shift") is not None
        silu = int(module.activation == "silu")
        sizes = (("channels", channels), ("height", height), ("width", width), ("groups", module.num_groups))
        met["group_norm_silu", (*sizes, ("silu", silu), ("shifted", int(shifted)))] += 1

    def note_attention(module: nn.Module, args: tuple[Any, ...]) -> None:
        queries, channels = args[0].shape[1:]
        operation, keys = ("attention", queries) if len(args) == 1 else ("cross_attention", args[1][0].shape[1])
        heads = module.num_heads
        sizes = (("heads", heads), ("queries", queries), ("keys", keys), ("head_dim", channels // heads))
        met[operation, sizes] += 1

    def note_feed_forward(module: FeedForward, args: tuple[torch.Tensor, ...]) -> None:
        met["geglu", (("tokens", args[0].shape[1]), ("width", module.out_projection.in_features))] += 1

    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.register_forward_pre_hook(note_norm, with_kwargs=True)
        elif isinstance(module, SelfAttention | CrossAttention):
            module.register_forward_pre_hook(note_attention)
        elif isinstance(module, FeedForward):
            module.register_forward_pre_hook(note_feed_forward)
    return met


def unet_config(architecture: shapes.UNetArchitecture) -> UNetConfig:
    return UNetConfig(
        base_channels=architecture.base_channels,
        channel_multipliers=architecture.channel_multipliers,
        num_res_blocks=architecture.num_res_blocks,
        attention_levels=architecture.attention_levels,
        head_dim=architecture.head_dim,
        num_heads=architecture.num_heads,
    )


@pytest.fixture(autouse=True)
def on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("latent_size", shapes.LATENT_SIZES)
@pytest.mark.parametrize("model", shapes.UNETS)
def test_unet_meets_the_enumerated_shapes(model: str, latent_size: int) -> None:
    architecture = shapes.UNETS[model]
    unet = build_unet(unet_config(architecture), in_channels=4, out_channels=4, context_dim=64)
    met = hooked(unet)
    unet(torch.empty(1, 4, latent_size, latent_size), torch.empty(1), torch.empty(1, architecture.context_tokens, 64))
    assert met == counted(shapes.unet_shapes(model, architecture, latent_size))


@pytest.mark.parametrize("image_size", shapes.IMAGE_SIZES)
def test_autoencoder_meets_the_enumerated_shapes(image_size: int) -> None:
    config = AutoencoderConfig(base_channels=128, channel_multipliers=(1, 2, 4, 4))
    autoencoder = Autoencoder(config)
    met = hooked(autoencoder)
    autoencoder.decoder.features(autoencoder.encoder(torch.empty(1, 3, image_size, image_size))[:, :4])
    assert met == counted(shapes.autoencoder_shapes("kl_f8", shapes.KL_F8, image_size))


@pytest.mark.parametrize("model", shapes.UNET_PARAMETERS)
def test_parameters_of_the_averaged_networks(model: str) -> None:
    context_dim = {"sd1": 768, "sd2": 1024}[model]
    unet = build_unet(unet_config(shapes.UNETS[model]), in_channels=4, out_channels=4, context_dim=context_dim)
    assert sum(p.numel() for p in unet.parameters()) == shapes.UNET_PARAMETERS[model]


def test_sd_unet_has_61_norms_of_which_45_with_silu() -> None:
    norms = [s for s in shapes.unet_shapes("sd1", shapes.UNETS["sd1"], 64) if s.operation == "group_norm_silu"]
    assert sum(s.count for s in norms) == 61
    assert sum(s.count for s in norms if s["silu"]) == 45


def test_head_dims_of_the_models() -> None:
    head_dims = {
        model: sorted({s["head_dim"] for s in shapes.unet_shapes(model, unet, 64) if s.operation == "attention"})
        for model, unet in shapes.UNETS.items()
    }
    assert head_dims == {"sd1": [40, 80, 160], "sd2": [64], "ldm4": [32], "ldm8": [32]}


def test_names_tell_shapes_of_one_model_apart() -> None:
    names = [(shape.model, shape.operation, shape.name) for shape in shapes.all_shapes()]
    assert len(names) == len(set(names))
