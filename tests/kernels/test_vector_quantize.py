"""The nearest-code kernels, and the plain search, against distances in float64."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ldm_kernels.common import launch
from ldm_kernels.vector_quantize import op, reference
from ldm_kernels.vector_quantize.op import vector_quantize
from tests.helpers.kernels import FLOAT_DTYPES, assert_close_to_float64, gradients, gradients_in_float64

BACKENDS = ["triton", "reference"]
# Below 9 the distance is summed directly; beyond, through a matrix product, 16 dimensions at a time.
WIDTHS = [1, 3, 4, 8, 9, 16, 17, 64]


def _gaps(z: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """How much farther, in squared distance, the chosen code is than the nearest, over what rounding may explain.

    With u = 2**-24, a directly summed distance is off by at most (D + 2) u of itself; |e|^2 - 2 z.e by at most
    (D + 2) u (|z| + |e|)^2. Two such scores are compared.
    """
    z, codebook = z.double(), codebook.double()
    distances = (z[:, None] - codebook[None]).square().sum(-1)
    least = distances.amin(1)
    chosen = distances.gather(1, indices[:, None])[:, 0]
    width = z.shape[1]
    scale = least if width <= reference.MAX_DIRECT_WIDTH else (z.norm(dim=1) + codebook.norm(dim=1).max()).square()
    # A code that is the vector itself explains nothing, and needs nothing explained.
    return torch.where(chosen == least, 0.0, (chosen - least) / (2 * (width + 2) * 2**-24 * scale))


def _assert_nearest(z: Tensor, codebook: Tensor, backend: str) -> Tensor:
    before = z.clone(), codebook.clone()
    quantized, indices = vector_quantize(z, codebook, backend=backend)
    assert indices.dtype == torch.int64
    assert indices.shape == (len(z),)
    assert not indices.requires_grad
    assert float(_gaps(z, codebook, indices).max()) <= 1
    assert quantized.dtype == codebook.dtype
    assert torch.equal(quantized, codebook[indices])
    assert torch.equal(z, before[0])
    assert torch.equal(codebook, before[1])
    return indices


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nearest(device: str, width: int, dtype: torch.dtype, backend: str) -> None:
    # Neither a multiple of the block of rows nor of the tile of codes; several of both.
    z = torch.randn(70, width, device=device).to(dtype)
    _assert_nearest(z, torch.randn(131, width, device=device).to(dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (1, 2), (16, 32), (64, 64), (3, 33)])
@pytest.mark.parametrize("width", [4, 20])
def test_edges_of_blocks(device: str, rows: int, codes: int, width: int, backend: str) -> None:
    _assert_nearest(torch.randn(rows, width, device=device), torch.randn(codes, width, device=device), backend)


def test_many_rows_take_larger_blocks(device: str) -> None:
    # 16,384 rows is where the table changes; one tile of codes keeps it affordable here.
    for width in (2, 5):
        z = torch.randn(16384 + 3, width, device=device)
        _assert_nearest(z, torch.randn(6, width, device=device), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, 16])
def test_far_from_the_origin(device: str, width: int, backend: str) -> None:
    offset = 100 + torch.arange(width, device=device)
    z, codebook = torch.randn(40, width, device=device) + offset, torch.randn(90, width, device=device) + offset
    indices = _assert_nearest(z, codebook, backend)
    if width <= reference.MAX_DIRECT_WIDTH:
        exact = (z.double()[:, None] - codebook.double()[None]).square().sum(-1)
        assert torch.equal(indices, exact.argmin(1)), "summed directly, an offset costs no precision"


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("tf32_allowed")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [4, 16])
def test_fp32_inputs_are_not_rounded(device: str, width: int, backend: str) -> None:
    # Codes 17 * 2**-12 apart in each dimension: neither bfloat16 nor the ten bits of TF32 hold them.
    steps = torch.arange(60, device=device) * 17 * 2**-12
    codebook = 1 + steps[:, None].expand(60, width).contiguous()
    wanted = torch.tensor([59, 3, 17, 40], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        _, indices = vector_quantize(codebook[wanted], codebook, backend=backend)
    assert torch.equal(indices, wanted)

    tf32 = ((codebook.view(torch.int32) + 2**12) & ~(2**13 - 1)).view(torch.float32)
    rounded = codebook.double().square().sum(1) - 2 * tf32[wanted].double() @ tf32.double().T
    assert not torch.equal(rounded.argmin(1), wanted), "this test could not tell"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [2, 4, 16, 33])
def test_ties_go_to_the_lowest_index(device: str, width: int, backend: str) -> None:
    # Every code twice or more, in one tile and in others. Whole numbers on a CPU: a BLAS that sums the last columns of
    # a product in another order than the first would break the tie by rounding.
    drawn = torch.randn(64, width, device=device)
    if device == "cpu":
        drawn = (4 * drawn).round()
    codes, z = drawn[:23], drawn
    codebook = codes.repeat(7, 1)
    _, indices = vector_quantize(z, codebook, backend=backend)
    assert int(indices.max()) < 23
    # Neighbours within a tile, in both halves of the distance.
    codebook = torch.tensor([[9.0], [-1.0], [1.0], [1.0], [-1.0]], device=device).expand(5, width).contiguous()
    _, indices = vector_quantize(torch.zeros(2, width, device=device), codebook, backend=backend)
    assert indices.tolist() == [1, 1]
    _, indices = vector_quantize(torch.zeros(2, width, device=device), torch.ones(200, width, device=device), backend)
    assert indices.tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [4, 20])
def test_what_is_not_finite(device: str, width: int, backend: str) -> None:
    inf, nan = float("inf"), float("nan")
    codebook = torch.randn(80, width, device=device)
    z = torch.randn(6, width, device=device)
    good = vector_quantize(z, codebook, backend=backend)[1]
    z[0, 1], z[2, 0], z[3, 2] = nan, inf, -inf
    z[4] = 1e30  # its square passes fp32
    _, indices = vector_quantize(z, codebook, backend=backend)
    assert indices.tolist() == [0, int(good[1]), 0, 0, 0, int(good[5])]

    codebook[70, 1], codebook[75, 0] = inf, nan
    quantized, indices = vector_quantize(z, codebook, backend=backend)
    assert indices.tolist() == [0, 70, 0, 0, 0, 70]
    assert not quantized[1].isfinite().all(), "a codebook that broke must show"
    codebook[70], codebook[75, 0], codebook[33, 2] = 0, nan, nan
    assert vector_quantize(z, codebook, backend=backend)[1].tolist() == [0, 33, 0, 0, 0, 33]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, 16])
def test_any_strides_and_mixed_types(device: str, width: int, backend: str) -> None:
    images = torch.randn(2, width, 3, 5, device=device)
    z = images.permute(0, 2, 3, 1).reshape(-1, width)
    channels_last = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1, width)
    wide = torch.randn(50, 2 * width, device=device)
    codebook = wide[::2, 1::2]
    expected = _assert_nearest(z, codebook.contiguous(), backend)
    assert torch.equal(_assert_nearest(channels_last, codebook, backend), expected)
    assert torch.equal(_assert_nearest(z.T.contiguous().T, codebook, backend), expected)
    _assert_nearest(z.half(), codebook, backend)
    _assert_nearest(z, codebook.half(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(device: str, backend: str) -> None:
    codebook = torch.randn(5, 3, device=device, requires_grad=True)
    quantized, indices = vector_quantize(torch.randn(0, 3, device=device), codebook, backend=backend)
    assert quantized.shape == (0, 3)
    assert indices.shape == (0,)
    assert not torch.autograd.grad(quantized.sum(), codebook)[0].any()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_gradient_goes_to_the_codebook_alone(device: str, dtype: torch.dtype) -> None:
    # Below 3,073 indices CUDA adds up half types in another way than above; the interpreter has one way, and is slow.
    rows = 700 if launch.INTERPRETED else 4000
    z = torch.randn(rows, 4, device=device).to(dtype).requires_grad_()
    codebook = torch.randn(7, 4, device=device).to(dtype)
    dout = torch.randn(rows, 4, device=device).to(dtype)
    indices = vector_quantize(z, codebook, backend="triton")[1]

    def quantize(codes: Tensor) -> Tensor:
        return vector_quantize(z, codes, backend="triton")[0]

    quantized, (gradient,) = gradients(quantize, [codebook], dout)
    plain, (plain_gradient,) = gradients(lambda codes: codes[indices], [codebook], dout)
    _, (exact_gradient,) = gradients_in_float64(lambda codes: codes[indices], [codebook], dout)
    assert torch.equal(quantized, plain)
    # Sums of up to 570 rows in the type itself, as torch's own are on this device.
    assert_close_to_float64("gradient", gradient, plain_gradient, exact_gradient, rmse=32 * torch.finfo(dtype).eps)
    assert torch.autograd.grad(quantize(codebook.requires_grad_()).sum(), z, allow_unused=True) == (None,)
    again = gradients(quantize, [codebook], dout)[1][0]
    assert torch.equal(gradient, again)


class _Live(TorchDispatchMode):
    """The most bytes of results alive at once; views count with what they view."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                key = storage._cdata
                if key in given and key not in self._holders:
                    continue  # an input of the whole
                if key not in self._holders:
                    self._holders[key] = 0
                    self._now += storage.nbytes()
                self._holders[key] += 1
                weakref.finalize(x, self._let_go, key, storage.nbytes())
        self.most = max(self.most, self._now)
        return result

    def _let_go(self, key: int, nbytes: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self._now -= nbytes


@pytest.mark.parametrize("width", [4, 256])
def test_memory_for_65536_vectors_and_16384_codes(width: int) -> None:
    from ldm_kernels.vector_quantize import kernel

    z, codebook = torch.empty(65536, width, device="meta"), torch.empty(16384, width, device="meta")
    with launch.recording(90) as recorded, _Live() as live:
        indices = kernel.nearest_codes(z, codebook)
    (launched,) = recorded.launches
    assert {id(a) for a in launched.arguments.values() if isinstance(a, Tensor)} == {id(z), id(codebook), id(indices)}
    assert live.most == indices.nbytes == 65536 * 8

    with _Live() as live:
        reference.nearest_codes(z, codebook)
    distances = 2**22 * 8
    copies = 2 * codebook.numel() * 8 + 2 * z.numel() * 4  # the codes in float64, squares, and the rows of a chunk
    assert distances <= live.most <= distances + copies + 4 * 65536 * 8
    assert live.most < 2**30 / 4


def test_plain_torch_goes_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    z, codebook = torch.randn(37, 5), torch.randn(12, 5)
    at_once = reference.nearest_codes(z, codebook)
    for pairs in (1, 40, 37 * 12):
        monkeypatch.setattr(reference, "_PAIRS", pairs)
        assert torch.equal(reference.nearest_codes(z, codebook), at_once)


@pytest.mark.parametrize("width", [4, 16])
def test_operator(device: str, width: int) -> None:
    z, codebook = torch.randn(20, width, device=device), torch.randn(40, width, device=device)
    torch.library.opcheck(op._nearest_codes, (z, codebook))


def _twice(z: Tensor, codebook: Tensor) -> Tensor:
    first, indices = vector_quantize(z, codebook, backend="triton")
    second, _ = vector_quantize(first * 0.5 + z, codebook, backend="triton")
    return first + second * (1 + indices[:, None])


def test_twice_in_a_compiled_graph(device: str) -> None:
    z, codebook, dout = (torch.randn(n, 4, device=device) for n in (30, 40, 30))
    compiled = torch.compile(_twice, backend="aot_eager", fullgraph=True)
    out, (gradient,) = gradients(lambda codes: compiled(z, codes), [codebook], dout)
    plain_out, (plain_gradient,) = gradients(lambda codes: _twice(z, codes), [codebook], dout)
    torch.testing.assert_close(out, plain_out)
    torch.testing.assert_close(gradient, plain_gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(device: str, use_reentrant: bool) -> None:
    z, codebook, dout = (torch.randn(n, 4, device=device) for n in (30, 40, 30))
    plain_out, (plain_gradient,) = gradients(lambda codes: _twice(z, codes), [codebook], dout)
    codebook.requires_grad_()
    out = checkpoint(_twice, z, codebook, use_reentrant=use_reentrant)
    out.backward(dout)
    assert torch.equal(out, plain_out)
    torch.testing.assert_close(codebook.grad, plain_gradient)


def test_choice_of_implementation(device: str) -> None:
    z, codebook = torch.randn(3, 4, device=device), torch.randn(5, 4, device=device)
    for given, codes, backend, path in (
        (z, codebook, "auto", "triton"),
        (z, codebook, "reference", "reference"),
        (z, codebook.double(), "auto", "reference"),
        (z.double(), codebook, "auto", "reference"),
    ):
        before = launch.outcomes().get(("vector_quantize", path), 0)
        vector_quantize(given, codes, backend=backend)
        assert launch.outcomes()["vector_quantize", path] == before + 1, (backend, path)


def test_mistakes_are_explained() -> None:
    z, codebook = torch.randn(3, 4), torch.randn(5, 4)
    for wrong in (torch.randn(5, 3), torch.randn(4), torch.randn(0, 4)):
        with pytest.raises(ValueError, match="do not go together"):
            vector_quantize(z, wrong)
    with pytest.raises(TypeError, match=r"codebook must be of a floating-point type, not torch\.int64"):
        vector_quantize(z, torch.ones(5, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="codebook on meta"):
        vector_quantize(z, codebook.to("meta"))
    with pytest.raises(ValueError, match="take one of auto, triton, reference"):
        vector_quantize(z, codebook, backend="faiss")
    with pytest.raises(TypeError, match="float64"):
        vector_quantize(z.double(), codebook, backend="triton")


def test_triton_refuses_a_codebook_of_another_type(device: str) -> None:
    with pytest.raises(TypeError, match="float64"):
        vector_quantize(torch.randn(3, 4, device=device), torch.randn(5, 4, device=device).double(), backend="triton")
