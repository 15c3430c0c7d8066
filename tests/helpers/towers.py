"""A tiny text tower of OpenCLIP with random weights, so that nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import open_clip
import torch

from ldm_scale.config.schema import FrozenTextConditioningConfig

TINY_MODEL = "tiny-frozen-text"
_ARCHITECTURE = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 9, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3},
}


def tiny_tower(folder: Path, deviation: float | None = 0.2) -> FrozenTextConditioningConfig:
    """Its section; `folder` gets its weights. OpenCLIP knows the architecture from now on.

    `deviation` is that of all weights, so that none of them is 0 or 1; None leaves what OpenCLIP begins training with,
    where contexts have unit deviation and follow the captions' words.
    """
    (folder / f"{TINY_MODEL}.json").write_text(json.dumps(_ARCHITECTURE))
    open_clip.add_model_config(folder / f"{TINY_MODEL}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(TINY_MODEL)
    if deviation is not None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=deviation)
    torch.save(model.state_dict(), folder / "weights.pt")
    return FrozenTextConditioningConfig(TINY_MODEL, str(folder / "weights.pt"), "penultimate", 9, 16)
