"""Kernel distance and Inception score of torch-fidelity, on given features; nothing else of the package is used.

Other networks' features give a kernel distance too. It is called KID only on FID's own.
Source: arXiv:1801.01401 (KID), arXiv:1606.03498 (Inception score).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ldm_scale.errors import ConfigError

INSTALL = "pip install 'ldm-scale[evaluation]' (or torch-fidelity alone)"
SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
LEAST_SCORED = 2 * SPLITS  # images of which every split has two
SEED = 2020  # of the package's command line, whose numbers these are
_NUMBERS_AT_ONCE = 2**25


def is_installed() -> bool:
    """Whether the environment has torch-fidelity."""
    return find_spec("torch_fidelity") is not None


def require_installed(what: str) -> None:
    """Nothing, if the environment has torch-fidelity.

    Raises: ConfigError.
    """
    if not is_installed():
        raise ConfigError(f"{what} needs torch-fidelity, which this environment lacks: {INSTALL}")


def subset_size(num_made: int, num_real: int) -> int:
    """Images in each subset that a kernel distance is averaged over: 1000, or all there are."""
    return min(SUBSET_SIZE, num_made, num_real)


def kernel_distance(made: Tensor, real: Tensor) -> float:
    """Squared maximum mean discrepancy under a cubic kernel, (x'y / D + 1)^3, the mean over 100 subsets.

    Without bias: around 0, and often below, where both sets are of one distribution. Of sets with fewer than 1000
    images, subsets are as large as the smaller one.
    Shapes: (M, D) and (N, D), at least two in each.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = subset_size(len(made), len(real))
    subsets = 1 if size == len(made) == len(real) else SUBSETS  # each would be all of both
    found = kid_features_to_metric(
        made.double(), real.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=SEED, verbose=False
    )
    return float(found[KEY_METRIC_KID_MEAN])


def kernel_distances(made: Tensor, real: Tensor, subsets: Sequence[Tensor]) -> list[float]:
    """The same distance of each subset of the samples from the real images, over all pairs at once.

    For its spread over subsets. The pairs of real images add the same to each, and are left out.
    Shapes: subsets hold numbers of samples, (m,) int64, at least two each.
    """
    made, real = made.double(), real.double()
    member = torch.zeros(len(made), len(subsets), dtype=torch.float64)
    for column, subset in enumerate(subsets):
        member[subset, column] = 1.0
    within, across = torch.zeros(len(subsets)).double(), torch.zeros(len(subsets)).double()
    step = max(1, _NUMBERS_AT_ONCE // max(len(made), len(real)))
    for begin in range(0, len(made), step):
        part, chosen = made[begin : begin + step], member[begin : begin + step]
        kernel = _kernel(part, made)
        numbers = torch.arange(len(part))
        kernel[numbers, begin + numbers] = 0.0  # pairs of an image with itself
        within += (chosen * (kernel @ member)).sum(dim=0)
        across += chosen.T @ _kernel(part, real).mean(dim=1)
    sizes = member.sum(dim=0)
    return [float(value) for value in within / (sizes * (sizes - 1)) - 2 * across / sizes]


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the Inception score over ten splits; between 1 and the number of classes.

    Shapes: logits (N, classes) without the classifier's bias, as the original program had them; N >= LEAST_SCORED.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=SPLITS, shuffle=True, rng_seed=SEED)
    return float(found[KEY_METRIC_ISC_MEAN]), float(found[KEY_METRIC_ISC_STD])


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1).pow(3)
