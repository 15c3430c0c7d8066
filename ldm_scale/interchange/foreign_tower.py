"""CLIP's text tower in the words of transformers, wherever a configuration of it lies: what ours computes of it.

Also the guidance that models with a text encoder are sampled with, whichever program wrote them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ldm_scale.interchange.foreign_section import Section

Activation = Literal["gelu", "quick_gelu"]
ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
CLIP_ACTIVATION: Activation = "quick_gelu"  # of OpenAI's towers, and the default of transformers
CLIP_TOKENS = 77
WHO = "text encoders here have"
# Of the scripts that the models were published with (txt2img.py of either repository), which pipelines repeat for CLIP.
GUIDANCE_SCALES = {"clip": 7.5, "bert": 5.0}


def clip_section(path: Path, values: Mapping[str, Any]) -> Section:
    """The text tower in a configuration: of it alone, or of the model of texts and images that it is a half of."""
    section = Section.of_json(path, values)
    return section.section("text_config") if "text_config" in values else section


def clip_activation(section: Section) -> Activation:
    """The activation of a text tower that ours can be.

    Raises: CheckpointError that names the key in which ours computes something else.
    """
    width, ffn = section.integer("hidden_size", 512, at_least=1), section.integer("intermediate_size", 2048, at_least=1)
    if ffn != 4 * width:
        raise section.unheld("intermediate_size", 4 * width, WHO)
    section.require_equal(WHO, layer_norm_eps=1e-5, use_attention_mask=False)
    return section.choice("hidden_act", ACTIVATIONS, CLIP_ACTIVATION, who=WHO)
