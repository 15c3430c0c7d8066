"""One test per defect that group norms of other projects are known to have had."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers.group_norm_silu import VECTORS, check, kernel_plan, make, run

pytest.importorskip("triton", reason="the kernels need triton")

from ldm_kernels.group_norm_silu import parts, single_read, two_pass, two_pass_backward

MODULES = (parts, single_read, two_pass, two_pass_backward)
VARIANTS = ["two_pass", "registers"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_silus_derivative_is_taken_after_weight_and_bias(device: str, variant: str) -> None:
    case = make((1, 4, 1, 6, 6), torch.float32, torch.channels_last, device, given=())
    case.tensors["weight"] *= 3
    case.tensors["bias"] -= 2
    check(case, variant)
    case.tensors["weight"], case.tensors["bias"] = torch.ones(4, device=device), torch.zeros(4, device=device)
    without = run(case, variant)["bias"]
    case.tensors["bias"] = torch.full((4,), -2.0, device=device)
    assert (run(case, variant)["bias"] - without).abs().max() > 1, "bias does not reach the derivative"


@pytest.mark.parametrize("variant", VARIANTS)
def test_statistics_are_not_rounded_to_the_inputs_type(device: str, variant: str) -> None:
    from ldm_kernels.group_norm_silu import kernel

    case = make((1, 8, 2, 6, 6), torch.float16, torch.channels_last, device, given=(), mean=7.3)
    x, weight, bias = case.tensors.values()
    forced: Any = variant
    _, mean, rstd = kernel.group_norm_silu_fwd(x, 2, weight, bias, 1e-5, True, None, None, None, None, variant=forced)
    assert mean.dtype == rstd.dtype == torch.float32
    groups = x.double().reshape(1, 2, -1)
    expected = groups.mean(-1)
    assert (mean - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (rstd - (groups.var(-1, correction=0) + 1e-5).rsqrt()).abs().max() <= 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_variance_is_not_a_difference_of_large_squares(device: str, variant: str) -> None:
    from ldm_kernels.group_norm_silu import kernel

    case = make((1, 8, 2, 20, 20), torch.float32, torch.channels_last, device, given=(), mean=1000)
    x, weight, bias = case.tensors.values()
    forced: Any = variant
    rstd = kernel.group_norm_silu_fwd(x, 2, weight, bias, 1e-5, True, None, None, None, None, variant=forced)[2]
    expected = (x.double().reshape(1, 2, -1).var(-1, correction=0) + 1e-5).rsqrt()
    # E[x^2] - mean^2 is wrong by a fifth here in fp32.
    assert ((rstd - expected) / expected).abs().max() <= 1e-5


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_first_tile_unlike_the_others_costs_no_digits(device: str, layout: Any) -> None:
    case = make((1, 4, 1, 24, 26), torch.float32, layout, device, given=())
    case.tensors["x"][:, :, 4:] += 1000
    assert kernel_plan(case, "two_pass").chunk_tiles > 1
    check(case, "two_pass")


@pytest.mark.parametrize("variant", VARIANTS)
def test_eps_counts_where_the_variance_is_zero(device: str, variant: str) -> None:
    case = make((1, 4, 2, 3, 3), torch.float32, torch.channels_last, device, given=())
    case.tensors["x"].fill_(0.25)
    case.eps = 0.01
    from ldm_kernels.group_norm_silu import kernel

    forced: Any = variant
    x, weight, bias = case.tensors.values()
    _, mean, rstd = kernel.group_norm_silu_fwd(x, 2, weight, bias, 0.01, True, None, None, None, None, variant=forced)
    assert mean.tolist() == [[0.25, 0.25]]
    torch.testing.assert_close(rstd, torch.full_like(rstd, 10.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("module", MODULES)
def test_no_kernel_uses_atomics(module: ModuleType) -> None:
    called = {ast.unparse(node.func) for node in ast.walk(_tree(module)) if isinstance(node, ast.Call)}
    assert "tl.load" in called
    assert not [name for name in called if "atomic" in name]


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_gradients_are_the_same_at_every_run(device: str, variant: str) -> None:
    case = make((5, 8, 2, 12, 12), torch.float32, torch.channels_last, device)
    first = run(case, variant)
    for _ in range(3 if device == "cpu" else 50):
        again = run(case, variant)
        assert all(torch.equal(first[name], again[name]) for name in ("weight", "bias", *VECTORS))


@pytest.mark.parametrize("module", MODULES)
def test_offsets_of_a_sample_are_64_bit(module: ModuleType) -> None:
    """In every kernel, an index of samples (or of parts of them) is widened before it multiplies anything."""
    kernels = [f for f in _tree(module).body if isinstance(f, ast.FunctionDef) and f.name.endswith("_kernel")]
    assert kernels
    for function in kernels:
        narrow: set[str] = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                value, name = ast.unparse(node.value), node.targets[0].id
                if name in ("i_n", "i_ng", "o_n") and "tl.int64" not in value and "i_ng //" not in value:
                    narrow.add(name)
                if name == "i_part":
                    narrow.add(name)
        assert narrow <= {"i_part"}, f"{function.name}: {narrow} are 32-bit"
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                factors = {ast.unparse(node.left), ast.unparse(node.right)}
                assert "i_part" not in factors, f"{function.name}: {ast.unparse(node)} is 32-bit"


def test_offsets_beyond_2_to_the_31_in_the_last_sample(device: str) -> None:
    if device == "cpu":
        pytest.skip("needs 17 GB on a GPU: twice 4.3e9 elements of two bytes")
    from ldm_kernels.group_norm_silu import kernel

    last = torch.randn(1, 64, 256, 256, device=device, dtype=torch.float16)
    weight = bias = torch.ones(64, device=device)
    try:
        x = torch.empty(1025, 64, 256, 256, dtype=torch.float16, device=device, memory_format=torch.channels_last)
        x.zero_()
        x[-1:] = last
        y = kernel.group_norm_silu_fwd(x, 32, weight, bias, 1e-5, True, None, None, None, None)[0]
    except torch.OutOfMemoryError:
        pytest.skip("needs 17 GB of free GPU memory")
    expected = kernel.group_norm_silu_fwd(
        last.contiguous(memory_format=torch.channels_last), 32, weight, bias, 1e-5, True, None, None, None, None
    )[0]
    # The batch decides how many chunks are merged, and so the last digits; a wrapped offset is off by whole units.
    torch.testing.assert_close(y[-1:], expected, rtol=2e-3, atol=2e-3)


def test_more_than_256_samples(device: str) -> None:
    # The interpreter takes 20 ms a program: the two-pass variant has three times as many.
    for variant in ("registers",) if device == "cpu" else VARIANTS:
        check(make((257, 2, 1, 1, 3), torch.float32, torch.channels_last, device), variant)


def _tree(module: ModuleType) -> ast.Module:
    return ast.parse(inspect.getsource(module))
