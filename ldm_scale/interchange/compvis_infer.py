"""The YAML of a checkpoint that came without one, from its tensors alone: what they show, and never more.

Widths, depths, attention levels and the schedule stand in the tensors. Heads of attention layers do not, nor does what
the UNet predicts. Stable Diffusion's two architectures are recognised by all shapes of their UNet and by their text
encoder, which settles the heads; of the second, whose checkpoints predict eps or v, the user has to say which.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.compvis_names import COND_STAGE, FIRST_STAGE, UNET, shaped

_STABLE_WIDTHS = [320, 640, 1280, 1280]
_CONTEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
_CLIP = f"{COND_STAGE}transformer.text_model.embeddings.token_embedding.weight"
_OPEN_CLIP = f"{COND_STAGE}model.token_embedding.weight"
_SCALE = 0.18215  # of the autoencoder that both have


def inferred_model(
    state: Mapping[str, Tensor], path: str, prediction: str | None, resolution: int | None
) -> dict[str, Any]:
    """`model` as their YAML would have it.

    Raises: CheckpointError that names what the tensors do not show.
    """
    if any(name.startswith(UNET) for name in state):
        return _stable_diffusion(state, path, prediction, resolution)
    prefix = FIRST_STAGE if f"{FIRST_STAGE}encoder.conv_in.weight" in state else ""
    if f"{prefix}encoder.conv_in.weight" not in state or f"{prefix}decoder.conv_in.weight" not in state:
        raise CheckpointError(
            f"{path} holds neither a UNet ({UNET}*) nor an autoencoder (encoder.*, decoder.*): give a checkpoint of "
            "CompVis' or Stability's"
        )
    if resolution is None:
        raise CheckpointError(
            f"{path} has no YAML beside it, and no tensor shows at which resolution it was trained; give --config "
            "YAML, or --resolution PIXELS (256 for the published ones)"
        )
    return _autoencoder(state, prefix, resolution, path)


def _autoencoder(state: Mapping[str, Tensor], prefix: str, resolution: int, path: str) -> dict[str, Any]:
    def sizes(name: str, num_dims: int = 4) -> torch.Size:
        return shaped(state, f"{prefix}{name}", num_dims, path).shape

    levels = _count(state, f"{prefix}encoder.down.")
    base, in_channels = sizes("encoder.conv_in.weight")[:2]
    widths = [sizes(f"encoder.down.{i}.block.0.conv2.weight")[0] for i in range(levels)]
    attended = [i for i in range(levels) if f"{prefix}encoder.down.{i}.attn.0.q.weight" in state]
    has_middle = f"{prefix}encoder.mid.attn_1.q.weight" in state
    is_vq = f"{prefix}quantize.embedding.weight" in state
    z_channels = sizes("decoder.conv_in.weight")[1]
    has_post_quant = f"{prefix}post_quant_conv.weight" in state
    params: dict[str, Any] = {
        "embed_dim": sizes("post_quant_conv.weight")[1] if has_post_quant else z_channels,
        "ddconfig": {
            "attn_type": "vanilla" if has_middle else "none",
            "double_z": not is_vq,
            "z_channels": z_channels,
            "resolution": resolution,
            "in_channels": in_channels,
            "out_ch": sizes("decoder.conv_out.weight")[0],
            "ch": base,
            "ch_mult": [width // base for width in widths],
            "num_res_blocks": _count(state, f"{prefix}encoder.down.0.block."),
            "attn_resolutions": [resolution // 2**i for i in attended],
        },
    }
    if is_vq:
        params["n_embed"] = sizes("quantize.embedding.weight", 2)[0]
    name = "VQModel" if is_vq else "AutoencoderKL"
    return {"target": f"ldm.models.autoencoder.{name}", "params": params}


def _stable_diffusion(
    state: Mapping[str, Tensor], path: str, prediction: str | None, resolution: int | None
) -> dict[str, Any]:
    unet = _unet(state, path)
    first, second = _CLIP in state, _OPEN_CLIP in state
    if unet is None or not (first or second):
        raise CheckpointError(
            f"{path} has no YAML beside it, and is not of Stable Diffusion 1 or 2 by its shapes: no tensor shows the "
            "attention heads of other models; give --config YAML"
        )
    projection = f"{UNET}input_blocks.1.1.proj_in.weight"
    linear = projection in state and state[projection].ndim == 2
    if linear != second or unet["context_dim"] != (1024 if second else 768):
        raise CheckpointError(
            f"{path} has no YAML beside it, and mixes parts of Stable Diffusion 1 and 2: give --config YAML"
        )
    if second and (prediction is None or resolution is None):
        raise CheckpointError(
            f"{path} has no YAML beside it and is of Stable Diffusion 2, whose checkpoints predict eps at 512 pixels "
            "or v at "
            "768; give --config YAML, or --prediction eps --resolution 512, or --prediction v --resolution 768"
        )
    resolution = resolution or 512
    stage: dict[str, Any] = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    heads = {"num_heads": 8}
    if second:
        heads = {"num_head_channels": 64}
        params = {"arch": "ViT-H-14", "layer": "penultimate"}
        stage = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": params}
    inpaints = unet["in_channels"] == 9
    target = "LatentInpaintDiffusion" if inpaints else "LatentDiffusion"
    autoencoder = _autoencoder(state, FIRST_STAGE, 256, path)
    return {
        "target": f"ldm.models.diffusion.ddpm.{target}",
        "params": {
            **_schedule(state, path),
            "parameterization": prediction or "eps",
            "image_size": resolution // 8,
            "conditioning_key": "hybrid" if inpaints else "crossattn",
            "scale_factor": _SCALE,
            "unet_config": {
                "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                "params": unet | heads | {"use_linear_in_transformer": linear},
            },
            "first_stage_config": autoencoder,
            "cond_stage_config": stage,
        },
    }


def _unet(state: Mapping[str, Tensor], path: str) -> dict[str, Any] | None:
    """Parameters of Stable Diffusion's UNet, if its widths and its context stand there.

    All other shapes are compared afterwards, when the tensors are read.
    """
    names = [f"{UNET}input_blocks.{1 + 3 * level}.0.out_layers.3.weight" for level in range(4)]
    if not {f"{UNET}input_blocks.0.0.weight", _CONTEXT, *names} <= state.keys():
        return None
    conv_in, context = shaped(state, f"{UNET}input_blocks.0.0.weight", 4, path), shaped(state, _CONTEXT, 2, path)
    if [shaped(state, name, 4, path).shape[0] for name in names] != _STABLE_WIDTHS:
        return None
    return {
        "in_channels": conv_in.shape[1],
        "out_channels": 4,
        "model_channels": conv_in.shape[0],
        "attention_resolutions": [4, 2, 1],
        "num_res_blocks": 2,
        "channel_mult": [1, 2, 4, 4],
        "use_spatial_transformer": True,
        "transformer_depth": 1,
        "context_dim": context.shape[1],
    }


def _schedule(state: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """The published schedule; where the checkpoint keeps its betas, they are compared with it when it is read."""
    if "betas" not in state:
        return {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
    shaped(state, "betas", 1, path)
    betas = state["betas"]
    return {
        "linear_start": round(float(betas[0]), 9),
        "linear_end": round(float(betas[-1]), 9),
        "timesteps": len(betas),
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
