"""The frozen text tower of a model, from OpenCLIP's names to those of our own text encoder, which exports know.

A tower up to its penultimate layer is one of a layer less: the last norm follows either (as in Stable Diffusion 2,
whose published text encoder has 23 of 24 layers).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm_scale.conditioning.frozen_text import FrozenTextEncoder
from ldm_scale.config.schema import FrozenTextConditioningConfig, TextConditioningConfig
from ldm_scale.errors import CheckpointError

_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
# OpenCLIP's modules of a block -> ours.
_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "attn.in_proj_weight": "attention.to_qkv.weight",
    "attn.in_proj_bias": "attention.to_qkv.bias",
    "attn.out_proj.weight": "attention.to_out.weight",
    "attn.out_proj.bias": "attention.to_out.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp_in.weight",
    "mlp.c_fc.bias": "mlp_in.bias",
    "mlp.c_proj.weight": "mlp_out.weight",
    "mlp.c_proj.bias": "mlp_out.bias",
}
_OTHERS = {
    "token_embedding.weight": "encoder.token_embedding.weight",
    "positional_embedding": "encoder.position_embedding",
    "ln_final.weight": "encoder.norm_out.weight",
    "ln_final.bias": "encoder.norm_out.bias",
}


def tower_as_text(section: FrozenTextConditioningConfig) -> tuple[TextConditioningConfig, dict[str, Tensor]]:
    """The section and the tensors of a `TextCondition` that computes what the tower of `section` does.

    Raises: ConfigError if the tower cannot be had; CheckpointError if it is not one of CLIP's own kind.
    """
    tower: Any = FrozenTextEncoder(section).tower
    blocks = tower.transformer.resblocks
    depth = len(blocks) - (section.layer == "penultimate")
    theirs = tower.state_dict()
    names = dict(_OTHERS)
    for index in range(depth):
        ours = f"encoder.blocks.{index}"
        names |= {f"transformer.resblocks.{index}.{their}": f"{ours}.{our}" for their, our in _BLOCK.items()}
    activation = _ACTIVATIONS.get(type(blocks[0].mlp.gelu).__name__) if hasattr(blocks[0].mlp, "gelu") else None
    absent = [name for name in names if name not in theirs]
    if absent or activation is None or theirs["transformer.resblocks.0.mlp.c_fc.bias"].shape[0] != 4 * section.width:
        raise CheckpointError(
            f"conditioning.frozen_text.model={section.model}: its blocks are not those of CLIPTextModel "
            f"({absent[0] if absent else 'another feed-forward network'}); export with --to safetensors"
        )
    text = TextConditioningConfig(
        vocab_size=tower.token_embedding.num_embeddings,
        padding="zero",
        max_tokens=section.max_tokens,
        width=section.width,
        depth=depth,
        num_heads=blocks[0].attn.num_heads,
        activation=activation,  # type: ignore[arg-type]
        drop_probability=section.drop_probability,
    )
    return text, {ours: theirs[name].to(torch.float32) for name, ours in names.items()}
