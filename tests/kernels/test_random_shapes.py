"""Every fused operation at random shapes, types, layouts and options, against float64.

Each draw follows from its number alone, so a failure is repeated by its test's name. On a GPU there are 200 draws an
operation; the interpreter takes a few small ones, to keep this file alive.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_kernels import attention, ema_update, geglu, group_norm_silu, vector_quantize
from ldm_kernels.attention.reference import attention as plain_attention
from ldm_kernels.geglu.reference import geglu as plain_geglu
from ldm_kernels.group_norm_silu.reference import group_norm_silu as plain_group_norm_silu
from tests.helpers.kernels import FLOAT_DTYPES, RMSE_BOUNDS, gradients, gradients_in_float64

ON_GPU = torch.cuda.is_available()
DRAWS = range(200 if ON_GPU else 4)
OPTIONAL = ("channel_bias", "sample_shift", "scale", "shift")


class Draw:
    """Random choices and tensors of one test."""

    def __init__(self, operation: str, number: int, device: str) -> None:
        self.choices = random.Random(f"{operation} {number}")
        self.generator = torch.Generator(device).manual_seed(self.choices.getrandbits(32))
        self.device = device
        self.dtype: torch.dtype = self.choices.choice(FLOAT_DTYPES)

    def size(self, on_gpu: int, interpreted: int) -> int:
        """Between 1 and the limit, small sizes as likely as large ones."""
        limit = on_gpu if ON_GPU else interpreted
        return min(limit, int(limit ** self.choices.random()) + self.choices.randrange(3))

    def tensor(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, generator=self.generator, device=self.device).to(dtype or self.dtype)


def _compare(function: Any, plain: Any, inputs: dict[str, Tensor], grad_output: Tensor) -> None:
    """Output and gradients of both against float64."""
    values = list(inputs.values())
    ours = gradients(function, values, grad_output)
    same_type = gradients(plain, values, grad_output)
    exact = gradients_in_float64(plain, values, grad_output)
    for name, *results in zip(
        ("output", *inputs), *((output, *found) for output, found in (ours, same_type, exact)), strict=True
    ):
        _assert_close(name, *results)


def _assert_close(name: str, actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Error at most twice that of plain torch (the largest one four times), and within the type's bound.

    Rounding to the type is granted besides, and in fp32 a little more, since a matrix product there is three products
    of TF32. A few elements plain torch may hit by luck: there the bound alone counts.
    """
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype} instead of {plain.dtype}"
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    rounding = torch.finfo(actual.dtype).eps * (8 if actual.dtype == torch.float32 else 1)
    ours, theirs = ((x.double() - exact).abs() for x in (actual, plain))
    assert ours.isfinite().all(), f"{name}: {int((~ours.isfinite()).sum())} elements are not finite"
    for norm, factor in ((torch.linalg.vector_norm, 2), (torch.amax, 4)) if exact.numel() >= 32 else ():
        limit = factor * norm(theirs) + rounding * norm(exact.abs())
        assert norm(ours) <= limit, f"{name}: error {float(norm(ours)):.3g} over {float(limit):.3g}"
    bound = max(RMSE_BOUNDS[actual.dtype], rounding) * torch.linalg.vector_norm(exact)
    limit = torch.maximum(bound, torch.linalg.vector_norm(theirs))  # plain torch may be worse where gradients cancel
    assert torch.linalg.vector_norm(ours) <= limit, f"{name}: error {float(ours.norm()):.3g} over {float(limit):.3g}"


@pytest.mark.parametrize("number", DRAWS)
def test_group_norm_silu(number: int, device: str) -> None:
    draw = Draw("group_norm_silu", number, device)
    choices = draw.choices
    groups = choices.choice([1, 2, 4, 8, 16, 32] if ON_GPU else [1, 2, 4])
    channels = groups * draw.size(60, 6)
    height, width = draw.size(48, 5), draw.size(48, 5)
    batch = draw.size(6, 2)
    # A group of a few elements has a variance that no type resolves.
    while channels // groups * height * width < 16:
        height += 2
    x = choices.choice([0.0, -2.3, 10.0]) + 0.5 * draw.tensor(batch, channels, height, width, dtype=torch.float32)
    inputs = {"x": x.to(draw.dtype)}
    grad_output = draw.tensor(batch, channels, height, width)
    if choices.random() < 0.7:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    if choices.random() < 0.7:
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    weight_dtype = choices.choice([draw.dtype, torch.float32])
    inputs["weight"] = 1 + 0.2 * draw.tensor(channels, dtype=weight_dtype)
    inputs["bias"] = 0.2 * draw.tensor(channels, dtype=weight_dtype)
    # A shift of a group's only channel is normalised away: its gradient is zero but for rounding.
    absorbed = ("channel_bias", "sample_shift") if channels == groups else ()
    given = [name for name in OPTIONAL if choices.random() < 0.4 and name not in absorbed]
    for name in given:
        size = (channels,) if name == "channel_bias" else (batch, channels)
        inputs[name] = 0.3 * draw.tensor(*size)
    activation = choices.choice(["silu", None])

    def with_options(function: Any, **backend: str) -> Any:
        def run(x: Tensor, weight: Tensor, bias: Tensor, *values: Tensor) -> Tensor:
            optional = dict(zip(given, values, strict=True))
            result: Tensor = function(x, groups, weight, bias, 1e-5, activation, **optional, **backend)
            return result

        return run

    function = with_options(group_norm_silu, backend="triton")
    _compare(function, with_options(_plain_group_norm_silu), inputs, grad_output)


def _plain_group_norm_silu(x: Tensor, groups: int, weight: Tensor, bias: Tensor, *options: Any, **given: Any) -> Tensor:
    """torch's operator wants weights of x's type; rounding them to it is what plain torch would do."""
    y = plain_group_norm_silu(x, groups, weight.to(x.dtype), bias.to(x.dtype), *options, **given)
    return y.to(x.dtype)


@pytest.mark.parametrize("number", DRAWS)
def test_attention(number: int, device: str) -> None:
    draw = Draw("attention", number, device)
    choices = draw.choices
    batch, heads = draw.size(4, 2), draw.size(8, 2)
    queries = draw.size(700, 40)
    keys = choices.choice([queries, draw.size(128, 20), draw.size(700, 40)])
    head_dim = choices.choice([8, 16, 32, 40, 64, 72, 80, 96, 128, draw.size(128, 32)] if ON_GPU else [8, 16, 20])
    inputs = {
        name: draw.tensor(batch, tokens, heads, head_dim).transpose(1, 2)
        for name, tokens in (("q", queries), ("k", keys), ("v", keys))
    }
    grad_output = draw.tensor(batch, queries, heads, head_dim).transpose(1, 2)
    _compare(lambda q, k, v: attention(q, k, v, backend="triton"), plain_attention, inputs, grad_output)


@pytest.mark.parametrize("number", DRAWS)
def test_geglu(number: int, device: str) -> None:
    draw = Draw("geglu", number, device)
    rows, width = (draw.size(5, 2), draw.size(500, 10)), draw.size(3000, 40)
    inputs = {"projection": draw.tensor(*rows, 2 * width)}
    _compare(lambda x: geglu(x, backend="triton"), plain_geglu, inputs, draw.tensor(*rows, width))


@pytest.mark.parametrize("number", DRAWS)
def test_vector_quantize(number: int, device: str) -> None:
    draw = Draw("vector_quantize", number, device)
    vectors, codes, dim = draw.size(5000, 40), draw.size(5000, 40), draw.size(80, 8)
    z, codebook = draw.tensor(vectors, dim), draw.tensor(codes, dim)
    quantized, indices = vector_quantize(z, codebook, backend="triton")
    assert torch.equal(quantized, codebook[indices])
    distances = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = distances.gather(1, indices[:, None])[:, 0]
    nearest = distances.amin(1)
    # Two codes can be nearer to one another than fp32 tells apart.
    assert (chosen <= nearest * (1 + 1e-5) + 1e-5).all()


@pytest.mark.parametrize("number", DRAWS)
def test_ema_update(number: int, device: str) -> None:
    draw = Draw("ema_update", number, device)
    sizes = [draw.size(200_000, 600) for _ in range(draw.size(40, 4))]
    decays = [draw.choices.choice([0.0, 0.5, 0.999, 0.9999, 1.0]) for _ in range(draw.choices.randint(1, 4))]
    weights = [draw.tensor(size, dtype=torch.float32) for size in sizes]
    averages = [[draw.tensor(size, dtype=torch.float32) for size in sizes] for _ in decays]
    before = [[average.clone() for average in group] for group in averages]
    ema_update(averages, weights, decays, backend="triton")
    for group, old, decay in zip(averages, before, decays, strict=True):
        for average, start, weight in zip(group, old, weights, strict=True):
            exact = decay * start.double() + (1 - decay) * weight.double()
            assert ((average.double() - exact).abs() <= 4e-7 * (start.double().abs() + weight.double().abs())).all()
