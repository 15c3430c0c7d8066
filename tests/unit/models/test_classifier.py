"""The classifier of noised latents: its pooling, its shapes, and that time and every weight matter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from ldm_scale.config.schema import ClassifierConfig, Recomputation, UNetConfig
from ldm_scale.models.build import build_seeded
from ldm_scale.models.classifier import AttentionPool, LatentClassifier
from tests.helpers.runs import UNET, set_random_outputs

BODY = dataclasses.replace(UNET, attention="self")
CONFIGS = [BODY, dataclasses.replace(BODY, scale_shift_norm=True, residual_resampling=True, channel_multipliers=(1,))]


def _classifier(unet: UNetConfig = BODY) -> LatentClassifier:
    network = build_seeded(lambda: LatentClassifier(unet, ClassifierConfig(num_classes=5, pool_head_dim=8), 3), seed=1)
    set_random_outputs(network, seed=2)
    return network


def _inputs(side: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 400, 999])


def test_pooling_is_multi_head_attention_of_the_mean() -> None:
    pool = build_seeded(lambda: AttentionPool(12, head_dim=4), seed=4).double()
    reference = nn.MultiheadAttention(12, num_heads=3, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([pool.to_q.weight, pool.to_kv.weight]))
        reference.in_proj_bias.copy_(torch.cat([pool.to_q.bias, pool.to_kv.bias]))
        reference.out_proj.weight.copy_(torch.eye(12))
        reference.out_proj.bias.zero_()
    x = torch.randn(2, 12, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    tokens = x.flatten(2).transpose(1, 2)
    mean = x.mean(dim=(2, 3))[:, None]
    expected, _ = reference(mean, torch.cat([mean, tokens], dim=1), torch.cat([mean, tokens], dim=1))
    torch.testing.assert_close(pool(x), expected[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unet", CONFIGS)
@pytest.mark.parametrize("side", [8, 12])
def test_logits_of_any_size_depend_on_latents_and_time(unet: UNetConfig, side: int) -> None:
    network = _classifier(unet)
    z, t = _inputs(side)
    logits = network(z, t)
    assert logits.shape == (3, 5)
    for other in (network(z, t.flip(0)), network(z.flip(0), t)):
        assert (other[0] - logits[0]).abs().max() > 1e-4
    torch.testing.assert_close(network(z[1:], t[1:]), logits[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unet", CONFIGS)
def test_every_weight_has_a_gradient_with_activations_kept_or_not(unet: UNetConfig) -> None:
    z, t = _inputs()
    gradients = []
    modes: tuple[Recomputation, ...] = ("none", "selective", "full")
    for again in modes:
        network = _classifier(unet)
        network.body.checkpoint_activations = again
        nn.functional.cross_entropy(network(z, t), torch.tensor([0, 3, 4])).backward()
        found = {name: parameter.grad for name, parameter in network.named_parameters()}
        missing = [name for name, grad in found.items() if grad is None or not grad.any()]
        assert not missing
        gradients.append(found)
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
