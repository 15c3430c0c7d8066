"""Whose contexts of captions a latent cache holds, and whether they are those that training would compute."""

from __future__ import annotations

import torch

from ldm_scale.conditioning.frozen_text import FrozenTextEncoder
from ldm_scale.config.schema import FrozenTextConditioningConfig
from ldm_scale.data.latents import CachedText
from ldm_scale.errors import ConfigError
from ldm_scale.interchange.safetensors_io import tensors_sha256


def open_text_encoder(model: str, weights: str, layer: str) -> FrozenTextEncoder:
    """The tower of an architecture of OpenCLIP, of whatever sizes it has.

    Raises: ConfigError as `FrozenTextEncoder`.
    """
    import open_clip  # takes seconds, and only caches of contexts need it

    text = (open_clip.get_model_config(model) or {}).get("text_cfg", {})
    assert layer in ("last", "penultimate"), layer
    return FrozenTextEncoder(
        FrozenTextConditioningConfig(
            model,
            weights,
            layer,  # type: ignore[arg-type]
            max_tokens=text.get("context_length", 77),
            width=text.get("width", 512),
        )
    )


def describe_text(encoder: FrozenTextEncoder) -> CachedText:
    """The provenance of contexts that the encoder computes; it must be as it was opened, in fp32."""
    config, state = encoder.config, encoder.tower.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state.values()), "the digest is that of the weights in fp32"
    return CachedText(config.model, tensors_sha256(state), config.layer, config.max_tokens, config.width)


def check_text_fits(cached: CachedText, encoder: FrozenTextEncoder, manifest: str) -> None:
    """Nothing, if the contexts of a cache are those of the encoder.

    Raises: ConfigError that names both sides.
    """
    ours = describe_text(encoder)
    if cached == ours:
        return
    raise ConfigError(
        f"data.manifest={manifest} holds contexts of {_words(cached)}, conditioning.frozen_text is {_words(ours)}; "
        "give the encoder that the cache was made with, or encode anew with `ldm-scale encode --text-encoder`"
    )


def _words(text: CachedText) -> str:
    return f"{text.model} (weights {text.weights_sha256[:12]}, {text.layer} layer, {text.max_tokens} x {text.width})"
