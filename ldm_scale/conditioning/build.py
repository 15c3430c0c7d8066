"""From configuration to tau_theta."""

from __future__ import annotations

from ldm_scale.conditioning.text import TextEncoder
from ldm_scale.config.schema import TextConditioningConfig


def build_conditioner(config: TextConditioningConfig) -> TextEncoder:
    """Text encoder on the current default device."""
    return TextEncoder(config)
