"""From configuration to tau_theta."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ldm_scale.conditioning.base import Condition, Conditioner
from ldm_scale.conditioning.classes import ClassCondition
from ldm_scale.conditioning.frozen_text import FrozenTextCondition
from ldm_scale.conditioning.inpainting import InpaintingCondition
from ldm_scale.conditioning.layout import LayoutCondition
from ldm_scale.conditioning.semantic_map import SemanticMapCondition
from ldm_scale.conditioning.super_resolution import LowResolutionCondition
from ldm_scale.conditioning.text import TextCondition
from ldm_scale.config.schema import ConditioningConfig

# One entry per section of ConditioningConfig.
_KINDS: dict[str, Callable[[Any, int], Condition]] = {
    "text": lambda section, latent_channels: TextCondition(section),
    "frozen_text": lambda section, latent_channels: FrozenTextCondition(section),
    "classes": lambda section, latent_channels: ClassCondition(section),
    "layout": lambda section, latent_channels: LayoutCondition(section),
    "semantic_map": lambda section, latent_channels: SemanticMapCondition(section),
    "low_resolution": lambda section, latent_channels: LowResolutionCondition(section),
    "inpainting": InpaintingCondition,
}


def build_conditioner(config: ConditioningConfig, latent_channels: int) -> Conditioner:
    """tau_theta of all sections that are not null, on the current default device."""
    sections = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return Conditioner(
        {name: _KINDS[name](section, latent_channels) for name, section in sections.items() if section is not None}
    )
