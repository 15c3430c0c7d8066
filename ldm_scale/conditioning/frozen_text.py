"""Captions through the text tower of a trained OpenCLIP model, which stays as it is (as in SD-2).

The tower is no part of the trained model: `FrozenTextEncoder` stands beside it, is not sharded and has no gradients,
and its output, the context, is the condition's input. So the trained network has no parameters for this kind, and a
cache of latents may hold the contexts.

The null is the context of the empty caption. It is a function of the tower alone and therefore no buffer of the
trained model (ZeRO would have to shard it, checkpoints to store what the configuration says already): whoever opens the
tower or a cache hands it over with `set_null`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ldm_scale.conditioning.base import Condition, Conditions, Tools
from ldm_scale.conditioning.open_clip_models import load_open_clip
from ldm_scale.conditioning.text import require_captions, warn_of_truncation
from ldm_scale.conditioning.tokenizers import Tokenizer
from ldm_scale.config.schema import FrozenTextConditioningConfig
from ldm_scale.errors import ConfigError

_KEY = "conditioning.frozen_text"


class FrozenTextCondition(Condition):
    """tau_theta for captions that a frozen tower has turned into contexts."""

    role: ClassVar[Literal["context", "spatial"]] = "context"

    def __init__(self, config: FrozenTextConditioningConfig) -> None:
        super().__init__(config.width, config.drop_probability)
        self.config = config
        self._null: Tensor | None = None

    @property
    def has_null(self) -> bool:
        """Whether the context of the empty caption is known."""
        return self._null is not None

    def set_null(self, context: Tensor) -> None:
        """Nothing; `context` is that of the empty caption. Shapes: (1, max_tokens, width)."""
        self._require_shape(context)
        self._null = context.detach()

    def prepare(self, y: Conditions, tools: Tools) -> Tensor:
        """Contexts as they are, or of the captions. Shapes: returns (B, max_tokens, width)."""
        if y.text_contexts is not None:
            contexts = y.text_contexts
        elif tools.encode_text is None:
            raise ConfigError(
                f"{_KEY}: captions need the tower {self.config.model} ({self.config.weights}), and it is not loaded; "
                "give contexts (`ldm-scale encode --text-encoder` writes them), or load the model with its text encoder"
            )
        else:
            contexts = tools.encode_text(require_captions(y))
        self._require_shape(contexts)
        return tools.put(contexts).float()  # a cache holds float16

    def null(self, like: Tensor) -> Tensor:
        """The context of the empty caption."""
        if self._null is None:
            raise ConfigError(
                f"{_KEY}: contexts were given without that of the empty caption, which dropping and guidance need; "
                "hand it over with set_null, or load the model with its text encoder"
            )
        return self._null.to(like).expand_as(like)

    def example(self, num_images: int, size: tuple[int, int]) -> Tensor:
        """See `Condition.example`."""
        return torch.zeros(num_images, self.config.max_tokens, self.width)

    def forward(self, inputs: Tensor, size: tuple[int, int]) -> Tensor:
        """The context itself. Shapes: (B, max_tokens, width)."""
        return inputs

    def _require_shape(self, contexts: Tensor) -> None:
        expected = (self.config.max_tokens, self.config.width)
        if contexts.ndim != 3 or contexts.shape[1:] != expected:
            raise ConfigError(
                f"{_KEY}: contexts of shape {tuple(contexts.shape)}, where max_tokens and width say "
                f"(images, {expected[0]}, {expected[1]}); encode the captions with the tower of this configuration"
            )


class FrozenTextEncoder(nn.Module):
    """The tower of a `frozen_text` section, without gradients. `truncated` counts the captions that it has cut so far.

    Raises: ConfigError if OpenCLIP has no such tower, if its weights cannot be had, or if the section's sizes are not
    the tower's.
    """

    def __init__(self, config: FrozenTextConditioningConfig) -> None:
        super().__init__()
        self.config = config
        self.truncated = 0
        self.tokenizer = _load_tokenizer(config.model)
        self.tower: Any = _load_tower(config).eval().requires_grad_(False)
        found = tuple(int(getattr(self.tower, name)) for name in ("context_length", "width"))
        if found != (config.max_tokens, config.width):
            raise ConfigError(
                f"{_KEY}.max_tokens={config.max_tokens} and width={config.width}: the text tower of {config.model} has "
                f"{found[0]} tokens of width {found[1]}; set {_KEY}.max_tokens={found[0]} {_KEY}.width={found[1]}"
            )

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Contexts of captions, in the weights' type. Shapes: returns (len(captions), max_tokens, width)."""
        distinct = list(dict.fromkeys(captions))
        tokens, was_cut = self.tokenizer(distinct, self.config.max_tokens)
        cut = {caption for caption, is_cut in zip(distinct, was_cut, strict=True) if is_cut}
        if cut:
            self.truncated += sum(caption in cut for caption in captions)
            warn_of_truncation(next(iter(cut)), self.config.max_tokens)
        contexts: Tensor = self.tower.forward_intermediates(
            tokens.to(self.tower.positional_embedding.device),
            indices=[-1 if self.config.layer == "last" else -2],
            stop_early=True,
            normalize_intermediates=True,
            intermediates_only=True,
            output_fmt="NLC",
        )["text_intermediates"][0]
        rows = {caption: row for row, caption in enumerate(distinct)}
        return contexts[[rows[caption] for caption in captions]]


def _load_tokenizer(model: str) -> Tokenizer:
    """Byte pairs as the towers were trained with: filled with 0."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    if open_clip.get_model_config(model) is None:
        raise ConfigError(
            f"{_KEY}.model={model}: OpenCLIP has no architecture of that name; `python -c 'import open_clip; "
            "print(open_clip.list_models())'` lists them"
        )
    text = open_clip.get_model_config(model)["text_cfg"]
    if text.get("hf_tokenizer_name") or text.get("hf_model_name") or text.get("embed_cls"):
        raise ConfigError(
            f"{_KEY}.model={model}: its text tower is not CLIP's own with byte pairs; choose one that is, such as "
            "ViT-H-14 or ViT-L-14"
        )
    pairs: Any = SimpleTokenizer(**(text.get("tokenizer_kwargs") or {}))
    return Tokenizer(pairs.encode, pairs.sot_token_id, pairs.eot_token_id, 0, pairs.vocab_size)


def _load_tower(config: FrozenTextConditioningConfig) -> Any:
    """OpenCLIP's `TextTransformer` with the weights that the section names, on the CPU in fp32."""
    return load_open_clip(config.model, config.weights, f"{_KEY}.model", f"{_KEY}.weights").text
