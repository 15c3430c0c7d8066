"""Values and gradients of the kernels of group_norm_silu, variant by variant, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm_kernels.group_norm_silu import reference
from tests.helpers.group_norm_silu import VECTORS, Case, check, kernel_plan, make, run
from tests.helpers.kernels import FLOAT_DTYPES, assert_close_to_float64

# Groups of 4, 10, 20, 30, 40 and 60 channels; one pixel, odd and even sides.
SHAPES = [
    (2, 8, 2, 16, 16),
    (2, 40, 4, 7, 9),
    (2, 40, 2, 8, 8),
    (1, 60, 2, 7, 9),
    (1, 80, 2, 8, 8),
    (1, 120, 2, 7, 9),
    (3, 40, 4, 1, 1),
]
# Seven tiles of pixels in two chunks in both layouts, the last chunk and its last tile not full.
CHUNKED = (1, 12, 3, 28, 30)
LAYOUTS = [torch.channels_last, torch.contiguous_format]
VARIANTS = ["two_pass", "registers"]
SUBSETS = [(), *((name,) for name in VECTORS), ("channel_bias", "sample_shift"), ("scale", "shift")]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(device: str, shape: Any, dtype: torch.dtype, layout: Any, variant: str) -> None:
    if device == "cpu" and dtype == torch.float16 and shape[1] > 60:
        pytest.skip("the interpreter is slow: fp32 covers the wide shapes there, a GPU runs them in every type")
    check(make(shape, dtype, layout, device), variant)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 16, 4, 7, 9), (1, 40, 1, 8, 8)])
def test_the_clusters_source(device: str, shape: Any, layout: Any) -> None:
    """In the interpreter without a cluster, but with its blocks."""
    from ldm_kernels.group_norm_silu import kernel

    if not kernel.CLUSTERS_COMPILE:
        pytest.skip("the cluster variant needs Triton 3.8")
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("a cluster of thread blocks needs compute capability 9.0")
    check(make(shape, torch.float32, layout, device), "cluster")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_several_chunks(device: str, dtype: torch.dtype, layout: Any) -> None:
    case = make(CHUNKED, dtype, layout, device)
    plan = kernel_plan(case, "two_pass")
    assert (plan.chunks, plan.chunk_tiles, plan.block_hw) == (2, 4, 128)
    check(case, "two_pass")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("given", SUBSETS)
def test_every_optional_vector_alone_and_in_pairs(
    device: str, given: tuple[str, ...], silu: bool, variant: str
) -> None:
    check(make((2, 12, 2, 4, 5), torch.float32, torch.channels_last, device, given=given, silu=silu), variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ratio", [100.0, 1000.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_far_above_the_deviation(device: str, layout: Any, ratio: float, variant: str) -> None:
    case = make((2, 8, 2, 12, 12), torch.float32, layout, device, mean=ratio, given=("channel_bias", "scale"))
    check(case, variant, rmse=3e-8 * ratio + 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_added_may_cancel_the_mean(device: str, variant: str) -> None:
    case = make((2, 8, 2, 6, 6), torch.float32, torch.channels_last, device, mean=100.0, given=("sample_shift",))
    case.tensors["sample_shift"] -= 100
    actual, exact = run(case, variant), case.exact()
    # Both mean and x are rounded at 100 deviations; plain torch adds first, which is exact here.
    for name in actual:
        error = (actual[name] - exact[name]).abs().max() / exact[name].abs().max()
        assert error <= 100 * torch.finfo(torch.float32).eps, f"{name}: {error}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_constant_groups(device: str, dtype: torch.dtype, variant: str) -> None:
    case = make((2, 12, 3, 6, 6), dtype, torch.channels_last, device, given=())
    case.tensors["x"][:, :4] = 3.3
    case.tensors["x"][1] = -1000.7
    actual, exact = run(case, variant), case.exact()
    # The deviation from a constant's mean is exactly zero: y is act(bias), and no gradient reaches the weight.
    assert_close_to_float64("y", actual["y"], case.plain()["y"], exact["y"])
    assert torch.equal(actual["y"][1, 0], actual["y"][1, 0, :1, :1].expand(6, 6))
    for name in ("x", "weight", "bias"):
        scale = exact[name].abs().max()
        assert (actual[name] - exact[name]).abs().max() <= 4 * torch.finfo(dtype).eps * scale, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES[1:])
def test_fp32_weights_with_a_narrower_x(device: str, dtype: torch.dtype, variant: str) -> None:
    case = make((2, 12, 2, 5, 5), dtype, torch.channels_last, device, vector_dtype=torch.float32)
    check(case, variant)


def test_vectors_of_mixed_types(device: str) -> None:
    case = make((2, 12, 2, 5, 5), torch.float16, torch.channels_last, device)
    for name in ("weight", "sample_shift", "scale"):
        case.tensors[name] = case.tensors[name].float()
    check(case, "registers")
    check(case, "two_pass")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stay_in_their_group(device: str, layout: Any, bad: float, variant: str) -> None:
    case = make((2, 16, 4, 7, 9), torch.float32, layout, device)
    assert kernel_plan(case, "registers").groups > 1, "a program must hold neighbours of the group"
    case.tensors["x"][1, 5, 2, 3] = bad
    actual, plain = run(case, variant), case.plain()
    group = torch.zeros(2, 16, dtype=torch.bool, device=device)
    group[1, 4:8] = True
    for name in ("y", "x"):
        assert torch.equal(actual[name].isnan(), plain[name].isnan()), name
        assert torch.equal(actual[name].isnan().flatten(2).all(-1), group), name
        assert torch.equal(actual[name].isnan().flatten(2).any(-1), group), name
    for name in ("weight", "bias", "channel_bias"):
        assert torch.equal(actual[name].isnan(), group[1]), name
    for name in ("sample_shift", "scale", "shift"):
        assert torch.equal(actual[name].isnan(), group), name


@pytest.mark.parametrize("shape", [(2, 24, 4, 8, 8), CHUNKED])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variants_agree(device: str, layout: Any, shape: Any) -> None:
    case = make(shape, torch.float32, layout, device)
    first, second = (run(case, variant) for variant in VARIANTS)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_runs_agree_bit_by_bit_and_leave_their_inputs_alone(device: str, variant: str) -> None:
    case = make((2, 12, 3, 28, 30), torch.float16, torch.channels_last, device)
    before = {name: tensor.clone() for name, tensor in case.tensors.items()}
    first, second = run(case, variant), run(case, variant)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(case.tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_y_may_have_any_layout(device: str, layout: Any, variant: str) -> None:
    case = make((2, 12, 2, 4, 5), torch.float32, layout, device)
    expected = run(case, variant)
    dy = case.dy
    strided = torch.zeros(2, 12, 4, 10, device=device)[..., ::2]
    strided.copy_(dy)
    for other in (dy.contiguous(), dy.contiguous(memory_format=torch.channels_last), strided):
        actual = run(Case(**{**vars(case), "dy": other}), variant)
        assert actual["x"].stride() == case.tensors["x"].stride()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_joint_projection_are_read_where_they_are(device: str, variant: str) -> None:
    case = make((3, 12, 2, 4, 5), torch.float32, torch.channels_last, device)
    expected = run(case, variant)
    joint = torch.cat([case.tensors["scale"], case.tensors["shift"]], dim=1)
    scale, shift = joint.chunk(2, dim=1)
    column_major = case.tensors["sample_shift"].t().contiguous().t()
    moved: dict[str, Tensor] = {"scale": scale, "shift": shift, "sample_shift": column_major}
    actual = run(Case(**{**vars(case), "tensors": {**case.tensors, **moved}}), variant)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_gradients_that_are_needed(device: str, variant: str) -> None:
    case = make((2, 12, 2, 9, 16), torch.float32, torch.channels_last, device)
    everything = run(case, variant)
    names = ("x", "weight", "bias", *VECTORS)
    for wanted in itertools.chain(((name,) for name in names), [(), ("x", "scale")]):
        actual = run(case, variant, needs=[name in wanted for name in names])
        assert set(actual) == {"y", *wanted}
        assert all(torch.equal(actual[name], everything[name]) for name in wanted), wanted


def test_the_reference_keeps_type_and_layout() -> None:
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), LAYOUTS):
        x = torch.randn(2, 8, 3, 3).to(dtype).contiguous(memory_format=layout)
        weight = torch.randn(8)
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = reference.group_norm_silu(x, 2, weight, weight, channel_bias=weight)
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=layout)


def test_the_reference_rounds_mixed_types_once() -> None:
    x, weight, added = torch.randn(2, 8, 5, 5).bfloat16(), torch.randn(8), torch.randn(2, 8)
    expected = reference.group_norm_silu(x.float(), 2, weight, weight, sample_shift=added).bfloat16()
    assert torch.equal(reference.group_norm_silu(x, 2, weight, weight, sample_shift=added), expected)
