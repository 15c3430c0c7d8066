"""Which of our tensors is which of diffusers' and transformers'.

A map is a table from a tensor name of ours to the names of theirs that hold its rows, in order: usually one, three for
a joint query-key-value projection. Tables list every part that a model of the configuration may have;
`translate` and `restore` then insist that every tensor on both sides is used exactly once, so a part that is
forgotten, invented or of another shape is an error and never a silent difference.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ldm_scale.config.schema import AutoencoderConfig, TextConditioningConfig, UNetConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, joined, parts_of, renamed, without_values
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.safetensors_io import describe_difference

NameMap = dict[str, tuple[str, ...]]

# Parts of a block: ours -> theirs, relative to the block. A block without one of the parts leaves its row unused.
_RESIDUAL_BLOCK: NameMap = {
    "norm1": ("norm1",),
    "conv1": ("conv1",),
    "time_projection": ("time_emb_proj",),
    "norm2": ("norm2",),
    "conv2": ("conv2",),
    "skip": ("conv_shortcut",),
}
TRANSFORMER_BLOCK: NameMap = {
    "norm1": ("norm1",),
    "self_attention.to_qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "self_attention.to_out": ("attn1.to_out.0",),
    "norm2": ("norm2",),
    "cross_attention.to_q": ("attn2.to_q",),
    "cross_attention.to_out": ("attn2.to_out.0",),
    "norm3": ("norm3",),
    "feed_forward.in_projection": ("ff.net.0.proj",),
    "feed_forward.out_projection": ("ff.net.2",),
}
_IMAGE_ATTENTION: NameMap = {
    "norm": ("group_norm",),
    "attention.to_qkv": ("to_q", "to_k", "to_v"),
    "attention.to_out": ("to_out.0",),
}
_CLIP_BLOCK: NameMap = {
    "norm1": ("layer_norm1",),
    "attention.to_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.to_out": ("self_attn.out_proj",),
    "norm2": ("layer_norm2",),
    "mlp_in": ("mlp.fc1",),
    "mlp_out": ("mlp.fc2",),
}
_BERT_BLOCK: NameMap = {
    "norm1": ("self_attn_layer_norm",),
    "attention.to_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.to_out": ("self_attn.out_proj",),
    "norm2": ("final_layer_norm",),
    "mlp_in": ("fc1",),
    "mlp_out": ("fc2",),
}


def autoencoder_names(config: AutoencoderConfig) -> NameMap:
    """Tensors of `Autoencoder` in `AutoencoderKL` or `VQModel`, whose decoder's levels count from the coarsest."""
    num_levels = len(config.channel_multipliers)
    modules: NameMap = {"quant_conv": ("quant_conv",), "post_quant_conv": ("post_quant_conv",)}
    for half in ("encoder", "decoder"):
        modules |= _prefixed(half, half, {"conv_in": ("conv_in",), "norm_out": ("conv_norm_out",)})
        modules |= _prefixed(half, half, {"conv_out": ("conv_out",)})
        modules |= _prefixed(f"{half}.middle.attention", f"{half}.mid_block.attentions.0", _IMAGE_ATTENTION)
        for index in range(2):
            ours, theirs = f"{half}.middle.block{index + 1}", f"{half}.mid_block.resnets.{index}"
            modules |= _prefixed(ours, theirs, _RESIDUAL_BLOCK)
    for level in range(num_levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{num_levels - 1 - level}"
        halves = (("encoder", down, config.num_res_blocks), ("decoder", up, config.num_res_blocks + 1))
        for half, theirs, num_blocks in halves:
            for index in range(num_blocks):
                modules |= _prefixed(f"{half}.levels.{level}.{index}", f"{theirs}.resnets.{index}", _RESIDUAL_BLOCK)
                ours = f"{half}.attentions.{level}.{index}"
                modules |= _prefixed(ours, f"{theirs}.attentions.{index}", _IMAGE_ATTENTION)
        modules[f"encoder.downsamples.{level}.conv"] = (f"{down}.downsamplers.0.conv",)
        # Upsampling i leads to level i, and belongs to the level that it leaves.
        modules[f"decoder.upsamples.{level - 1}.conv"] = (f"{up}.upsamplers.0.conv",)
    return _tensor_names(modules) | {"quantizer.codebook": ("quantize.embedding.weight",)}


def unet_names(config: UNetConfig) -> NameMap:
    """Tensors of `UNet` in `UNet2DConditionModel`, or in `UNet2DModel` where the attention is `self`.

    Theirs number the levels on the way up from the coarsest.
    """
    num_levels = len(config.channel_multipliers)
    modules: NameMap = {
        "time_embedding.linear1": ("time_embedding.linear_1",),
        "time_embedding.linear2": ("time_embedding.linear_2",),
        "conv_in": ("conv_in",),
        "norm_out": ("conv_norm_out",),
        "conv_out": ("conv_out",),
    }
    for index in range(2):
        modules |= _prefixed(f"middle.block{index + 1}", f"mid_block.resnets.{index}", _RESIDUAL_BLOCK)
    modules |= _attention(config, "middle.attention", "mid_block.attentions.0")
    for level in range(num_levels):
        down, up = f"down_blocks.{level}", f"up_blocks.{num_levels - 1 - level}"
        sides = (("down", down, config.num_res_blocks), ("up", up, config.num_res_blocks + 1))
        for side, theirs, num_blocks in sides:
            for index in range(num_blocks):
                modules |= _prefixed(f"{side}.{level}.blocks.{index}", f"{theirs}.resnets.{index}", _RESIDUAL_BLOCK)
                modules |= _attention(config, f"{side}.{level}.attentions.{index}", f"{theirs}.attentions.{index}")
        resampling: NameMap = _RESIDUAL_BLOCK if config.residual_resampling else {"conv": ("conv",)}
        modules |= _prefixed(f"downsamples.{level}", f"{down}.downsamplers.0", resampling)
        modules |= _prefixed(f"upsamples.{level - 1}", f"{up}.upsamplers.0", resampling)
    modules["context_projection.to_kv"] = _cross_attention_projections(config)
    return _tensor_names(modules)


def _cross_attention_projections(config: UNetConfig) -> tuple[str, ...]:
    """Key and value projections of their cross-attention layers in the order in which they run: down, middle, up."""
    num_levels = len(config.channel_multipliers)
    levels = [level for level in range(num_levels) if level in config.attention_levels]
    transformers = [f"down_blocks.{level}.attentions.{i}" for level in levels for i in range(config.num_res_blocks)]
    transformers.append("mid_block.attentions.0")
    for level in reversed(levels):
        up = f"up_blocks.{num_levels - 1 - level}"
        transformers += [f"{up}.attentions.{i}" for i in range(config.num_res_blocks + 1)]
    return tuple(
        f"{transformer}.transformer_blocks.{depth}.attn2.to_{part}"
        for transformer in transformers
        for depth in range(config.transformer_depth)
        for part in "kv"
    )


def text_encoder_names(config: TextConditioningConfig) -> NameMap:
    """Tensors of `TextCondition` in `CLIPTextModel` (as its published checkpoints name them) or `LDMBertModel`."""
    block = _BERT_BLOCK
    tokens, positions = "model.embed_tokens", "model.embed_positions"
    layers, norm = "model.layers", "model.layer_norm"
    if config.encoder == "clip":
        block = _CLIP_BLOCK
        tokens, positions = "text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding"
        layers, norm = "text_model.encoder.layers", "text_model.final_layer_norm"
    modules: NameMap = {"encoder.token_embedding": (tokens,), "encoder.norm_out": (norm,)}
    for index in range(config.depth):
        modules |= _prefixed(f"encoder.blocks.{index}", f"{layers}.{index}", block)
    return _tensor_names(modules) | {"encoder.position_embedding": (f"{positions}.weight",)}


def translate(ours: Mapping[str, Tensor], names: NameMap, target: Mapping[str, Tensor], what: str) -> LazyTensors:
    """`ours` under their names and in their shapes; `target` is a state dict of theirs (meta tensors will do).

    Raises: CheckpointError that names the tensors of `what` that have no place there, or places left empty.
    """
    unnamed = [name for name in ours if name not in names]
    if unnamed:
        raise CheckpointError(f"{what}: no place in the diffusers model for {', '.join(unnamed[:4])}; do not export it")

    def split(name: str, tensor: Tensor) -> list[Tensor]:
        parts = names[name]
        rows = zip(parts, _rows(tensor, parts, target), strict=True)
        return [_reshaped(part, target.get(their_name, part)) for their_name, part in rows]

    theirs = parts_of(ours, names, split)
    difference = describe_difference(target, theirs)
    if difference:
        raise CheckpointError(f"{what} does not fit the diffusers model of its configuration: {difference}")
    return theirs


def restore(theirs: Mapping[str, Tensor], names: NameMap, target: Mapping[str, Tensor], what: str) -> LazyTensors:
    """The inverse of `translate`: `theirs` under our names and in our shapes; `target` is a state dict of ours.

    Raises: CheckpointError that names the tensors that are missing in `what`, that it should not have, or whose shapes
    are others'.
    """
    wanted = {name: names[name] for name in target}
    expected = dict.fromkeys((part for parts in wanted.values() for part in parts), torch.empty(0))
    absent, unknown = sorted(expected.keys() - theirs.keys()), sorted(theirs.keys() - expected.keys())
    if absent or unknown:
        raise CheckpointError(
            f"{what} does not fit its configuration: {len(absent)} tensors missing ({', '.join(absent[:4])}), "
            f"{len(unknown)} not expected ({', '.join(unknown[:4])})"
        )
    require_floating(theirs, what)

    def join(name: str, parts: list[Tensor]) -> Tensor:
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(f"{part} {tuple(t.shape)}" for part, t in zip(wanted[name], parts, strict=True))
            raise CheckpointError(
                f"{what} does not fit its configuration: parts of {name} do not go together: {shapes}"
            )
        return _reshaped(torch.cat(parts) if len(parts) > 1 else parts[0], target[name])

    ours = joined(theirs, wanted, join)
    difference = describe_difference(target, ours)
    if difference:
        raise CheckpointError(f"{what} does not fit its configuration: {difference}")
    return ours


def require_floating(tensors: Mapping[str, Tensor], what: str) -> None:
    """Nothing, if all tensors hold floating numbers: others are indices or quantised, and mean something else as such.

    Raises: CheckpointError that names the first that does not.
    """
    for name, like in without_values(tensors).items():
        if not like.is_floating_point():
            raise CheckpointError(
                f"{what}: {name} is of type {like.dtype}, expected floating numbers; give the model's own weights"
            )


def _rows(tensor: Tensor, parts: tuple[str, ...], target: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """The tensor's rows divided as `target` divides them; in equal parts if it lacks one of them or has other sizes."""
    sizes = [target[part].shape[0] for part in parts if part in target and target[part].ndim]
    if len(sizes) == len(parts) and sum(sizes) == tensor.shape[0]:
        return torch.split(tensor, sizes)
    return tensor.chunk(len(parts))


def _reshaped(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` in the shape of `like` if the two are a linear layer and a 1x1 convolution, unchanged otherwise."""
    if sorted((tensor.ndim, like.ndim)) == [2, 4] and tensor.shape[:2] == like.shape[:2]:
        return tensor.reshape(like.shape) if tensor.numel() == like.numel() else tensor
    return tensor


def _attention(config: UNetConfig, ours: str, theirs: str) -> NameMap:
    if config.attention == "self":
        return _prefixed(ours, theirs, _IMAGE_ATTENTION)
    modules = _prefixed(ours, theirs, {name: (name,) for name in ("norm", "proj_in", "proj_out")})
    for index in range(config.transformer_depth):
        modules |= _prefixed(f"{ours}.blocks.{index}", f"{theirs}.transformer_blocks.{index}", TRANSFORMER_BLOCK)
    return modules


def _prefixed(ours: str, theirs: str, parts: NameMap) -> NameMap:
    return {f"{ours}.{name}": tuple(f"{theirs}.{part}" for part in their_parts) for name, their_parts in parts.items()}


def _tensor_names(modules: NameMap) -> NameMap:
    """Rows for the weight and the bias of every module; a residual block's second norm adds the first conv's bias."""
    names = {
        f"{name}.{leaf}": tuple(f"{part}.{leaf}" for part in parts)
        for name, parts in modules.items()
        for leaf in ("weight", "bias")
    }
    for name in [name for name in names if name.endswith(".conv1.bias")]:
        names[name.removesuffix("conv1.bias") + "norm2.channel_bias"] = names.pop(name)
    return names


# Modules of attention as diffusers named them before 0.15; published weights keep those names.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modern_attention_names(theirs: Mapping[str, Tensor]) -> LazyTensors:
    """Tensors of a model of diffusers under the names of today."""

    def rename(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        is_old = last in _OLD_ATTENTION and ".attentions." in name
        return f"{parent}.{_OLD_ATTENTION[last]}.{leaf}" if is_old else name

    return renamed(theirs, rename)
