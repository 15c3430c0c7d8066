"""tau_theta for captions: causality, what tokens are, how captions that are too long end."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from ldm_scale.conditioning.build import build_conditioner
from ldm_scale.conditioning.text import END_TOKEN, TextEncoder, tokenize
from ldm_scale.config.schema import TextConditioningConfig

CONFIG = TextConditioningConfig(width=16, depth=3, num_heads=4, max_tokens=10)
START_TOKEN = 49406
LONG = "a photograph of " + "one red apple beside two green pears and " * 10


def test_a_token_is_not_seen_by_those_before_it() -> None:
    encoder = build_conditioner(CONFIG)
    tokens = torch.randint(0, CONFIG.vocab_size, (2, CONFIG.max_tokens))
    context = encoder(tokens)
    assert context.shape == (2, CONFIG.max_tokens, CONFIG.width)
    for place in range(CONFIG.max_tokens):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % CONFIG.vocab_size
        difference = (encoder(changed) - context).abs().amax(dim=-1)
        assert not difference[:, :place].any()
        assert difference[:, place:].min().item() > 0, "a later token does not see it"


def test_shorter_sequences_are_the_beginning_of_longer_ones() -> None:
    encoder = build_conditioner(CONFIG)
    tokens = torch.randint(0, CONFIG.vocab_size, (1, CONFIG.max_tokens))
    assert torch.allclose(encoder(tokens[:, :4]), encoder(tokens)[:, :4], atol=1e-5)


def test_positions_matter_and_the_output_is_normalised() -> None:
    encoder = build_conditioner(CONFIG)
    context = encoder(torch.full((1, CONFIG.max_tokens), 7))
    assert not torch.allclose(context[0, 3], context[0, 4], atol=1e-4)
    assert torch.allclose(context.mean(dim=-1), torch.zeros(1, CONFIG.max_tokens), atol=1e-5)
    assert torch.allclose(context.var(dim=-1, unbiased=False), torch.ones(1, CONFIG.max_tokens), atol=1e-3)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_every_parameter_has_a_gradient(activation: str) -> None:
    encoder = TextEncoder(dataclasses.replace(CONFIG, activation=activation))  # type: ignore[arg-type]
    encoder(torch.randint(0, CONFIG.vocab_size, (2, CONFIG.max_tokens))).square().mul(torch.randn(16)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_activation_is_the_configured_one() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    outputs = []
    for activation in ("gelu", "quick_gelu"):
        torch.manual_seed(0)
        outputs.append(TextEncoder(dataclasses.replace(CONFIG, activation=activation))(tokens))
    gelu, quick_gelu = outputs
    assert not torch.equal(gelu, quick_gelu)
    assert torch.allclose(gelu, quick_gelu, atol=0.1)


@pytest.mark.parametrize("max_tokens", [3, 10, 77])
def test_tokens_are_start_text_and_end_to_the_last_place(max_tokens: int) -> None:
    captions = ["", "a red apple", LONG, "ein Äpfel 🍎!"]
    tokens = tokenize(captions, max_tokens)
    assert tokens.shape == (4, max_tokens)
    assert tokens.dtype == torch.int64
    assert tokens[:, 0].tolist() == [START_TOKEN] * 4
    assert tokens[:, -1].tolist() == [END_TOKEN] * 4, "the end token is lost where a caption was cut"
    assert tokens[0, 1:].tolist() == [END_TOKEN] * (max_tokens - 1)
    for row in tokens.tolist():
        end = row.index(END_TOKEN)
        assert set(row[end:]) == {END_TOKEN}
        assert START_TOKEN not in row[1:]


def test_text_has_open_clips_numbers() -> None:
    tokenizer = SimpleTokenizer()
    for caption in ("a red apple", "Grinning face with big eyes", "what?! ... 100% (sure)", LONG):
        text = tokenizer.encode(caption)
        row = tokenize([caption], 77)[0].tolist()
        assert row[: row.index(END_TOKEN)] == [START_TOKEN, *text[:75]]


def test_a_caption_is_tokenised_alone() -> None:
    assert torch.equal(tokenize(["a", LONG], 12)[0], tokenize(["a"], 12)[0])
