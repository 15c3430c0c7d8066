"""Captions to token numbers: OpenCLIP's byte pairs, or WordPiece with a vocabulary of BERT's.

A caption becomes start token, its own tokens, end token, padding. What does not fit is cut before the end token, and
`Tokenizer` says which captions it cut: a prompt that loses its end in silence is a picture that nobody can explain.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.errors import ConfigError

_SPECIAL_WORDPIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Token numbers of captions."""

    encode: Callable[[str], list[int]]  # a caption's own tokens, without start and end
    start: int
    end: int
    padding: int
    num_tokens: int  # all numbers lie below

    def __call__(self, captions: Sequence[str], max_tokens: int) -> tuple[Tensor, list[bool]]:
        """Tokens of captions, and which captions were cut. Shapes: returns (len(captions), max_tokens) int64."""
        tokens = torch.full((len(captions), max_tokens), self.padding)
        was_cut = []
        for row, caption in zip(tokens, captions, strict=True):
            text = self.encode(caption)
            was_cut.append(len(text) > max_tokens - 2)
            text = [self.start, *text[: max_tokens - 2], self.end]
            row[: len(text)] = torch.tensor(text)
        return tokens, was_cut


def build_tokenizer(config: TextConditioningConfig) -> Tokenizer:
    """The tokenizer that the section names.

    Raises: ConfigError if its vocabulary cannot be read or has more tokens than the section's table.
    """
    is_clip = config.tokenizer == "clip"
    tokenizer = clip_tokenizer(config.padding) if is_clip else wordpiece_tokenizer(config.vocabulary)
    if tokenizer.num_tokens > config.vocab_size:
        raise ConfigError(
            f"conditioning.text.vocab_size={config.vocab_size}: the {config.tokenizer} tokenizer numbers "
            f"{tokenizer.num_tokens} tokens; set conditioning.text.vocab_size={tokenizer.num_tokens}"
        )
    return tokenizer


def copy_vocabulary(config: TextConditioningConfig, path: Path) -> None:
    """Nothing; `path` is a copy of the vocabulary, so that a model can leave the machine that it was trained on.

    Raises: ConfigError if it cannot be used.
    """
    build_tokenizer(config)
    assert config.vocabulary is not None, f"tokenizer={config.tokenizer} has no vocabulary of its own to copy"
    shutil.copyfile(config.vocabulary, path)


@cache
def clip_tokenizer(padding: Literal["end", "zero"] = "end") -> Tokenizer:
    """OpenCLIP's byte pairs.

    OpenCLIP fills with 0, which is also the token of "!"; filling with the end token, as SD-1 does, lets transformers'
    CLIPTokenizer give the same tokens for every caption.
    """
    byte_pairs = _open_clip_tokenizer().SimpleTokenizer()
    start, end = byte_pairs.sot_token_id, byte_pairs.eot_token_id
    return Tokenizer(byte_pairs.encode, start, end, end if padding == "end" else 0, byte_pairs.vocab_size)


def _open_clip_tokenizer() -> Any:
    """OpenCLIP's module of that name from its file alone: the package loads transformers and timm, 1.5 s of a start."""
    package = find_spec("open_clip")
    assert package is not None, "pyproject.toml asks for open_clip_torch"
    assert package.origin is not None, "a package with a file"
    spec = spec_from_file_location("ldm_scale_open_clip_tokenizer", Path(package.origin).with_name("tokenizer.py"))
    assert spec is not None, "a file of Python's"
    assert spec.loader is not None, "a file of Python's"
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def wordpiece_tokenizer(vocabulary: str | None) -> Tokenizer:
    """WordPiece of lower-cased text, as bert-base-uncased; `vocabulary` is the path of its vocab.txt.

    Raises: ConfigError if the file or the library that reads it is missing, or if the file is no such vocabulary.
    """
    key = f"conditioning.text.vocabulary={'null' if vocabulary is None else vocabulary}"
    if vocabulary is None or not Path(vocabulary).is_file():
        raise ConfigError(
            f"{key}: conditioning.text.tokenizer=wordpiece needs the vocab.txt of a BERT model, and no such file "
            "exists; set the path of the one of bert-base-uncased"
        )
    try:
        from tokenizers import BertWordPieceTokenizer
    except ImportError as error:
        raise ConfigError(
            "conditioning.text.tokenizer=wordpiece needs the package tokenizers, which is not installed; "
            "install it with `pip install -e .[interchange]`"
        ) from error
    try:
        words = Path(vocabulary).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: not a text file in UTF-8 ({error.reason}); give a vocab.txt") from error
    absent = [word for word in _SPECIAL_WORDPIECES if word not in words]
    if absent:
        raise ConfigError(f"{key}: holds no line {', '.join(absent)}; give a vocab.txt of BERT, one token a line")
    pieces = BertWordPieceTokenizer(vocabulary, lowercase=True)

    def encode(text: str) -> list[int]:
        ids: list[int] = pieces.encode(text, add_special_tokens=False).ids
        return ids

    padding, _, start, end = (words.index(word) for word in _SPECIAL_WORDPIECES)
    return Tokenizer(encode, start, end, padding, len(words))
