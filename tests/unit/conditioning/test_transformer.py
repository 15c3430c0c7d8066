"""The transformer over tokens: who sees whom, and what its two published layouts are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from ldm_scale.conditioning.transformer import TokenTransformer

NUM_TOKENS, MAX_TOKENS, WIDTH = 50, 10, 16


def make(**options: Any) -> TokenTransformer:
    torch.manual_seed(0)
    return TokenTransformer(NUM_TOKENS, MAX_TOKENS, WIDTH, 3, 4, **options)


def tokens(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, NUM_TOKENS, (batch, MAX_TOKENS), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("causal", [False, True])
def test_who_sees_a_token(causal: bool) -> None:
    encoder, x = make(causal=causal), tokens()
    y = encoder(x)
    assert y.shape == (2, MAX_TOKENS, WIDTH)
    for place in range(MAX_TOKENS):
        changed = x.clone()
        changed[:, place] = (changed[:, place] + 1) % NUM_TOKENS
        seen = (encoder(changed) - y).abs().amax(dim=(0, 2)) > 0
        assert seen.tolist() == [not causal or other >= place for other in range(MAX_TOKENS)]


def test_shorter_causal_sequences_are_the_beginning_of_longer_ones() -> None:
    encoder, x = make(causal=True), tokens()
    assert torch.allclose(encoder(x[:, :4]), encoder(x)[:, :4], atol=1e-5)


def test_positions_matter_and_the_output_is_normalised() -> None:
    context = make()(torch.full((1, MAX_TOKENS), 7))
    assert not torch.allclose(context[0, 3], context[0, 4], atol=1e-4)
    assert torch.allclose(context.mean(dim=-1), torch.zeros(1, MAX_TOKENS), atol=1e-5)
    assert torch.allclose(context.var(dim=-1, unbiased=False), torch.ones(1, MAX_TOKENS), atol=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "qkv_bias": True, "activation": "quick_gelu"}, {"head_dim": 6}]
)
def test_every_parameter_has_a_gradient(options: dict[str, Any]) -> None:
    encoder = make(**options)
    (encoder(tokens()).square() * torch.randn(WIDTH)).sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_activations_differ_and_are_near() -> None:
    gelu, quick_gelu = (make(activation=name)(tokens()) for name in ("gelu", "quick_gelu"))
    assert not torch.equal(gelu, quick_gelu)
    assert torch.allclose(gelu, quick_gelu, atol=0.1)


def test_the_width_of_heads_is_free() -> None:
    attention = make(head_dim=6).blocks[0].attention
    assert attention.to_qkv.weight.shape == (3 * 4 * 6, WIDTH)
    assert attention.to_qkv.bias is None
    assert attention.to_out.weight.shape == (WIDTH, 4 * 6)


def test_the_papers_encoder_has_its_size() -> None:
    # The defaults of LDMBertConfig are those of the released text-to-image model; its head for tokens never runs.
    with torch.device("meta"):
        ours = TokenTransformer(30522, 77, 1280, 32, 8, 64)
        theirs = LDMBertModel(LDMBertConfig())
    unused = sum(p.numel() for p in theirs.to_logits.parameters())
    assert num_parameters(ours) == num_parameters(theirs) - unused == 542_895_360
    # With it and the UNet's 872.3M: Table 15 of arXiv:2112.10752 prints 1.45B.
    assert (num_parameters(theirs) + 872.3e6) / 1e9 == pytest.approx(1.45, abs=0.005)


def num_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
