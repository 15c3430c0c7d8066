"""What is measured: a shape of shapes.py at a batch and a type, its inputs, and how far a result is from exact.

Inputs are random, activations of norms as -2.3 + 0.5 * randn (an offset that a careless variance does not survive);
never zeros, on which a GPU can run faster than on data. The exact result is float64, computed slice by slice along the
batch: it needs a slice's memory, and gradients of what a batch shares are summed over the slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_kernels.attention.reference import attention as plain_attention
from ldm_kernels.common.shapes import Shape
from ldm_kernels.geglu.reference import geglu as plain_geglu
from ldm_kernels.group_norm_silu.reference import group_norm_silu as plain_group_norm_silu

EPS = 1e-5
DECAYS = (0.9999, 0.999)
PARAMETER_SIZES = (1280 * 1280 * 9, 320 * 320 * 9, 10240 * 1280, 1280, 320)  # of convolutions, matrices and norms
SLICE_ELEMENTS = 2**24  # float64 elements of the largest input held at once for the exact result
SCORE_ELEMENTS = 2**27  # float64 elements of an attention matrix held at once

Results = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Case:
    """A shape at a batch and a type. ema_update and its like ignore the batch."""

    shape: Shape
    batch: int
    dtype: torch.dtype

    @property
    def operation(self) -> str:
        """The operation's folder in ldm_kernels: cross-attention is attention's."""
        return "attention" if self.shape.operation == "cross_attention" else self.shape.operation

    @property
    def name(self) -> str:
        """All that tells the case from others, such as group_norm_silu sd2-64 b8 320x64x64 bfloat16."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.shape.operation} {self.shape.model} b{self.batch} {self.shape.name} {dtype}"


@dataclass
class Problem:
    """A case's tensors on a device.

    `leaves` are what the operation takes, those with a gradient first (`num_differentiable`); the names in `batched`
    have the batch as their first dimension. `grad_output` is None for operations without a backward pass.
    """

    case: Case
    leaves: dict[str, Tensor]
    batched: frozenset[str]
    plain: Callable[..., Tensor]  # the definition on the leaves by name
    grad_output: Tensor | None = None
    decays: tuple[float, ...] = field(default=())

    def cast(self, dtype: torch.dtype, rows: slice | None = None) -> dict[str, Tensor]:
        """The leaves in another type, of some rows of the batch only."""
        return {
            name: (leaf.detach()[rows] if rows is not None and name in self.batched else leaf.detach()).to(dtype)
            for name, leaf in self.leaves.items()
        }


def make_problem(case: Case, device: torch.device) -> Problem:
    """The case's inputs, the same for the same case."""
    generator = torch.Generator(device).manual_seed(sum(map(ord, case.name)))
    return _PROBLEMS[case.shape.operation](case, device, generator)


def backward(problem: Problem, output: Tensor, leaves: dict[str, Tensor], grad_output: Tensor) -> dict[str, Tensor]:
    """Gradients of the leaves by name."""
    gradients = torch.autograd.grad(output, list(leaves.values()), grad_output, retain_graph=True)
    return dict(zip(leaves, gradients, strict=True))


def errors(problem: Problem, results: Sequence[Results]) -> list[dict[str, float]]:
    """|result - exact| / |exact| of the output and of each gradient, for every candidate's results."""
    assert problem.grad_output is not None
    exact_gradients: dict[str, Tensor] = {}
    sums = [{"output": [0.0, 0.0]} | {name: [0.0, 0.0] for name in problem.leaves} for _ in results]
    for rows in _slices(problem):
        leaves = {name: leaf.requires_grad_() for name, leaf in problem.cast(torch.float64, rows).items()}
        output = problem.plain(**leaves)
        gradients = backward(problem, output, leaves, problem.grad_output[rows].double())
        for (actual, actual_gradients), total in zip(results, sums, strict=True):
            _add(total["output"], actual[rows], output.detach())
            for name in problem.batched:
                _add(total[name], actual_gradients[name][rows], gradients[name])
        for name in set(leaves) - problem.batched:
            exact_gradients[name] = exact_gradients.get(name, torch.zeros_like(gradients[name])) + gradients[name]
    for (_, actual_gradients), total in zip(results, sums, strict=True):
        for name, exact in exact_gradients.items():
            _add(total[name], actual_gradients[name], exact)
    return [{name: (a / max(b, 1e-300)) ** 0.5 for name, (a, b) in total.items()} for total in sums]


def forward_error(problem: Problem, output: Tensor) -> float:
    """The same for an operation without a backward pass.

    vector_quantize: the excess of the chosen codes' distances over the smallest, relative (the order of ties is the
    tests' business); ema_update: of all averages together.
    """
    total = [0.0, 0.0]
    leaves = problem.leaves
    if problem.case.operation == "vector_quantize":
        codebook = leaves["codebook"].double()
        for rows in leaves["z"].split(4096):
            chosen, output = output[: len(rows)], output[len(rows) :]
            if int(chosen.min()) < 0 or int(chosen.max()) >= len(codebook):
                return float("inf")
            z = rows.double()
            nearest = torch.cdist(z, codebook).amin(1)
            total[0] += float(((z - codebook[chosen]).norm(dim=1) - nearest).abs().sum())
            total[1] += float(nearest.sum())
        return total[0] / max(total[1], 1e-300)
    for decay, updated in zip(problem.decays, output.chunk(len(problem.decays)), strict=True):
        parts = (x.split(SLICE_ELEMENTS) for x in (updated, leaves["averages"], leaves["weights"]))
        for actual, average, weight in zip(*parts, strict=True):
            _add(total, actual, average.double() + (1.0 - decay) * (weight.double() - average.double()))
    return float((total[0] / max(total[1], 1e-300)) ** 0.5)


def _add(total: list[float], actual: Tensor, exact: Tensor) -> None:
    total[0] += float((actual.detach().double() - exact).square().sum())
    total[1] += float(exact.square().sum())


def _slices(problem: Problem) -> list[slice]:
    batch = problem.leaves[min(problem.batched)].shape[0]
    per_row = max(problem.leaves[name][0].numel() for name in problem.batched)
    rows = max(1, SLICE_ELEMENTS // per_row)
    if problem.case.operation == "attention":
        shape = problem.case.shape
        rows = max(1, min(rows, SCORE_ELEMENTS // (shape["heads"] * shape["queries"] * shape["keys"])))
    return [slice(start, start + rows) for start in range(0, batch, rows)]


def _group_norm_silu(case: Case, device: torch.device, generator: torch.Generator) -> Problem:
    shape, options = case.shape, {"device": device, "dtype": case.dtype, "generator": generator}
    channels = shape["channels"]
    size = (case.batch, channels, shape["height"], shape["width"])
    x = torch.empty(size, device=device, dtype=case.dtype, memory_format=torch.channels_last)
    x.normal_(-2.3, 0.5, generator=generator)
    leaves = {
        "x": x,
        "weight": 1 + 0.1 * torch.randn(channels, **options),
        "bias": 0.1 * torch.randn(channels, **options),
    }
    batched = {"x"}
    if shape["shifted"]:
        # The second norm of a residual block: the convolution's bias and the timestep come in.
        leaves["channel_bias"] = 0.1 * torch.randn(channels, **options)
        leaves["sample_shift"] = 0.1 * torch.randn(case.batch, channels, **options)
        batched.add("sample_shift")

    def plain(x: Tensor, weight: Tensor, bias: Tensor, **optional: Tensor) -> Tensor:
        activation = "silu" if shape["silu"] else None
        return plain_group_norm_silu(x, shape["groups"], weight, bias, EPS, activation, **optional)

    grad_output = torch.empty_like(x).normal_(generator=generator)
    return Problem(case, _requiring(leaves), frozenset(batched), plain, grad_output)


def _attention(case: Case, device: torch.device, generator: torch.Generator) -> Problem:
    shape, options = case.shape, {"device": device, "dtype": case.dtype, "generator": generator}
    heads, queries, keys, head_dim = (shape[name] for name in ("heads", "queries", "keys", "head_dim"))
    if shape.operation == "cross_attention":
        q = torch.randn(case.batch, queries, heads, head_dim, **options)
        parts = [q, *torch.randn(case.batch, keys, 2, heads, head_dim, **options).unbind(2)]
    else:
        parts = list(torch.randn(case.batch, queries, 3, heads, head_dim, **options).unbind(2))
    # Strided views of the projections, as in the models.
    leaves = {name: part.transpose(1, 2) for name, part in zip(("q", "k", "v"), parts, strict=True)}
    grad_output = torch.randn(case.batch, queries, heads, head_dim, **options).transpose(1, 2)
    return Problem(case, _requiring(leaves), frozenset(leaves), plain_attention, grad_output)


def _geglu(case: Case, device: torch.device, generator: torch.Generator) -> Problem:
    shape, options = case.shape, {"device": device, "dtype": case.dtype, "generator": generator}
    projection = torch.randn(case.batch, shape["tokens"], 2 * shape["width"], **options)
    grad_output = torch.randn(case.batch, shape["tokens"], shape["width"], **options)
    return Problem(case, _requiring({"projection": projection}), frozenset({"projection"}), plain_geglu, grad_output)


def _vector_quantize(case: Case, device: torch.device, generator: torch.Generator) -> Problem:
    shape, options = case.shape, {"device": device, "dtype": case.dtype, "generator": generator}
    z = torch.randn(case.batch * shape["vectors"], shape["dim"], **options)
    codebook = torch.randn(shape["codes"], shape["dim"], **options)
    return Problem(
        case,
        {"z": z, "codebook": codebook},
        frozenset({"z"}),
        lambda z, codebook: torch.cdist(z.float(), codebook.float()).argmin(1),
    )


def _ema_update(case: Case, device: torch.device, generator: torch.Generator) -> Problem:
    """One flat tensor of the weights; candidates split it by `parameter_sizes`."""
    options = {"device": device, "dtype": torch.float32, "generator": generator}
    averages, weights = (torch.randn(case.shape["parameters"], **options) for _ in range(2))
    return Problem(
        case,
        {"averages": averages, "weights": weights},
        frozenset(),
        F.mse_loss,
        decays=DECAYS[: case.shape["decays"]],
    )


def parameter_sizes(total: int) -> list[int]:
    """Sizes of tensors like a UNet's that add up to `total`."""
    sizes: list[int] = []
    left = total
    while left:
        sizes.append(min(PARAMETER_SIZES[len(sizes) % len(PARAMETER_SIZES)], left))
        left -= sizes[-1]
    return sizes


def _requiring(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


_PROBLEMS: dict[str, Callable[[Case, torch.device, torch.Generator], Problem]] = {
    "group_norm_silu": _group_norm_silu,
    "attention": _attention,
    "cross_attention": _attention,
    "geglu": _geglu,
    "vector_quantize": _vector_quantize,
    "ema_update": _ema_update,
}
