"""How well a denoiser denoises at each level of noise, beside predictors that have learnt nothing.

The denoising loss over random times is one number dominated by where it happens to be large. Here every image is noised
once in each of several equal parts of the noise range, with noise and times that depend on the image's number alone:
the same at every validation, for raw and averaged weights and on any number of ranks, so that two numbers differ
because the models do.

The loss is the squared error of the network's own output, without weights: what training minimises, up to its
weighting and its distribution of times. Two predictors stand beside it. `predict_zero` is where training starts, since
the network's last layer starts at zero. `linear_predictor` knows the latents' mean and variance per channel and nothing
else; a network that learnt any structure of images is better.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_scale.conditioning.base import Inputs
from ldm_scale.diffusion.loss import diffusion_loss
from ldm_scale.diffusion.process import Process, expand_like
from ldm_scale.engine import seeding
from ldm_scale.telemetry.log import shows_progress

NUM_BINS = 8
_NOISE_PURPOSE = "noise-level-losses"
_GOLDEN_RATIO_SHARE = (math.sqrt(5.0) - 1.0) / 2.0
_LAST_SHARE = 1.0 - 2.0**-20  # of the noise range: shares end before 1

Predictor = Callable[[Tensor, Tensor, Inputs], Tensor]  # z_t, t, inputs -> the network's output


@torch.no_grad()
def noise_level_losses(
    predict: Predictor,
    latents: Tensor,
    inputs: Inputs,
    process: Process,
    seed: int,
    image_numbers: Sequence[int] | None = None,
    num_bins: int = NUM_BINS,
    batch_size: int = 64,
) -> Tensor:
    """Mean squared error of `predict`'s output, of every image in every part of the noise range, least noisy first.

    `image_numbers` are the images' places in the whole validation set, which choose their noise and times; None counts
    from 0. A rank that holds a part of the set passes that part's numbers.
    Shapes: latents (N, c, h, w), inputs N rows each, on the device where `predict` runs; returns (N, num_bins),
    float64, on the CPU.
    Source: arXiv:2112.10752, eq. 2 (of whatever the network predicts).
    """
    num_images = len(latents)
    numbers = range(num_images) if image_numbers is None else image_numbers
    assert len(numbers) == num_images, f"{len(numbers)} numbers of {num_images} images"
    assert all(len(rows) == num_images for rows in inputs.values()), "one row of inputs per image is needed"
    images_per_batch = max(1, batch_size // num_bins)
    parts = []
    # A bar only for what takes long: during training this runs often and mostly within seconds.
    with tqdm(
        total=num_images,
        desc="noise levels",
        unit="images",
        mininterval=1.0,
        delay=3.0,
        leave=False,
        file=sys.stderr,
        disable=not shows_progress(),
    ) as bar:
        for begin in range(0, num_images, images_per_batch):
            chosen = slice(begin, begin + images_per_batch)
            streams = [seeding.stream(seed, _NOISE_PURPOSE, number) for number in numbers[chosen]]
            noise = seeding.normal(streams, (num_bins, *latents.shape[1:])).flatten(0, 1).to(latents.device)
            t = process.evaluation_times(_shares(numbers[chosen], num_bins).flatten()).to(latents.device)
            z0 = latents[chosen].float().repeat_interleave(num_bins, dim=0)
            rows = {name: given[chosen].repeat_interleave(num_bins, dim=0) for name, given in inputs.items()}
            output = predict(process.add_noise(z0, noise, t), t, rows)
            losses = diffusion_loss(output, process.target(z0, noise, t), "l2")
            parts.append(losses.double().cpu().view(len(streams), num_bins))
            bar.update(len(streams))
    return torch.cat([torch.zeros(0, num_bins, dtype=torch.float64), *parts])


def predict_zero(z_t: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
    """Zero, as the output of an untrained network."""
    return torch.zeros_like(z_t)


def linear_predictor(process: Process, mean: Tensor, variance: Tensor) -> Predictor:
    """The predictor of least squared error among those linear in the same element of z_t.

    For latents of independent Gaussian elements no predictor is better; it is the conditional mean of the target.
    With target = p z_0 + q noise and z_t = alpha z_0 + sigma noise it is
    p mean + (p alpha variance + q sigma) / (alpha^2 variance + sigma^2) (z_t - alpha mean).
    Shapes: mean and variance (c,), of the latents' channels.
    """

    def predict(z_t: Tensor, t: Tensor, inputs: Inputs) -> Tensor:
        one = torch.ones(len(t), device=z_t.device)
        zero = torch.zeros_like(one)
        shares = process.target(one, zero, t), process.target(zero, one, t), *process.coefficients(t)
        p, q, alpha, sigma = (expand_like(share, z_t) for share in shares)
        m, v = (x.to(z_t).view(1, -1, 1, 1) for x in (mean, variance))
        slope = (p * alpha * v + q * sigma) / (alpha.square() * v + sigma.square())
        return p * m + slope * (z_t - alpha * m)

    return predict


def log_snr_ranges(process: Process, num_bins: int = NUM_BINS) -> list[tuple[float, float]]:
    """ln(alpha^2 / sigma^2) at the beginning and the end of each part of the noise range."""
    shares = (torch.arange(num_bins + 1, dtype=torch.float64) / num_bins).clamp(max=_LAST_SHARE)
    edges = process.to("cpu").log_snr(process.evaluation_times(shares)).tolist()
    return list(itertools.pairwise(edges))


def other_rows(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """For each row the place of another that differs from it, the next one that does; and whether there is one.

    Rows without one get their own place. Shapes: inputs (N, ...); returns (N,) int64 and (N,) bool, on the CPU.
    """
    rows = inputs.reshape(len(inputs), max(1, math.prod(inputs.shape[1:])))
    _, kinds = torch.unique(rows, dim=0, return_inverse=True)
    same = (kinds[:, None] == kinds[None, :]).cpu()
    places = torch.arange(len(rows))
    distance = (places[None, :] - places[:, None]) % max(1, len(rows))
    distance = distance.masked_fill(same, len(rows))
    nearest, partner = distance.min(dim=1) if len(rows) else (places, places)
    found = nearest < len(rows)
    return torch.where(found, partner, places), found


def _shares(numbers: Sequence[int], num_bins: int) -> Tensor:
    """One share of the noise range per image and part, (N, num_bins) float64, at the same place in every part.

    The place of image i is the fraction of i times the golden ratio, which fills [0, 1) evenly however many images
    there are; random ones would leave gaps.
    """
    places = torch.tensor([(number + 0.5) * _GOLDEN_RATIO_SHARE % 1.0 for number in numbers], dtype=torch.float64)
    return (torch.arange(num_bins) + places[:, None]) / num_bins
