"""transformers' CLIPTokenizer, opened on the exported files, numbers captions as our tokenizer does."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from ldm_scale.conditioning.tokenizers import build_tokenizer, clip_tokenizer
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.interchange.clip_tokenizer import write_clip_tokenizer

CAPTIONS = [
    "",
    " ",
    "a cat",
    "A Red Apple, on a WHITE plate.",
    "it's the dog's; they'll say we've won, I'm sure you'd agree they're right",
    "1 2 34 3.14 1,000,000 2nd 7x",
    "tab\tnew\nline   many    spaces ",
    "punctuation: (a) [b] {c} <d> #e @f $g %h ^i &j *k ~l `m \\n |o / p + q = r _ s - t ; u ? v",
    "naïve café Ünïcödé Straße ÀÉÎ",
    "e\u0301 and a\u0308 combined from two code points",
    "日本語のテキスト 한국어 中文",
    "Привет, мир ЁЛКА",
    "हिन्दी ไทย العربية ١٢٣ עברית",
    "emoji 😀 👍🏽 👨‍👩‍👧 🇨🇮 ❤️",
    "a\u00a0no-break space",
    "x² + ½ = ∞ → ≠",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
    "A" * 500,
    "one " * 100,
    "very long caption, with commas, and more of them " * 20,
    "dash - en dash \u2013 em dash \u2014 ellipsis \u2026",
    *string.ascii_letters,
    *string.digits,
    *(c for c in string.punctuation if c != "!"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_clip_tokenizer(path, 77)
    return path


def numbers(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    # The call that StableDiffusionPipeline makes.
    encoded = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    result: torch.Tensor = encoded.input_ids
    return result


def test_captions_have_our_numbers(folder: Path) -> None:
    theirs = numbers(CLIPTokenizer.from_pretrained(folder), CAPTIONS)
    ours, _ = clip_tokenizer()(CAPTIONS, 77)
    different = [caption for caption, a, b in zip(CAPTIONS, ours, theirs, strict=True) if not torch.equal(a, b)]
    assert different == []


def test_exclamation_marks_have_our_numbers(folder: Path) -> None:
    captions = ["!", "wow!", "wow !!! so (great)!?", "a!b"]
    assert torch.equal(numbers(CLIPTokenizer.from_pretrained(folder), captions), clip_tokenizer()(captions, 77)[0])


def test_settings(folder: Path, tmp_path: Path) -> None:
    tokenizer: Any = CLIPTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (49406, 49407)
    assert tokenizer.pad_token_id == clip_tokenizer().padding
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    tokenizer.save_pretrained(tmp_path)
    saved = CLIPTokenizer.from_pretrained(tmp_path)
    assert torch.equal(numbers(saved, CAPTIONS), numbers(tokenizer, CAPTIONS))


def test_padding_with_zero(tmp_path: Path) -> None:
    """Captions with exclamation marks are left out: to `CLIPTokenizer` every one of them is padding then."""
    captions = [caption for caption in CAPTIONS if "!" not in caption]
    write_clip_tokenizer(tmp_path, 20, "zero")
    theirs = numbers(CLIPTokenizer.from_pretrained(tmp_path), captions)
    ours, _ = build_tokenizer(TextConditioningConfig(padding="zero"))(captions, 20)
    assert torch.equal(theirs, ours)


def test_other_lengths(tmp_path: Path) -> None:
    write_clip_tokenizer(tmp_path, 12)
    theirs = numbers(CLIPTokenizer.from_pretrained(tmp_path), CAPTIONS)
    assert torch.equal(theirs, clip_tokenizer()(CAPTIONS, 12)[0])
