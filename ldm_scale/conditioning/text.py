"""Captions through a transformer that is trained jointly with the UNet.

`encoder: clip` is CLIP's text tower, so that an export is a `CLIPTextModel`; `encoder: bert` the paper's bidirectional
encoder (arXiv:2112.10752, appendix E.2.1), exported as diffusers' `LDMBertModel`. The context is the final norm's
output for all tokens; the null is the empty caption, as in SD-1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm_scale.conditioning.base import Condition, Conditions, Tools
from ldm_scale.conditioning.tokenizers import Tokenizer, build_tokenizer
from ldm_scale.conditioning.transformer import TokenTransformer
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.engine.copies import put_on
from ldm_scale.errors import ConfigError
from ldm_scale.telemetry.log import say_once

_MAX_CACHED = 100_000  # captions; bounds the memory of long runs over web captions


class TextCondition(Condition):
    """tau_theta for captions. `truncated` counts the captions that `prepare` had to cut so far."""

    role: ClassVar[Literal["context", "spatial"]] = "context"

    def __init__(self, config: TextConditioningConfig) -> None:
        super().__init__(config.width, config.drop_probability)
        self.config = config
        self.encoder = build_text_encoder(config)
        self.truncated = 0
        self._tokenizer: Tokenizer | None = None  # loaded on first use: counting parameters needs no vocabulary
        self._rows: dict[str, tuple[Tensor, bool]] = {}  # caption -> tokens, was cut

    @property
    def tokenizer(self) -> Tokenizer:
        """What numbers the captions.

        Raises: ConfigError if its vocabulary cannot be used.
        """
        if self._tokenizer is None:
            self._tokenizer = build_tokenizer(self.config)
        return self._tokenizer

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Tokens of captions, each tokenised once. Shapes: returns (len(captions), max_tokens) int64, on the CPU."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._rows]
        if new:
            if len(self._rows) > _MAX_CACHED:
                self._rows.clear()
                new = list(dict.fromkeys(captions))
            rows, was_cut = self.tokenizer(new, self.config.max_tokens)
            self._rows |= zip(new, zip(rows, was_cut, strict=True), strict=True)
        cut = [caption for caption in captions if self._rows[caption][1]]
        if cut:
            self.truncated += len(cut)
            warn_of_truncation(cut[0], self.config.max_tokens)
        return torch.stack([self._rows[caption][0] for caption in captions])

    def prepare(self, y: Conditions, tools: Tools) -> Tensor:
        """Tokens. Shapes: returns (B, max_tokens) int64."""
        return tools.put(self.tokens(require_captions(y)))

    def null(self, like: Tensor) -> Tensor:
        """Tokens of the empty caption."""
        return put_on(like.device, self.tokens([""])).expand_as(like)

    def example(self, num_images: int, size: tuple[int, int]) -> Tensor:
        """See `Condition.example`."""
        return torch.zeros(num_images, self.config.max_tokens, dtype=torch.int64)

    def forward(self, inputs: Tensor, size: tuple[int, int]) -> Tensor:
        """Context. Shapes: tokens (B, max_tokens) to (B, max_tokens, width)."""
        return self.encoder(inputs)  # type: ignore[no-any-return]


def build_text_encoder(config: TextConditioningConfig) -> TokenTransformer:
    """The transformer of a `text` section on the current default device."""
    is_clip = config.encoder == "clip"
    return TokenTransformer(
        config.vocab_size,
        config.max_tokens,
        config.width,
        config.depth,
        config.num_heads,
        config.head_dim,
        activation=config.activation,
        causal=is_clip,
        qkv_bias=is_clip,
    )


def require_captions(y: Conditions) -> Sequence[str]:
    """The captions of y.

    Raises: ConfigError without any.
    """
    if y.captions is None:
        raise ConfigError(
            "no captions: the model is conditioned on text; give one per image (the empty one stands for none)"
        )
    return y.captions


def warn_of_truncation(caption: str, max_tokens: int) -> None:
    """Nothing; says once a process that captions are cut, with an example."""
    say_once(
        "truncated captions",
        f"caption longer than the text encoder's {max_tokens} tokens, its end is not read: {caption[:60]!r}... "
        "(said once; all of them are counted)",
    )


def num_truncated(*encoders: object) -> int:
    """Captions and layouts that conditions and frozen encoders had to cut so far; others count none."""
    return sum(getattr(encoder, "truncated", 0) for encoder in encoders)
