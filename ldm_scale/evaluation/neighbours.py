"""Precision, recall, density and coverage: figures of who lies within the reach of whose nearest neighbours.

All four come from the same distances, and so do their values over subsets of the samples, which confidence intervals
need: one pass over the pairs gives everything, where a call for each figure and subset would take each distance a
hundred times. Precision and recall equal torch-fidelity's. Balls are closed, so that equal sets reach 1 whatever
copies they hold.
Source: arXiv:1904.06991 (precision, recall), arXiv:2002.09797 (density, coverage).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PRECISION_NEIGHBOUR = 3
DENSITY_NEIGHBOUR = 5
NAMES = ("precision", "recall", "density", "coverage")
LEAST = DENSITY_NEIGHBOUR + 1  # vectors that have so many neighbours
_NUMBERS_AT_ONCE = 2**25  # distances; 256 MiB
_ROUNDING = 1e-12  # of the squared lengths, below which two vectors are equal ones


def neighbour_figures(made: Tensor, real: Tensor, subsets: Sequence[Tensor]) -> list[dict[str, float]]:
    """The four figures of each subset of the samples against all real images.

    Precision: share of samples within the ball of a real image, which reaches to its third neighbour; recall: share of
    real images within the ball of a sample. Density: balls that a sample lies in, over five, with balls that reach to
    the fifth neighbour; coverage: share of such balls that hold a sample.
    Shapes: made (M, D), real (N, D), at least LEAST in each; subsets hold numbers of samples, (m,) int64 with
    m >= LEAST.
    """
    assert min(len(real), *map(len, subsets)) >= LEAST, "every vector has enough neighbours"
    centre = real.double().mean(dim=0)  # smaller numbers round less
    made, real = made.double() - centre, real.double() - centre
    member = torch.zeros(len(subsets), len(made), dtype=torch.float64)
    for row, subset in zip(member, subsets, strict=True):
        row[subset] = 1.0
    near, far = _real_radii(real)
    radii = _made_radii(made, subsets)
    inside, balls, held = _made_in_real(made, real, near, far, member)
    sizes = member.sum(dim=1)
    columns = {
        "precision": inside / sizes,
        "recall": _real_in_made(made, real, radii),
        "density": balls / (DENSITY_NEIGHBOUR * sizes),
        "coverage": held,
    }
    return [{name: float(values[i]) for name, values in columns.items()} for i in range(len(subsets))]


def _real_radii(real: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of each real image from its third and fifth neighbour. Shapes: (N,) both."""
    found = []
    for begin, distances in _distances(real, real):
        _leave_self_out(distances, begin)
        found.append(distances.topk(DENSITY_NEIGHBOUR, largest=False).values)
    nearest = torch.cat(found)
    return nearest[:, PRECISION_NEIGHBOUR - 1], nearest[:, DENSITY_NEIGHBOUR - 1]


def _made_radii(made: Tensor, subsets: Sequence[Tensor]) -> Tensor:
    """Squared distance of each sample from its third neighbour in each subset; -1 where it is not of it.

    Shapes: returns (subsets, M).
    """
    radii = torch.full((len(subsets), len(made)), -1.0, dtype=torch.float64)
    for begin, distances in _distances(made, made):
        _leave_self_out(distances, begin)
        for row, subset in zip(radii, subsets, strict=True):
            here = subset[(subset >= begin) & (subset < begin + len(distances))]
            if len(here):
                row[here] = distances[here - begin][:, subset].kthvalue(PRECISION_NEIGHBOUR, dim=1).values
    return radii


def _made_in_real(
    made: Tensor, real: Tensor, near: Tensor, far: Tensor, member: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each subset: samples within a near ball, far balls over all samples, share of far balls with a sample.

    Shapes: returns (subsets,) each.
    """
    inside, samples_in = torch.zeros(len(member)).double(), torch.zeros(len(member), len(real)).double()
    for begin, distances in _distances(made, real):
        chosen = member[:, begin : begin + len(distances)]
        inside += chosen @ (distances <= near).any(dim=1).double()
        samples_in += chosen @ (distances <= far).double()
    return inside, samples_in.sum(dim=1), (samples_in > 0).double().mean(dim=1)


def _real_in_made(made: Tensor, real: Tensor, radii: Tensor) -> Tensor:
    """Of each subset: share of real images within the ball of one of its samples. Shapes: returns (subsets,)."""
    hits = torch.zeros(len(radii), dtype=torch.float64)
    for _, distances in _distances(real, made):
        for number, row in enumerate(radii):
            hits[number] += (distances <= row).any(dim=1).sum()
    return hits / len(real)


def _distances(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Number of the first row, and squared distances of some rows from all columns. Shapes: (rows, len(columns))."""
    step = max(1, _NUMBERS_AT_ONCE // len(columns))
    lengths = columns.square().sum(dim=1)
    for begin in range(0, len(rows), step):
        part = rows[begin : begin + step]
        sums = part.square().sum(dim=1, keepdim=True) + lengths
        distances = sums - 2 * part @ columns.T
        distances[distances < _ROUNDING * sums] = 0.0
        yield begin, distances


def _leave_self_out(distances: Tensor, begin: int) -> None:
    numbers = torch.arange(len(distances))
    distances[numbers, begin + numbers] = torch.inf
