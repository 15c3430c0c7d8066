"""OpenCLIP's byte-pair vocabulary as the two files that transformers' `CLIPTokenizer` opens.

The numbers are the same, the texts before it are not always: OpenCLIP first repairs text (ftfy: curly quotes become
straight, ligatures and full-width letters plain, HTML entities characters), which `CLIPTokenizer` leaves out. Captions
that are already plain text give the same tokens in both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from open_clip.tokenizer import SimpleTokenizer

from ldm_scale.conditioning.tokenizers import clip_tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY_SIZE = 49408


def write_clip_tokenizer(folder: Path, max_tokens: int, padding: Literal["end", "zero"] = "end") -> None:
    """Nothing; the existing `folder` holds vocab.json, merges.txt and tokenizer_config.json."""
    tokenizer = SimpleTokenizer()
    vocabulary = dict(tokenizer.encoder)
    assert len(vocabulary) == VOCABULARY_SIZE, f"OpenCLIP's vocabulary has {len(vocabulary)} entries"
    # The same two tokens, under the names by which other software asks for them.
    numbers = {START: vocabulary.pop("<start_of_text>"), END: vocabulary.pop("<end_of_text>")}
    merges = [" ".join(pair) for pair, _ in sorted(tokenizer.bpe_ranks.items(), key=lambda item: item[1])]
    by_number = {number: token for token, number in (vocabulary | numbers).items()}
    filler = by_number[clip_tokenizer(padding).padding]
    (folder / "vocab.json").write_text(json.dumps(vocabulary | numbers, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": max_tokens,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": filler,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
