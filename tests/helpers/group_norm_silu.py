"""Cases for the tests of group_norm_silu: tensors of one call, and the three ways to compute it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ldm_kernels.group_norm_silu import reference
from tests.helpers.kernels import RMSE_BOUNDS, assert_close_to_float64, gradients, gradients_in_float64

VECTORS = ("channel_bias", "sample_shift", "scale", "shift")


@dataclass
class Case:
    """One call: `tensors` holds x, weight, bias and those of VECTORS that are given, by name."""

    tensors: dict[str, Tensor]
    num_groups: int
    dy: Tensor
    silu: bool = True
    eps: float = 1e-5

    def reference(self, *values: Tensor) -> Tensor:
        named = dict(zip(self.tensors, values, strict=True))
        return reference.group_norm_silu(
            num_groups=self.num_groups, eps=self.eps, activation="silu" if self.silu else None, **cast(Any, named)
        )

    def plain(self) -> dict[str, Tensor]:
        """y and every gradient by name, by plain torch in the tensors' own types."""
        return self._named(gradients(self.reference, list(self.tensors.values()), self.dy))

    def exact(self) -> dict[str, Tensor]:
        """y and every gradient by name, in float64."""
        return self._named(gradients_in_float64(self.reference, list(self.tensors.values()), self.dy))

    def _named(self, computed: tuple[Tensor, tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {"y": computed[0], **dict(zip(self.tensors, computed[1], strict=True))}


def make(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: str,
    given: Sequence[str] = VECTORS,
    silu: bool = True,
    mean: float = 0.5,
    vector_dtype: torch.dtype | None = None,
) -> Case:
    """A random case of shape (N, C, groups, H, W), the values already rounded to their types."""
    batch, channels, num_groups, height, width = shape
    x = torch.randn(batch, channels, height, width) + mean
    tensors = {"x": x.to(device, dtype).contiguous(memory_format=layout)}
    for name in ("weight", "bias", *given):
        size = (batch, channels) if name in ("sample_shift", "scale", "shift") else (channels,)
        tensors[name] = torch.randn(size).to(device, vector_dtype or dtype)
    dy = torch.randn(batch, channels, height, width).to(device, dtype).contiguous(memory_format=layout)
    return Case(tensors, num_groups, dy, silu)


def run(case: Case, variant: str | None, needs: Sequence[bool] | None = None) -> dict[str, Tensor]:
    """y and every gradient (every needed one) by name, by the kernels of that variant, forward and backward."""
    from ldm_kernels.group_norm_silu import kernel

    names = ("x", "weight", "bias", *VECTORS)
    x, weight, bias, *optional = (case.tensors.get(name) for name in names)
    forced: Any = variant
    y, mean, rstd = kernel.group_norm_silu_fwd(
        x, case.num_groups, weight, bias, case.eps, case.silu, *optional, variant=forced
    )
    computed = kernel.group_norm_silu_bwd(
        case.dy, x, mean, rstd, case.num_groups, weight, bias, case.silu, *optional, variant=forced, needs=needs
    )
    result = {"y": y}
    for index, (name, gradient) in enumerate(zip(names, computed, strict=True)):
        if name in case.tensors and (needs is None or needs[index]):
            result[name] = gradient
        else:
            assert gradient.numel() == 0, f"{name}: a gradient that nobody asked for"
    return result


def kernel_plan(case: Case, variant: str | None, backward: bool = False) -> Any:
    """What the table gives the kernels for this case."""
    from ldm_kernels.group_norm_silu import kernel

    forced: Any = variant
    return kernel.plan_for(case.tensors["x"], case.num_groups, backward, forced)


def check(case: Case, variant: str | None, rmse: float | None = None) -> None:
    """Raises unless y and every gradient are as near to float64 as plain torch's, and keep type and layout.

    The vectors' gradients are sums of n terms, which fp32 knows to about sqrt(n) of its units in whatever order; one of
    few elements may be nearer in plain torch by luck, so that they get this much on top of twice its error.
    """
    actual, plain, exact = run(case, variant), case.plain(), case.exact()
    x = case.tensors["x"]
    assert actual["y"].stride() == actual["x"].stride() == x.stride()
    terms = x[0].numel() / case.num_groups
    for name in actual:
        if name in ("y", "x"):
            assert_close_to_float64(name, actual[name], plain[name], exact[name], rmse)
        else:
            _assert_sum_close(name, actual[name], plain[name], exact[name], terms, rmse)


def _assert_sum_close(
    name: str, actual: Tensor, plain: Tensor, exact: Tensor, terms: float, rmse: float | None
) -> None:
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype} instead of {plain.dtype}"
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    ours, theirs = (x.double() - exact for x in (actual, plain))
    assert ours.isfinite().all(), f"{name}: {int((~ours.isfinite()).sum())} elements are not finite"
    slack = terms**0.5 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    for measure in (lambda x: float(x.square().mean().sqrt()), lambda x: float(x.abs().max())):
        limit = 2 * measure(theirs) + slack
        assert measure(ours) <= limit, f"{name}: error {measure(ours):.3g} over {limit:.3g}"
    relative = float(ours.norm() / exact.norm())
    bound = RMSE_BOUNDS[actual.dtype] if rmse is None else rmse
    assert relative <= bound, f"{name}: relative RMSE {relative:.3g} over {bound:g}"
