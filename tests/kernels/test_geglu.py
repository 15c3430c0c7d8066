"""The GEGLU kernels against float64, and as operators of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldm_kernels.common import launch
from ldm_kernels.geglu import op, reference
from ldm_kernels.geglu.op import geglu
from tests.helpers.kernels import FLOAT_DTYPES, assert_close_to_float64, gradients, gradients_in_float64

Layout = Callable[[Tensor], Tensor]

pytestmark = pytest.mark.usefixtures("device")


def _triton(projection: Tensor) -> Tensor:
    return geglu(projection, backend="triton")


def _assert_correct(projection: Tensor, dout: Tensor) -> None:
    before = projection.clone()
    out, (gradient,) = gradients(_triton, [projection], dout)
    plain_out, (plain_gradient,) = gradients(reference.geglu, [projection], dout)
    exact_out, (exact_gradient,) = gradients_in_float64(reference.geglu, [projection], dout)
    assert_close_to_float64("output", out, plain_out, exact_out)
    assert_close_to_float64("gradient", gradient, plain_gradient, exact_gradient)
    assert out.is_contiguous()
    assert torch.equal(projection, before), "the projection was overwritten"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    "shape",
    # One row, one column; several tiles of rows; several tiles of columns; no leading dimension; several.
    [(1, 2), (300, 14), (9, 600), (80,), (2, 3, 5, 200), (63, 32)],
)
def test_geglu(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    projection = torch.randn(shape, device=device).to(dtype) * 2
    _assert_correct(projection, torch.randn(*shape[:-1], shape[-1] // 2, device=device).to(dtype))


def _columns_of_a_wider_tensor(x: Tensor) -> Tensor:
    return F.pad(x, (3, 5))[..., 3:-5]


def _transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def _permuted(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def _every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


@pytest.mark.parametrize("of_projection", [_columns_of_a_wider_tensor, _transposed, _permuted, _every_second])
@pytest.mark.parametrize("of_dout", [_columns_of_a_wider_tensor, _transposed])
def test_any_strides(device: str, of_projection: Layout, of_dout: Layout) -> None:
    projection = of_projection(torch.randn(3, 5, 24, device=device))
    dout = of_dout(torch.randn(3, 5, 12, device=device))
    assert not projection.is_contiguous()
    assert not dout.is_contiguous()
    _assert_correct(projection, dout)


def test_rows_that_a_view_reaches_are_not_copied() -> None:
    from ldm_kernels.geglu import kernel

    wide = torch.empty(4, 6, 100, device="meta")
    with launch.recording(90) as recorded:
        kernel.geglu_fwd(wide[..., :80])
        kernel.geglu_bwd(wide[..., :40], wide[..., :80])
    for launched in recorded.launches:
        assert launched.arguments["stride"] == 100
        projection = launched.arguments["p_projection"]
        assert isinstance(projection, Tensor)
        assert projection._base is wide


def test_expanded_tensors(device: str) -> None:
    projection = torch.randn(4, 20, device=device)
    _assert_correct(projection, torch.ones((), device=device).expand(4, 10))
    expanded = projection[:1].expand(4, 20)
    assert torch.equal(_triton(expanded), _triton(expanded.contiguous()))


@pytest.mark.parametrize("shape", [(0, 6), (3, 0), (0, 3, 8)])
def test_nothing_to_do(device: str, shape: tuple[int, ...]) -> None:
    projection = torch.randn(shape, device=device, requires_grad=True)
    out = _triton(projection)
    assert out.shape == (*shape[:-1], shape[-1] // 2)
    (gradient,) = torch.autograd.grad(out.sum(), projection)
    assert gradient.shape == shape


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_extreme_gates_come_out_as_in_torch(device: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    gates = torch.tensor([1e4, -1e4, inf, -inf, nan, 0.0, -0.0, 5.0, -5.0, 1e-4, -1e-4], device=device, dtype=dtype)
    values = torch.tensor([1.0, -2.0, 0.0, inf, nan], device=device, dtype=dtype)
    projection = torch.cat(torch.broadcast_tensors(values[:, None], gates[None, :]), dim=1)
    dout = torch.ones(len(values), len(gates), device=device, dtype=dtype)
    out, (gradient,) = gradients(_triton, [projection], dout)
    plain_out, (plain_gradient,) = gradients(reference.geglu, [projection], dout)
    torch.testing.assert_close(out, plain_out, equal_nan=True, atol=1e-6, rtol=1e-2)
    torch.testing.assert_close(gradient, plain_gradient, equal_nan=True, atol=1e-6, rtol=1e-2)


def test_gelu_is_the_exact_one_not_its_tanh_form(device: str) -> None:
    gate = torch.linspace(-6, 6, 400, device=device)
    projection = torch.cat([torch.ones_like(gate), gate])
    out, (gradient,) = gradients(_triton, [projection], torch.ones_like(gate))
    exact = gate.double().requires_grad_()
    for actual, approximate in ((out, "none"), (out, "tanh")):
        error = float((actual - F.gelu(gate.double(), approximate=approximate)).abs().max())
        assert (error > 1e-4) == (approximate == "tanh"), (approximate, error)
    for approximate in ("none", "tanh"):
        (derivative,) = torch.autograd.grad(F.gelu(exact, approximate=approximate).sum(), exact)
        error = float((gradient[400:] - derivative).abs().max())
        assert (error > 1e-4) == (approximate == "tanh"), (approximate, error)


def test_offsets_beyond_32_bits(device: str) -> None:
    # Three rows, 2**30 + 16 elements apart; the memory between them is never touched.
    stride, width = 2**30 + 16, 8
    memory = torch.tensor([], dtype=torch.float16, device=device)
    memory.set_(torch.UntypedStorage(2 * (2 * stride + 2 * width), device=device))
    projection = memory.as_strided((3, 2 * width), (stride, 1))
    values = torch.randn(3, 2 * width, device=device).half()
    projection.copy_(values)
    torch.testing.assert_close(_triton(projection), reference.geglu(values), rtol=2e-3, atol=1e-3)


def test_only_the_projection_is_kept_for_the_backward(device: str) -> None:
    projection = torch.randn(4, 20, device=device, requires_grad=True)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _triton(projection)
    assert [x.data_ptr() for x in kept] == [projection.data_ptr()]


@pytest.mark.parametrize("shape", [(3, 14), (2, 3, 40)])
def test_operators(device: str, shape: tuple[int, ...]) -> None:
    projection = torch.randn(shape, device=device, requires_grad=True)
    torch.library.opcheck(op._geglu_fwd, (projection,))
    strided = _transposed(torch.randn(2, 3, 10, device=device)).requires_grad_()
    torch.library.opcheck(op._geglu_fwd, (strided,))
    torch.library.opcheck(op._geglu_bwd, (torch.randn(2, 3, 5, device=device), strided.detach()))


def _twice(projection: Tensor) -> Tensor:
    return _triton(_triton(projection) * 1.5) + _triton(projection.flip(-1)).sum(-1, keepdim=True)


def test_twice_in_a_compiled_graph(device: str) -> None:
    projection, dout = torch.randn(3, 5, 24, device=device), torch.randn(3, 5, 6, device=device)
    compiled = torch.compile(_twice, backend="aot_eager", fullgraph=True)
    out, (gradient,) = gradients(compiled, [projection], dout)
    plain_out, (plain_gradient,) = gradients(_twice, [projection], dout)
    torch.testing.assert_close(out, plain_out)
    torch.testing.assert_close(gradient, plain_gradient)
    exact_out, (exact_gradient,) = gradients_in_float64(
        lambda x: reference.geglu(reference.geglu(x) * 1.5) + reference.geglu(x.flip(-1)).sum(-1, keepdim=True),
        [projection],
        dout,
    )
    torch.testing.assert_close(out.double(), exact_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device: str, use_reentrant: bool) -> None:
    projection, dout = torch.randn(3, 24, device=device), torch.randn(3, 6, device=device)
    plain_out, (plain_gradient,) = gradients(_twice, [projection], dout)
    projection.requires_grad_()
    out = checkpoint(_twice, projection, use_reentrant=use_reentrant)
    out.backward(dout)
    assert torch.equal(out, plain_out)
    assert torch.equal(projection.grad, plain_gradient)


@pytest.mark.parametrize("dtype", [d for d in FLOAT_DTYPES if d != torch.float32])
def test_autocast_leaves_the_types_alone(device: str, dtype: torch.dtype) -> None:
    weight = torch.randn(24, 8, device=device)
    x = torch.randn(3, 8, device=device)
    with torch.autocast(device, dtype=dtype):
        projection = F.linear(x, weight)
        out = _triton(projection)
    assert projection.dtype == dtype
    assert out.dtype == dtype
    torch.testing.assert_close(out, _triton(projection))
    assert _triton(x).dtype == torch.float32


def test_choice_of_implementation(device: str) -> None:
    projection = torch.randn(2, 6, device=device)
    for tensor, backend, path in (
        (projection, "auto", "triton"),
        (projection, "reference", "reference"),
        (projection.double(), "auto", "reference"),
    ):
        before = launch.outcomes().get(("geglu", path), 0)
        geglu(tensor, backend=backend)
        assert launch.outcomes()["geglu", path] == before + 1, (backend, path)


def test_mistakes_are_explained(device: str) -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\).*must be even"):
        geglu(torch.randn(3, 5, device=device))
    with pytest.raises(ValueError, match="cannot be split"):
        geglu(torch.tensor(1.0, device=device))
    with pytest.raises(TypeError, match=r"floating-point type, not torch\.int64"):
        geglu(torch.ones(2, 2, dtype=torch.int64, device=device))
    with pytest.raises(ValueError, match="take one of auto, triton, reference"):
        geglu(torch.randn(2, 2, device=device), backend="liger")
    with pytest.raises(TypeError, match="float64"):
        geglu(torch.randn(2, 2, device=device).double(), backend="triton")
