"""Kernel distance and Inception score of torch-fidelity, on given features; nothing else of the package is used.

Other networks' features give a kernel distance too. It is called KID only on FID's own.
Source: arXiv:1801.01401 (KID), arXiv:1606.03498 (Inception score).
"""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from ldm_scale.errors import ConfigError

INSTALL = "pip install 'ldm-scale[evaluation]' (or torch-fidelity alone)"
SUBSETS, SUBSET_SIZE = 100, 1000
SPLITS = 10
LEAST_SCORED = 2 * SPLITS  # images of which every split has two
SEED = 2020  # of the package's command line, whose numbers these are
LEAST_JUDGED = 8  # samples that a kernel distance's error can be told from


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

    size, subsets = subset_size(len(made), len(real)), _num_subsets(len(made), len(real))
    found = kid_features_to_metric(
        made.double(), real.double(), kid_subsets=subsets, kid_subset_size=size, rng_seed=SEED, verbose=False
    )
    return float(found[KEY_METRIC_KID_MEAN])


def kernel_error(made: Tensor, real: Tensor) -> float:
    """Standard error of `kernel_distance` over other samples of the same model, beside the same real images.

    The jackknife of that very estimator: what each sample adds to it through all the subsets that hold it, beside what
    the other samples of a subset add. The sum of the squares is the variance of the part that is linear in the samples,
    and twice that of the pairs' part, which is all there is between equal distributions: never too small on average.
    Shapes: (M, D) and (N, D), M at least LEAST_JUDGED.
    Source: Efron and Stein 1981, "The jackknife estimate of variance".
    """
    made, real = made.double(), real.double()
    draws = _draws(len(made), len(real))
    added = torch.zeros(len(made), dtype=torch.float64)
    for of_made, of_real in draws:
        x, size = made[of_made], len(of_made)
        within, across = _kernel(x, x).fill_diagonal_(0.0), _kernel(x, real[of_real])
        terms = 2 * within.sum(dim=1) / (size * (size - 1)) - 2 * across.mean(dim=1) / size
        added[of_made] += (terms - terms.mean()) / len(draws)
    count = subset_size(len(made), len(real))
    return float((added.square().sum() * count / (count - 1)).sqrt())


def _draws(num_made: int, num_real: int) -> list[tuple[Tensor, Tensor]]:
    """Numbers of the samples and of the real images of each subset, as torch-fidelity draws them."""
    size, generator = subset_size(num_made, num_real), np.random.RandomState(SEED)
    return [
        (
            torch.from_numpy(generator.choice(num_made, size, replace=False)),
            torch.from_numpy(generator.choice(num_real, size, replace=False)),
        )
        for _ in range(_num_subsets(num_made, num_real))
    ]


def _num_subsets(num_made: int, num_real: int) -> int:
    """One where each would be all of both sets."""
    return 1 if subset_size(num_made, num_real) == num_made == num_real else SUBSETS


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of the Inception score over ten splits; between 1 and the number of classes.

    Shapes: logits (N, classes) without the classifier's bias, as the original program had them; N >= LEAST_SCORED.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(logits, splits=SPLITS, shuffle=True, rng_seed=SEED)
    return float(found[KEY_METRIC_ISC_MEAN]), float(found[KEY_METRIC_ISC_STD])


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1).pow(3)
