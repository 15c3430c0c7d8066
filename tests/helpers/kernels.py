"""What the tests of fused kernels share: types, layouts, and the comparison with float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm_kernels.common import launch

# Triton's interpreter truncates when it stores bfloat16, and computes nonsense in its matrix products.
FLOAT_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if torch.cuda.is_available() else [])
RMSE_BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}

NO_KERNELS = None if torch.cuda.is_available() or launch.INTERPRETED else "needs CUDA or TRITON_INTERPRET=1"


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The function's output on fresh leaves with the inputs' values and strides, and the gradient of each."""
    leaves = [_leaf(x) for x in inputs]
    output = function(*leaves)
    return output.detach(), torch.autograd.grad(output, leaves, grad_output.to(output.dtype))


def gradients_in_float64(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`gradients` on float64 copies of the same (already rounded) values."""
    return gradients(function, [x.double() for x in inputs], grad_output.double())


def assert_close_to_float64(name: str, actual: Tensor, plain: Tensor, exact: Tensor, rmse: float | None = None) -> None:
    """Error of `actual` at most twice that of `plain` (plain torch in the same type), and its relative RMSE bounded.

    Both in the mean square and in the maximum; the floor of two units of fp32 keeps an exact `plain` from asking for
    the impossible. `rmse` replaces the type's own bound.
    """
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype} instead of {plain.dtype}"
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    ours, theirs = (x.detach().double() - exact for x in (actual, plain))
    assert ours.isfinite().all(), f"{name}: {int((~ours.isfinite()).sum())} elements are not finite"
    for norm, measure in (("root mean square", _rms), ("maximum", _max)):
        floor = 2 * torch.finfo(torch.float32).eps * measure(exact)
        limit = 2 * measure(theirs) + floor
        assert measure(ours) <= limit, f"{name}: {norm} error {measure(ours):.3g} over {limit:.3g}"
    bound = RMSE_BOUNDS[actual.dtype] if rmse is None else rmse
    scale = _rms(exact)
    assert _rms(ours) <= bound * scale, f"{name}: relative RMSE {_rms(ours) / scale:.3g} over {bound:g}"


def _leaf(x: Tensor) -> Tensor:
    leaf = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    with torch.no_grad():
        leaf.copy_(x)
    return leaf.requires_grad_()


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def _max(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def other_layouts(network: nn.Module, *inputs: Tensor, ignore: type[nn.Module]) -> list[str]:
    """Modules of the network whose four-dimensional output, or its gradient, leaves channels_last in a training pass.

    Modules of the type `ignore` are left out: attention's four dimensions are no image.
    A gradient may be a slice of channels (the backward pass of a concatenation): its channels must be adjacent.
    """
    found: list[str] = []

    def look(name: str, y: object) -> None:
        if not isinstance(y, Tensor) or y.ndim != 4 or 1 in y.shape[1:]:
            return
        if not y.is_contiguous(memory_format=torch.channels_last):
            found.append(f"{name}: output {y.stride()}")
        if y.requires_grad:
            y.register_hook(lambda g: found.append(f"{name}: gradient {g.stride()}") if g.stride(1) != 1 else None)

    handles = [
        module.register_forward_hook(lambda _, __, y, name=name: look(name, y))
        for name, module in network.named_modules()
        if not isinstance(module, ignore)
    ]
    output = network(*inputs)
    (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
    for handle in handles:
        handle.remove()
    return found
