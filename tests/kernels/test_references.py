"""The plain definitions of the fused operations against their formulas, written out in float64 numpy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm_kernels.attention.reference import attention
from ldm_kernels.ema_update.reference import ema_update
from ldm_kernels.geglu.reference import geglu
from ldm_kernels.group_norm_silu.reference import group_norm_silu

Array = np.ndarray[Any, np.dtype[np.float64]]
OPTIONAL = ("channel_bias", "sample_shift", "scale", "shift")


def _array(x: Tensor) -> Array:
    return x.double().numpy()


def _group_norm(x: Array, groups: int, eps: float) -> Array:
    """arXiv:1803.08494, eq. 1, one group at a time."""
    y = np.empty_like(x)
    size = x.shape[1] // groups
    for n, g in itertools.product(range(x.shape[0]), range(groups)):
        part = x[n, g * size : (g + 1) * size]
        y[n, g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + eps)
    return y


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("given", [s for n in range(5) for s in itertools.combinations(OPTIONAL, n)])
def test_group_norm_silu(given: tuple[str, ...], activation: Any) -> None:
    batch, channels, groups, eps = 3, 6, 2, 0.1  # an eps that shows
    x = torch.randn(batch, channels, 5, 4) * 0.5 + 2
    weight, bias = torch.randn(channels), torch.randn(channels)
    values = {
        "channel_bias": torch.randn(channels),
        "sample_shift": torch.randn(batch, channels),
        "scale": torch.randn(batch, channels),
        "shift": torch.randn(batch, channels),
    }
    optional = {name: values[name] for name in given}
    a = {name: _array(value) for name, value in optional.items()}

    moved = _array(x)
    if "channel_bias" in a:
        moved = moved + a["channel_bias"].reshape(1, -1, 1, 1)
    if "sample_shift" in a:
        moved = moved + a["sample_shift"].reshape(batch, -1, 1, 1)
    expected = _group_norm(moved, groups, eps) * _array(weight).reshape(1, -1, 1, 1) + _array(bias).reshape(1, -1, 1, 1)
    if "scale" in a:
        expected = expected * (1 + a["scale"].reshape(batch, -1, 1, 1))
    if "shift" in a:
        expected = expected + a["shift"].reshape(batch, -1, 1, 1)
    if activation == "silu":
        expected = expected / (1 + np.exp(-expected))

    for memory_format in (torch.contiguous_format, torch.channels_last):
        laid_out = x.contiguous(memory_format=memory_format)
        actual = group_norm_silu(laid_out, groups, weight, bias, eps, activation, **optional)
        np.testing.assert_allclose(_array(actual), expected, rtol=1e-4, atol=1e-5)
        assert actual.is_contiguous(memory_format=memory_format)


def test_group_norm_silus_defaults_are_silu_and_1e_5() -> None:
    x, one, zero = torch.randn(1, 4, 2, 2) * 1e-3, torch.ones(4), torch.zeros(4)
    normalised = _group_norm(_array(x), 2, 1e-5)
    expected = normalised / (1 + np.exp(-normalised))
    np.testing.assert_allclose(_array(group_norm_silu(x, 2, one, zero)), expected, rtol=1e-4, atol=1e-6)


def test_geglu_gates_with_the_exact_gelu() -> None:
    projection = torch.cat([torch.randn(2, 3, 50), torch.linspace(-6, 6, 50).expand(2, 3, 50)], dim=-1)
    value, gate = np.split(_array(projection), 2, axis=-1)
    erf = np.vectorize(math.erf)
    expected = value * gate * 0.5 * (1 + erf(gate / math.sqrt(2)))
    approximate = value * gate * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    actual = _array(geglu(projection))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(approximate - expected).max() > 1e-4, "the two forms of gelu cannot be told apart here"


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("keys", [5, 9])
def test_attention(scale: float | None, keys: int) -> None:
    tokens = torch.randn(2, 5, 3, 4, 8)  # (B, T, qkv, heads, head_dim), as one projection gives them
    q = tokens.permute(2, 0, 3, 1, 4)[0]
    k, v = torch.randn(2, 2, keys, 4, 8).transpose(2, 3).unbind(0)
    logits = np.einsum("bhqd,bhkd->bhqk", _array(q), _array(k)) * (scale or 1 / math.sqrt(8))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    expected = np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(axis=-1, keepdims=True), _array(v))
    np.testing.assert_allclose(_array(attention(q, k, v, scale=scale)), expected, rtol=1e-4, atol=1e-5)


def test_attention_survives_large_logits() -> None:
    q = torch.full((1, 1, 1, 4), 100.0)
    k = torch.stack([torch.full((4,), 100.0), torch.full((4,), -100.0)])[None, None]
    v = torch.tensor([[1.0], [2.0]])[None, None].expand(1, 1, 2, 4)
    assert attention(q, k, v).tolist() == [[[[1.0] * 4]]]


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999999, 1.0])
def test_ema_update(decay: float) -> None:
    shapes = [(3,), (2, 5), (1,), (7, 1, 2)]
    averages, weights = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]
    expected = [decay * _array(a) + (1 - decay) * _array(w) for a, w in zip(averages, weights, strict=True)]
    before = [weight.clone() for weight in weights]
    places = [average.data_ptr() for average in averages]
    ema_update(averages, weights, decay)
    for average, value in zip(averages, expected, strict=True):
        np.testing.assert_allclose(_array(average), value, rtol=1e-6, atol=1e-7)
    assert [average.data_ptr() for average in averages] == places, "the averages must change in place"
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_ema_update_takes_slices_of_a_flat_tensor() -> None:
    # As a sharded optimizer's masters are.
    flat, weights = torch.zeros(10), torch.ones(10)
    ema_update([flat[2:5], flat[7:]], [weights[2:5], weights[7:]], 0.5)
    assert flat.tolist() == [0, 0, 0.5, 0.5, 0.5, 0, 0, 0.5, 0.5, 0.5]
