"""Which of our tensors is which in checkpoints of CompVis and Stability (ldm.models.diffusion.ddpm.LatentDiffusion).

A row says under which names a tensor of ours lies there, and in which form: its rows may be several tensors (a joint
query-key-value projection), a linear layer may be a 1x1 convolution, rows and columns may have another order. Every
form is undone exactly. `to_theirs` of a state dict on the meta device gives all names and shapes that a file must have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_scale.config.schema import AutoencoderConfig, UNetConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, deferred, joined, parts_of
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.name_maps import TRANSFORMER_BLOCK, require_floating
from ldm_scale.interchange.safetensors_io import describe_difference
from ldm_scale.models.unet import cross_attention_channels, num_heads

UNET, FIRST_STAGE, COND_STAGE = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


@dataclass(frozen=True)
class Form:
    """How a tensor of ours is laid out there; `read` is the inverse of `write`."""

    write: Callable[[Tensor], Tensor]
    read: Callable[[Tensor], Tensor]


AS_IS = Form(lambda ours: ours, lambda theirs: theirs)
CONVOLUTION = Form(lambda ours: ours[:, :, None, None], lambda theirs: theirs.flatten(1))
CONVOLUTION_1D = Form(lambda ours: ours[:, :, None], lambda theirs: theirs.flatten(1))


@dataclass(frozen=True)
class Place:
    """Where a tensor of ours lies: in these, whose rows follow each other; `rows` of each, in equal parts without."""

    names: tuple[str, ...]
    form: Form = AS_IS
    rows: tuple[int, ...] = ()


Places = dict[str, Place]  # by the names of our tensors

_RESIDUAL_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_projection": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
_AUTOENCODER_BLOCK = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"skip": "nin_shortcut"}


def to_theirs(ours: Mapping[str, Tensor], places: Places) -> LazyTensors:
    """Tensors of ours under their names and in their form, when they are asked for."""

    def split(name: str, tensor: Tensor) -> Sequence[Tensor]:
        place = places[name]
        written = place.form.write(tensor)
        return torch.split(written, list(place.rows)) if place.rows else written.chunk(len(place.names))

    return parts_of(ours, {name: places[name].names for name in ours}, split)


def to_ours(theirs: Mapping[str, Tensor], places: Places, target: Mapping[str, Tensor], what: str) -> LazyTensors:
    """The inverse of `to_theirs`, in float32; `target` is a state dict of ours (meta tensors will do).

    Raises: CheckpointError that names the tensors of `what` that are missing, of another shape or not expected.
    """
    difference = describe_difference(to_theirs(target, places), theirs)
    if difference:
        raise CheckpointError(f"{what} does not fit its configuration: {difference}; give the two that belong together")
    require_floating(theirs, what)

    def join(name: str, parts: list[Tensor]) -> Tensor:
        return places[name].form.read(parts[0] if len(parts) == 1 else torch.cat(parts)).float().contiguous()

    return joined(theirs, {name: places[name].names for name in target}, join)


def autoencoder_places(config: AutoencoderConfig, prefix: str = "") -> Places:
    """Tensors of `Autoencoder` in their AutoencoderKL or VQModel."""
    if config.kind == "identity":
        return {}
    places = _module("quant_conv", f"{prefix}quant_conv") | _module("post_quant_conv", f"{prefix}post_quant_conv")
    sides = (
        ("encoder", "down", "downsample", config.num_res_blocks),
        ("decoder", "up", "upsample", config.num_res_blocks + 1),
    )
    for half, side, resampler, num_blocks in sides:
        base = f"{prefix}{half}"
        for name in ("conv_in", "norm_out", "conv_out"):
            places |= _module(f"{half}.{name}", f"{base}.{name}")
        for index in (1, 2):
            places |= _residual(f"{half}.middle.block{index}", f"{base}.mid.block_{index}", _AUTOENCODER_BLOCK)
        places |= _autoencoder_attention(f"{half}.middle.attention", f"{base}.mid.attn_1")
        for level in range(len(config.channel_multipliers)):
            theirs = f"{base}.{side}.{level}"
            for index in range(num_blocks):
                places |= _residual(f"{half}.levels.{level}.{index}", f"{theirs}.block.{index}", _AUTOENCODER_BLOCK)
                places |= _autoencoder_attention(f"{half}.attentions.{level}.{index}", f"{theirs}.attn.{index}")
            # Our upsampling i leads to level i; theirs belongs to the level that it leaves.
            number = level if half == "encoder" else level - 1
            places |= _module(f"{half}.{resampler}s.{number}.conv", f"{theirs}.{resampler}.conv")
    return places | {"quantizer.codebook": Place((f"{prefix}quantize.embedding.weight",))}


def unet_places(config: UNetConfig, *, conv_in: Form = AS_IS, heads_first: bool = True) -> Places:
    """Tensors of `UNet` in their UNetModel, which numbers its blocks in the order in which they run.

    `conv_in` is the form of the first convolution's weight; `heads_first` whether single attention layers put the rows
    of a head's q, k and v together (theirs unless use_new_attention_order is set).
    """
    places = {
        **_module("unet.time_embedding.linear1", f"{UNET}time_embed.0"),
        **_module("unet.time_embedding.linear2", f"{UNET}time_embed.2"),
        **_module("unet.conv_in", f"{UNET}input_blocks.0.0", conv_in),
        **_module("unet.norm_out", f"{UNET}out.0"),
        **_module("unet.conv_out", f"{UNET}out.2"),
        **_residual("unet.middle.block1", f"{UNET}middle_block.0", _RESIDUAL_BLOCK),
        **_residual("unet.middle.block2", f"{UNET}middle_block.2", _RESIDUAL_BLOCK),
    }
    contexts = []  # theirs that attend to the context, in the order in which they run
    blocks, number = list(enumerate(config.channel_multipliers)), 1
    for level, multiplier in blocks:
        for index in range(config.num_res_blocks):
            theirs = f"{UNET}input_blocks.{number}"
            places |= _residual(f"unet.down.{level}.blocks.{index}", f"{theirs}.0", _RESIDUAL_BLOCK)
            if level in config.attention_levels:
                contexts.append(f"{theirs}.1")
                ours = f"unet.down.{level}.attentions.{index}"
                places |= _attention(config, ours, contexts[-1], multiplier, heads_first)
            number += 1
        if level < len(blocks) - 1:
            places |= _resampling(config, f"unet.downsamples.{level}", f"{UNET}input_blocks.{number}.0", "op")
            number += 1
    contexts.append(f"{UNET}middle_block.1")
    places |= _attention(config, "unet.middle.attention", contexts[-1], blocks[-1][1], heads_first)
    number = 0
    for level, multiplier in reversed(blocks):
        for index in range(config.num_res_blocks + 1):
            theirs = f"{UNET}output_blocks.{number}"
            places |= _residual(f"unet.up.{level}.blocks.{index}", f"{theirs}.0", _RESIDUAL_BLOCK)
            if level in config.attention_levels:
                contexts.append(f"{theirs}.1")
                places |= _attention(
                    config, f"unet.up.{level}.attentions.{index}", contexts[-1], multiplier, heads_first
                )
            number += 1
        if level > 0:
            last = f"{UNET}output_blocks.{number - 1}.{2 if level in config.attention_levels else 1}"
            places |= _resampling(config, f"unet.upsamples.{level - 1}", last, "conv")
    if config.attention == "transformer":
        places |= _context_projection(config, contexts)
    return places


def shaped(state: Mapping[str, Tensor], name: str, num_dims: int, where: str) -> Tensor:
    """The tensor of that name without its values, of which the sizes are to be read that no configuration says.

    Raises: CheckpointError that names it if `where` lacks it, or it has another number of dimensions or none of a size.
    """
    if name not in state:
        raise CheckpointError(
            f"{name} is missing in {where}, though the model it is said to be has such a part; give a whole one, or "
            "the YAML that belongs to it"
        )
    like = deferred(state)[name].like if isinstance(state, LazyTensors) else state[name]
    if like.ndim != num_dims or not like.numel():
        raise CheckpointError(
            f"{name} has the shape {tuple(like.shape)} in {where}: must have {num_dims} dimensions, none of them 0; "
            "give a whole one, or the YAML that belongs to it"
        )
    return like


def mask_before_image(latent_channels: int) -> Form:
    """Form of the first convolution where the mask is concatenated before the masked image's latents, not behind."""
    c = latent_channels
    there = [*range(c), 2 * c, *range(c, 2 * c)]
    back = [*range(c), *range(c + 1, 2 * c + 1), c]
    return Form(lambda ours: ours[:, there], lambda theirs: theirs[:, back])


def _module(ours: str, theirs: str, weight: Form = AS_IS) -> Places:
    return {f"{ours}.weight": Place((f"{theirs}.weight",), weight), f"{ours}.bias": Place((f"{theirs}.bias",))}


def _residual(ours: str, theirs: str, parts: Mapping[str, str]) -> Places:
    """A block without one of the parts leaves its row unused."""
    places: Places = {}
    for name, their_name in parts.items():
        places |= _module(f"{ours}.{name}", f"{theirs}.{their_name}")
    # Our second norm adds the first convolution's bias.
    places[f"{ours}.norm2.channel_bias"] = places.pop(f"{ours}.conv1.bias")
    return places


def _resampling(config: UNetConfig, ours: str, theirs: str, name: str) -> Places:
    if config.residual_resampling:
        return _residual(ours, theirs, _RESIDUAL_BLOCK)
    return _module(f"{ours}.conv", f"{theirs}.{name}")


def _autoencoder_attention(ours: str, theirs: str) -> Places:
    qkv = {
        f"{ours}.attention.to_qkv.{leaf}": Place(tuple(f"{theirs}.{part}.{leaf}" for part in "qkv"), form)
        for leaf, form in (("weight", CONVOLUTION), ("bias", AS_IS))
    }
    out = _module(f"{ours}.attention.to_out", f"{theirs}.proj_out", CONVOLUTION)
    return _module(f"{ours}.norm", f"{theirs}.norm") | qkv | out


def _attention(config: UNetConfig, ours: str, theirs: str, multiplier: int, heads_first: bool) -> Places:
    if config.attention == "self":
        heads = num_heads(config, config.base_channels * multiplier) if heads_first else 1
        return {
            **_module(f"{ours}.norm", f"{theirs}.norm"),
            f"{ours}.attention.to_qkv.weight": Place((f"{theirs}.qkv.weight",), _by_heads(heads, CONVOLUTION_1D)),
            f"{ours}.attention.to_qkv.bias": Place((f"{theirs}.qkv.bias",), _by_heads(heads, AS_IS)),
            **_module(f"{ours}.attention.to_out", f"{theirs}.proj_out", CONVOLUTION_1D),
        }
    projection = AS_IS if config.linear_projection else CONVOLUTION
    places = _module(f"{ours}.norm", f"{theirs}.norm")
    places |= _module(f"{ours}.proj_in", f"{theirs}.proj_in", projection)
    places |= _module(f"{ours}.proj_out", f"{theirs}.proj_out", projection)
    for depth in range(config.transformer_depth):
        for name, parts in TRANSFORMER_BLOCK.items():
            for leaf in ("weight", "bias"):
                there = tuple(f"{theirs}.transformer_blocks.{depth}.{part}.{leaf}" for part in parts)
                places[f"{ours}.blocks.{depth}.{name}.{leaf}"] = Place(there)
    return places


def _context_projection(config: UNetConfig, transformers: list[str]) -> Places:
    names = tuple(
        f"{transformer}.transformer_blocks.{depth}.attn2.to_{part}.weight"
        for transformer in transformers
        for depth in range(config.transformer_depth)
        for part in "kv"
    )
    rows = tuple(channels for channels in cross_attention_channels(config) for _ in "kv")
    return {"unet.context_projection.to_kv.weight": Place(names, rows=rows)}


def _by_heads(heads: int, form: Form) -> Form:
    """Rows head by head, q, k and v of each, instead of q, k and v, each head by head; then `form`."""

    def write(ours: Tensor) -> Tensor:
        return form.write(_swapped(ours, 3, heads))

    def read(theirs: Tensor) -> Tensor:
        return _swapped(form.read(theirs), heads, 3)

    return Form(write, read)


def _swapped(rows: Tensor, outer: int, inner: int) -> Tensor:
    """Rows that were counted by `outer`, then by `inner`, counted the other way round."""
    return rows.reshape(outer, inner, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)
