"""group_norm_silu as a torch operator: checks, layouts, compilation, autocast, checkpointing, launches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldm_kernels.common import launch
from ldm_kernels.group_norm_silu.op import group_norm_silu
from tests.helpers.group_norm_silu import VECTORS, Case, make

LAYOUTS = [torch.channels_last, torch.contiguous_format]


def _call(case: Case, *values: Tensor, backend: str = "auto") -> Tensor:
    named: dict[str, Any] = dict(zip(case.tensors, values, strict=True))
    return group_norm_silu(num_groups=case.num_groups, backend=backend, **named)


def _gradients(case: Case, function: Any) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in case.tensors.values()]
    y = function(*leaves)
    y.backward(case.dy)
    return (y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))


def _small(device: str, layout: Any = torch.channels_last, dtype: torch.dtype = torch.float32) -> Case:
    return make((2, 12, 2, 4, 5), dtype, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_operator_is_the_definition(device: str, layout: Any) -> None:
    case = _small(device, layout)
    actual = _gradients(case, lambda *values: _call(case, *values))
    expected = _gradients(case, lambda *values: _call(case, *values, backend="reference"))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    x = case.tensors["x"]
    assert actual[0].stride() == actual[1].stride() == x.stride()
    assert actual[0].is_contiguous(memory_format=layout)


def test_the_path_taken_is_counted(device: str) -> None:
    full, sparse = make((1, 16, 2, 4, 4), torch.float32, torch.channels_last, device), _small(device)
    for case, backend, path in (
        (full, "auto", "triton registers"),
        (full, "triton", "triton registers"),
        (sparse, "auto", "triton two_pass"),
        (full, "reference", "reference"),
    ):
        before = launch.outcomes().get(("group_norm_silu", path), 0)
        _call(case, *case.tensors.values(), backend=backend)
        assert launch.outcomes()["group_norm_silu", path] == before + 1


def test_types_that_no_kernel_serves_take_the_reference(device: str) -> None:
    x, weight = torch.randn(1, 4, 2, 2, dtype=torch.float64, device=device), torch.ones(4, device=device)
    assert group_norm_silu(x, 2, weight, weight).dtype == torch.float64


def test_opcheck(device: str) -> None:
    for layout in LAYOUTS:
        case = _small(device, layout)
        x, weight, bias, *optional = (tensor.clone().requires_grad_() for tensor in case.tensors.values())
        forward = torch.ops.ldm_kernels.group_norm_silu_fwd.default
        torch.library.opcheck(forward, (x, 2, weight, bias, 1e-5, True, *optional))
        _, mean, rstd = forward(x, 2, weight, bias, 1e-5, True, *optional)
        x, weight, bias, *optional = case.tensors.values()
        needs = [True, True, False, True, False, True, True]
        arguments = (case.dy, x, mean.detach(), rstd.detach(), 2, weight, bias, True, *optional, needs)
        torch.library.opcheck(torch.ops.ldm_kernels.group_norm_silu_bwd.default, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_in_one_graph(device: str, layout: Any) -> None:
    case = _small(device, layout)

    def function(*values: Tensor) -> Tensor:
        return _call(case, *values) * 2

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(_gradients(case, compiled), _gradients(case, function), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_changes_nothing(device: str, dtype: torch.dtype) -> None:
    case = make((2, 12, 2, 4, 5), dtype, torch.channels_last, device, vector_dtype=torch.float32)
    expected = _gradients(case, lambda *values: _call(case, *values))

    def function(*values: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return _call(case, *values)

    for a, b in zip(_gradients(case, function), expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert expected[0].dtype == dtype


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(device: str, use_reentrant: bool) -> None:
    case = _small(device)
    expected = _gradients(case, lambda *values: _call(case, *values))
    actual = _gradients(
        case, lambda *values: checkpoint(lambda *v: _call(case, *v), *values, use_reentrant=use_reentrant)
    )
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_twice_in_a_graph_and_a_tensor_used_twice(device: str) -> None:
    case = make((2, 12, 2, 4, 5), torch.float32, torch.channels_last, device, given=())

    def twice(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        once = group_norm_silu(x, 2, weight, bias, channel_bias=bias, backend=backend)
        return group_norm_silu(once + x, 3, weight, weight, channel_bias=bias, backend=backend)

    actual = _gradients(case, lambda *values: twice(*values, "triton"))
    expected = _gradients(case, lambda *values: twice(*values, "reference"))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_an_x_in_neither_layout_comes_out_in_channels_last(device: str) -> None:
    case = _small(device)
    wide = torch.zeros(2, 12, 4, 10, device=device)[..., ::2]
    wide.copy_(case.tensors["x"])
    y = _call(case, wide, *list(case.tensors.values())[1:])
    assert torch.equal(y, _call(case, *case.tensors.values()))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_batch_of_no_samples(device: str, backend: str) -> None:
    case = make((0, 12, 2, 4, 5), torch.float32, torch.channels_last, device)
    y, *gradients = _gradients(case, lambda *values: _call(case, *values, backend=backend))
    assert y.shape == (0, 12, 4, 5)
    for name, gradient in zip(case.tensors, gradients, strict=True):
        assert gradient.shape == case.tensors[name].shape
        assert not gradient.any(), name


def test_nothing_runs_for_gradients_that_nobody_needs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_kernels.group_norm_silu import kernel

    launched: list[str] = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda call: (launched.append(call.kernel.__name__), run(call))[1])
    several_chunks = make((1, 12, 2, 24, 26), torch.float32, torch.channels_last, device)
    one_chunk = make((1, 12, 2, 4, 5), torch.float32, torch.channels_last, device)
    monkeypatch.setattr(kernel, "plan_for", _two_pass_plan)

    def kernels(case: Case, *needed: str) -> list[str]:
        leaves = [tensor.clone().requires_grad_(name in needed) for name, tensor in case.tensors.items()]
        y = _call(case, *leaves)
        launched.clear()
        y.backward(case.dy)
        return [name.removeprefix("_group_norm_silu_").removesuffix("_kernel") for name in launched]

    everything = ["reduce", "merge_bwd", "apply_bwd", "parameters"]
    assert kernels(several_chunks, *several_chunks.tensors) == everything
    assert kernels(several_chunks, "x") == everything[:3]
    assert kernels(several_chunks, "weight", "shift") == ["reduce", "merge_bwd", "parameters"]
    assert kernels(one_chunk, "weight", "shift") == ["reduce", "parameters"]
    assert kernels(one_chunk, "sample_shift") == ["reduce", "merge_bwd", "parameters"]


def _two_pass_plan(x: Tensor, num_groups: int, backward: bool, variant: Any = None) -> Any:
    from ldm_kernels.group_norm_silu.plan import variant_for

    pixels = x.shape[2] * x.shape[3]
    return variant_for(x.shape[0], x.shape[1], num_groups, pixels, 4, True, 80, backward, variant="two_pass")


def test_what_is_kept_for_the_backward(device: str) -> None:
    case = _small(device)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        _call(case, *(tensor.clone().requires_grad_() for tensor in case.tensors.values()))
    assert sorted(kept) == sorted([*(tuple(t.shape) for t in case.tensors.values()), (2, 2), (2, 2)])


def test_mistakes_are_explained(device: str) -> None:
    x, vector, rows = torch.randn(2, 6, 3, 3, device=device), torch.ones(6, device=device), torch.ones(2, 6)
    rows = rows.to(device)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "6 channels do not divide into 4 groups", {"num_groups": 4}),
        (ValueError, "into 0 groups", {"num_groups": 0}),
        (ValueError, r"x must be \(N, C, H, W\)", {"x": x[0]}),
        (ValueError, "at least one channel and one pixel", {"x": x[:, :, :0]}),
        (ValueError, r"weight has shape \(3,\); .* it must be \(6,\)", {"weight": vector[:3]}),
        (ValueError, r"scale has shape \(6,\); .* it must be \(2, 6\)", {"scale": vector}),
        (ValueError, r"channel_bias has shape \(2, 6\)", {"channel_bias": rows}),
        (ValueError, "activation 'relu' is unknown", {"activation": "relu"}),
        (ValueError, "backend 'cuda' is unknown", {"backend": "cuda"}),
        (ValueError, "bias is on meta", {"bias": vector.to("meta")}),
        (TypeError, "x must be of a floating-point type", {"x": x.int()}),
        (TypeError, "shift is torch.float64", {"shift": rows.double()}),
        (TypeError, "not torch.float64", {"x": x.double(), "backend": "triton"}),
    ]
    for error, message, changed in cases:
        arguments: dict[str, Any] = {"x": x, "num_groups": 2, "weight": vector, "bias": vector, **changed}
        with pytest.raises(error, match=message):
            group_norm_silu(**arguments)


def test_more_pixels_than_32_bit_offsets_reach_are_refused(device: str) -> None:
    x = torch.zeros(1, device=device).expand(1, 2, 2**13, 2**12)
    vector = torch.ones(2, device=device)
    with pytest.raises(ValueError, match="takes at most"):
        group_norm_silu(x, 1, vector, vector, backend="triton")


def test_the_reference_on_the_cpu_needs_no_kernels() -> None:
    for given in itertools.chain([()], itertools.combinations(VECTORS, 2)):
        case = make((2, 6, 2, 3, 3), torch.float32, torch.channels_last, "cpu", given=given)
        y = _call(case, *case.tensors.values(), backend="reference")
        assert torch.equal(y, case.reference(*case.tensors.values()))
