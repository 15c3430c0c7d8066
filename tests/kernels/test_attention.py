"""The attention kernels against float64, and what else they owe: see test_attention_op.py for how they are reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_kernels.attention import op, reference, tables
from ldm_kernels.common import launch
from tests.helpers.kernels import FLOAT_DTYPES, assert_close_to_float64, gradients, gradients_in_float64

NAMES = ("out", "dq", "dk", "dv")


def _tensor(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """(B, heads, tokens, head_dim) as a view of (B, tokens, heads, head_dim), as a projection gives it."""
    batch, heads, tokens, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, tokens, heads, head_dim, generator=generator)
    return values.to(device, dtype).transpose(1, 2)


def _inputs(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype, device: str, batch: int = 1, heads: int = 2
) -> list[Tensor]:
    """q, k, v and the gradient of the result."""
    q, g = (_tensor(batch, heads, queries, head_dim, dtype=dtype, device=device, seed=s) for s in (0, 1))
    k, v = (_tensor(batch, heads, keys, head_dim, dtype=dtype, device=device, seed=s) for s in (2, 3))
    return [q, k, v, g]


def _self(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The kernels for any number of keys, whatever the dispatch would take."""
    out: Tensor = op.attention_fwd(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)[0]
    return out


def _cross(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    out: Tensor = op.cross_attention_fwd(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    return out


def _check(
    kernel: Callable[..., Tensor], inputs: list[Tensor], scale: float | None = None, rmse: float | None = None
) -> None:
    """Result and gradients of `kernel` at most twice as far from float64 as the definition in the same type."""

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(q, k, v, scale)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, scale)

    *qkv, g = inputs
    actual, expected, exact = gradients(ours, qkv, g), gradients(plain, qkv, g), gradients_in_float64(plain, qkv, g)
    for name, a, p, e in zip(
        NAMES, (actual[0], *actual[1]), (expected[0], *expected[1]), (exact[0], *exact[1]), strict=True
    ):
        assert_close_to_float64(name, a, p, e, rmse)


def _serves_cross(inputs: list[Tensor]) -> bool:
    q, k, *_ = inputs
    return tables.serves_cross(q.shape[-1], k.shape[2], q.dtype, launch.architecture(q))


# Odd sizes, one tile and several, of the queries and of the keys; 150 keys are too many to stay on the chip.
SHAPES = [(63, 63), (70, 150), (130, 77), (5, 63), (33, 5), (64, 128)]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), SHAPES)
def test_self_attention(queries: int, keys: int, dtype: torch.dtype, device: str) -> None:
    _check(_self, _inputs(queries, keys, 40, dtype, device))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 20, 32, 64, 80, 128])
def test_self_attention_head_dims(head_dim: int, dtype: torch.dtype, device: str) -> None:
    _check(_self, _inputs(70, 65, head_dim, dtype, device))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [s for s in SHAPES if s[1] <= 128])
def test_cross_attention(queries: int, keys: int, dtype: torch.dtype, device: str) -> None:
    inputs = _inputs(queries, keys, 16 if dtype == torch.float32 else 40, dtype, device)
    assert _serves_cross(inputs)
    _check(_cross, inputs)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 128])
@pytest.mark.parametrize("keys", [40, 77])
def test_cross_attention_head_dims(keys: int, head_dim: int, dtype: torch.dtype, device: str) -> None:
    inputs = _inputs(70, keys, head_dim, dtype, device)
    if _serves_cross(inputs):
        _check(_cross, inputs)
    else:  # fp32 of this size would spill registers
        assert dtype == torch.float32
        assert op.kernel_for(*inputs[:2]) == "self"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("queries", [512, 569])
def test_cross_attention_in_several_parts(queries: int, dtype: torch.dtype, device: str) -> None:
    inputs = _inputs(queries, 77, 8, dtype, device)
    assert tables.cross_splits(2, queries) == 2
    _check(_cross, inputs)


def test_cross_attention_in_more_than_two_parts(device: str) -> None:
    inputs = _inputs(1100, 20, 8, torch.float32, device, heads=1)
    assert tables.cross_splits(1, 1100) == 4
    _check(_cross, inputs)


@pytest.mark.parametrize("keys", [7, 200])
def test_no_queries(keys: int, device: str) -> None:
    q, k, v, _ = _inputs(0, keys, 16, torch.float32, device)
    kernel = _cross if keys <= tables.MAX_CROSS_KEYS else _self
    out, (dq, dk, dv) = gradients(kernel, (q, k, v), torch.empty_like(q))
    assert out.shape == dq.shape == q.shape
    assert not dk.any()
    assert not dv.any()


def test_parts_of_the_queries_come_from_the_shape_alone() -> None:
    assert tables.cross_splits(64, 4096) == 4  # 256 programs
    assert tables.cross_splits(1, 4096) == 16  # 256 queries each
    assert tables.cross_splits(1000, 4096) == 1
    assert tables.cross_splits(1, 1) == 1


@pytest.mark.parametrize("kernel", [_self, _cross])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_one_query_and_one_key(kernel: Callable[..., Tensor], dtype: torch.dtype, device: str) -> None:
    # Many heads, so that the errors compared are averages and not single numbers.
    _check(kernel, _inputs(1, 7, 16, dtype, device, batch=2, heads=8), rmse=3e-3 if dtype == torch.float16 else None)
    q, k, v, _ = _inputs(3, 1, 16, dtype, device)
    # Three TF32 products keep 22 bits of a float32.
    rtol = 2**-21 if dtype == torch.float32 else 0
    torch.testing.assert_close(kernel(q, k, v), v.expand_as(q), rtol=rtol, atol=0)


@pytest.mark.parametrize("kernel", [_self, _cross])
@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_scale(kernel: Callable[..., Tensor], scale: float, device: str) -> None:
    # A scale of zero is the mean of the values; the padded keys must not become NaN, nor part of it.
    _check(kernel, _inputs(20, 21, 16, torch.float32, device), scale)


@pytest.mark.parametrize("kernel", [_self, _cross])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_equal_keys_average_the_values(kernel: Callable[..., Tensor], dtype: torch.dtype, device: str) -> None:
    q, k, v, g = _inputs(40, 70, 16, dtype, device)
    k = k[:, :, :1].expand_as(k).clone()
    out, (dq, _, dv) = gradients(kernel, (q, k, v), g)
    exact = v.double().mean(dim=2, keepdim=True).expand_as(out)
    bound = {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=bound)
    torch.testing.assert_close(dq.double(), torch.zeros_like(exact), rtol=0, atol=10 * bound)
    torch.testing.assert_close(dv.double(), (g.double().sum(2, keepdim=True) / 70).expand_as(dv), rtol=0, atol=bound)


@pytest.mark.parametrize("kernel", [_self, _cross])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_large_logits(kernel: Callable[..., Tensor], dtype: torch.dtype, device: str) -> None:
    # Products of 100 * 100, either sign: the softmax is one key's alone, or shared by the equal ones.
    q = torch.full((1, 1, 2, 16), 100.0, dtype=dtype, device=device)
    q[:, :, 1] = -100
    k = torch.full((1, 1, 70, 16), -100.0, dtype=dtype, device=device)
    k[:, :, 69] = 100
    v = torch.arange(70.0, device=device).to(dtype)[None, None, :, None].repeat(1, 1, 1, 16)
    out, grads = gradients(kernel, (q, k, v), torch.ones_like(q))
    torch.testing.assert_close(out[0, 0, 0].float(), torch.full((16,), 69.0, device=device), rtol=1e-6, atol=0)
    torch.testing.assert_close(out[0, 0, 1].float(), torch.full((16,), 34.0, device=device), rtol=2e-3, atol=0)
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("kernel", [_self, _cross])
def test_rows_far_below_zero_keep_their_gradients(kernel: Callable[..., Tensor], device: str) -> None:
    # All logits are near -100: a padded key, whose logit would be zero, must not outweigh them in the backward either.
    q, k, v, g = _inputs(20, 21, 16, torch.float32, device)
    qkv = (torch.full_like(q, 5.0), k * 0.1 - 5.0, v)
    actual, exact = gradients(kernel, qkv, g), gradients_in_float64(reference.attention, qkv, g)
    for ours, theirs in zip((actual[0], *actual[1]), (exact[0], *exact[1]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("kernel", [_self, _cross])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_rows(kernel: Callable[..., Tensor], bad: float, device: str) -> None:
    q, k, v, g = _inputs(70, 69, 16, torch.float32, device)
    q[0, 1, 66, 3] = bad
    out, (dq, dk, _) = gradients(kernel, (q, k, v), g)
    wrong = torch.zeros(1, 2, 70, dtype=torch.bool, device=device)
    wrong[0, 1, 66] = True
    assert torch.equal(out.isnan().all(-1), wrong)
    assert torch.equal(out.isnan().any(-1), wrong)
    assert torch.equal(dq.isnan().any(-1), wrong)
    assert dk[0, 1].isnan().any()
    assert not dk[0, 0].isnan().any()
    q, k, v, g = _inputs(70, 69, 16, torch.float32, device)
    v[0, 0, 68, 5] = bad
    out = kernel(q, k, v)
    assert not out[0, 0, :, 5].isfinite().any()
    assert out[0, 1].isfinite().all()
    assert out[0, 0, :, :5].isfinite().all()


@pytest.mark.parametrize("kernel", [_self, _cross])
def test_a_key_of_minus_infinity_weighs_nothing(kernel: Callable[..., Tensor], device: str) -> None:
    # A whole first tile of them, as a caller's way of masking keys would make.
    q, k, v, _ = _inputs(5, 128, 16, torch.float32, device)
    q, k = q.abs(), k.contiguous()
    k[:, :, :100] = float("-inf")
    expected = reference.attention(q, k[:, :, 100:], v[:, :, 100:])
    torch.testing.assert_close(kernel(q, k, v), expected, rtol=1e-5, atol=1e-6)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads before tokens": lambda x: x.contiguous(),
    "tokens last": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "an odd offset in wider rows": lambda x: torch.nn.functional.pad(x, (1, 2))[..., 1:-2],
}


@pytest.mark.parametrize("kernel", [_self, _cross])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(kernel: Callable[..., Tensor], layout: str, device: str) -> None:
    # Gradients of each layout too; the head dim of 12 leaves strides that are no multiple of eight.
    for head_dim in (12, 16):
        inputs = _inputs(37, 21, head_dim, torch.float32, device, batch=2)
        _check(kernel, [LAYOUTS[layout](x) for x in inputs])


@pytest.mark.parametrize("kernel", [_self, _cross])
def test_slices_of_a_joint_projection(kernel: Callable[..., Tensor], device: str) -> None:
    batch, tokens, heads, head_dim = 2, 37, 3, 40
    joint = torch.randn(batch, tokens, 3, heads, head_dim, device=device).half().requires_grad_()
    q, k, v = joint.permute(2, 0, 3, 1, 4)
    out = kernel(q, k, v)
    assert out.stride() == (tokens * heads * head_dim, head_dim, heads * head_dim, 1)
    (actual,) = torch.autograd.grad(out.float().square().sum(), joint)
    plain = joint.detach().double().requires_grad_()
    expected = reference.attention(*plain.permute(2, 0, 3, 1, 4))
    (exact,) = torch.autograd.grad(expected.square().sum(), plain)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-3)
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-2)


@pytest.mark.parametrize("kernel", [_self, _cross])
def test_an_expanded_gradient(kernel: Callable[..., Tensor], device: str) -> None:
    # What sum().backward() hands back has only strides of zero.
    q, k, v, g = _inputs(9, 21, 16, torch.float32, device)
    _check(kernel, [q, k, v, torch.ones((), device=device).expand_as(g)])


@pytest.mark.parametrize("kernel", [_self, _cross])
def test_results_are_deterministic_and_inputs_untouched(kernel: Callable[..., Tensor], device: str) -> None:
    *qkv, g = _inputs(513 if kernel is _cross else 70, 77, 16, torch.float16, device, heads=1)
    copies = [x.clone() for x in (*qkv, g)]
    first, second = gradients(kernel, qkv, g), gradients(kernel, qkv, g)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip((*qkv, g), copies, strict=True))


@pytest.mark.parametrize("name", ["self", "cross"])
def test_no_matrix_of_scores_in_memory(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_kernels.attention import cross_kernel, kernel

    sizes: list[int] = []

    def counted(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_and_count(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            sizes.append(tensor.numel())
            return tensor

        return allocate_and_count

    for function in ("empty", "empty_like", "zeros", "zeros_like", "full"):
        monkeypatch.setattr(torch, function, counted(getattr(torch, function)))
    queries, keys = 4096, 4096 if name == "self" else 77
    q, k, v, g = (
        torch.empty(2, n, 5, 64, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for n in (queries, keys, keys, queries)
    )
    sizes.clear()
    with launch.recording(90) as recorded:
        if name == "self":
            out, lse = kernel.attention_fwd(q, k, v, 0.125)
            kernel.attention_bwd(g, q, k, v, out, lse, 0.125)
        else:
            cross_kernel.cross_attention_fwd(q, k, v, 0.125)
            cross_kernel.cross_attention_bwd(g, q, k, v, 0.125)
    assert len(recorded.launches) == 3
    parts = tables.cross_splits(10, queries) * k.numel()
    assert max(sizes) == (q.numel() if name == "self" else max(q.numel(), parts))
    # Everything that a kernel is handed was counted, or is an input.
    for record in recorded.launches:
        handed = [x for x in record.arguments.values() if isinstance(x, Tensor)]
        assert max(x.numel() for x in handed) <= max(sizes)
