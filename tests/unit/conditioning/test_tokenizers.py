"""What tokens are, how captions that are too long end, and which vocabularies are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from transformers import BertTokenizer

from ldm_scale.conditioning.tokenizers import build_tokenizer, clip_tokenizer, wordpiece_tokenizer
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.errors import ConfigError

START, END = 49406, 49407
LONG = "a photograph of " + "one red apple beside two green pears and " * 10
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "##s", "!", ",", "table", "##ts")


@pytest.fixture
def vocabulary(tmp_path: Path) -> str:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n")
    return str(path)


@pytest.mark.parametrize("max_tokens", [3, 10, 77])
def test_byte_pairs_are_start_text_and_end_to_the_last_place(max_tokens: int) -> None:
    captions = ["", "a red apple", LONG, "ein Äpfel 🍎!"]
    tokens, was_cut = clip_tokenizer()(captions, max_tokens)
    assert tokens.shape == (4, max_tokens)
    assert tokens.dtype == torch.int64
    assert tokens[:, 0].tolist() == [START] * 4
    assert tokens[:, -1].tolist() == [END] * 4, "the end token is lost where a caption was cut"
    assert tokens[0, 1:].tolist() == [END] * (max_tokens - 1)
    for row, cut in zip(tokens.tolist(), was_cut, strict=True):
        end = row.index(END)
        assert set(row[end:]) == {END}
        assert START not in row[1:]
        assert not cut or end == max_tokens - 1
    assert was_cut == [False, max_tokens < 5, True, max_tokens < 7]


def test_byte_pairs_have_open_clips_numbers() -> None:
    theirs = SimpleTokenizer()
    captions = ["a red apple", "Grinning face with big eyes", "what?! ... 100% (sure)", LONG]
    for max_tokens in (8, 77):
        ours, _ = clip_tokenizer()(captions, max_tokens)
        expected = theirs(captions, max_tokens)
        # Theirs are filled with 0.
        assert torch.equal(torch.where(expected == 0, END, expected), ours)


def test_padding_with_zero_is_open_clips() -> None:
    """SD-2 was trained so."""
    captions = ["a red apple", "what?! ... 100% (sure)", LONG]
    ours, _ = build_tokenizer(TextConditioningConfig(padding="zero", max_tokens=9))(captions, 9)
    assert torch.equal(ours, SimpleTokenizer()(captions, 9))


def test_a_caption_that_just_fits_is_not_cut() -> None:
    caption = "one two three"
    assert len(SimpleTokenizer().encode(caption)) == 3
    assert [clip_tokenizer()([caption], n)[1] for n in (4, 5)] == [[True], [False]]


@pytest.mark.parametrize("max_tokens", [3, 7, 16])
def test_wordpieces_have_transformers_numbers(vocabulary: str, max_tokens: int) -> None:
    captions = ["", "A red apple!", "APPLES, tables and tablets", "äpple  red", "a [SEP] red", "red " * 20]
    theirs = BertTokenizer(vocab=vocabulary)(
        captions, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt"
    )
    ours, was_cut = wordpiece_tokenizer(vocabulary)(captions, max_tokens)
    assert torch.equal(ours, theirs.input_ids)
    assert was_cut[0] is False
    assert was_cut[-1] is True
    assert ours[0].tolist() == [2, 3, *[0] * (max_tokens - 2)]


def test_a_vocabulary_that_cannot_be_used_is_one_line(vocabulary: str, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("a\nred\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    cases = {
        None: "conditioning.text.vocabulary=null: conditioning.text.tokenizer=wordpiece needs the vocab.txt",
        str(tmp_path / "absent.txt"): "absent.txt: conditioning.text.tokenizer=wordpiece needs the vocab.txt",
        str(tmp_path / "words.txt"): "holds no line [PAD], [UNK], [CLS], [SEP]",
        str(tmp_path / "binary.txt"): "not a text file in UTF-8",
    }
    for path, message in cases.items():
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            build_tokenizer(TextConditioningConfig(tokenizer="wordpiece", vocabulary=path))
        assert "\n" not in str(caught.value)
    small = TextConditioningConfig(tokenizer="wordpiece", vocabulary=vocabulary, vocab_size=12)
    with pytest.raises(ConfigError, match=re.escape("numbers 13 tokens; set conditioning.text.vocab_size=13")):
        build_tokenizer(small)
