"""What others have published about the cost of these models, as printed, and what follows from it by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldm_scale.planning.devices import peak_flops

# What every use of Table 6 needs beside it.
TABLE_6_CAVEATS = (
    'The paper\'s column "samples/s" is not images a second: times the hours of an epoch it gives 8,200 to 8,800 for '
    "all four models, a plausible number of iterations. Only the ratios to LDM-1 are used.",
    "The paper names no GPU for this table, and says that batch sizes differ.",
    "The text promises a FID better by a factor of at least 1.6; the row without attention has 1.55.",
    "LDM-1's architecture is not printed. Ours has Table 14's levels at the LDM-4's number of parameters.",
    "A cache of latents holds no pictures, so inpainting, which masks them, always encodes here: twice a step.",
)


@dataclass(frozen=True)
class Table6Row:
    """A row of Table 6 of arXiv:2112.10752."""

    training: float  # "samples/s"; see the caveats
    sampling_256: float  # of the same doubtful unit
    sampling_512: float
    epoch_h: float  # training and validation
    fid: float  # after 6 epochs, on 2,000 images


TABLE_6 = {
    "LDM-1": Table6Row(0.11, 0.26, 0.07, 20.66, 24.74),
    "LDM-4 KL": Table6Row(0.32, 0.97, 0.34, 7.66, 15.21),
    "LDM-4 VQ": Table6Row(0.33, 0.97, 0.34, 7.04, 14.99),
    "LDM-4 VQ, no attention": Table6Row(0.35, 0.99, 0.36, 6.66, 15.95),
}
CLAIM = 2.7  # "speed-up of at least 2.7x" of LDM-4 over LDM-1 (section 4.5)


@dataclass(frozen=True)
class Table18Row:
    """A row of Table 18 of arXiv:2112.10752 whose images are known from Tables 12, 13 and 15."""

    what: str
    model: str  # key of ours
    v100_days: float
    images: int
    fid: float


TABLE_18 = (
    Table18Row("CelebA-HQ LDM-4, 410K steps of 48", "celeba/LDM-4", 14.4, 410_000 * 48, 5.11),
    Table18Row("ImageNet LDM-8, 2.9M steps of 64", "imagenet/LDM-8", 79.0, 2_900_000 * 64, 17.41),
    Table18Row("ImageNet LDM-4, 178K steps of 1200", "imagenet/LDM-4", 271.0, 178_000 * 1200, 10.56),
)


@dataclass(frozen=True)
class Gpu:
    """A GPU's peak in half precision, and the share of it that published trainings of such networks reach."""

    peak: float  # FLOP/s
    utilisation: float
    source: str


def _bf16(name: str) -> float:
    peak = peak_flops(name, torch.bfloat16)
    assert peak is not None, f"{name} is in the table of devices"
    return peak


# The shares are of UNet steps with latents precomputed, but for V100's, which is of a UNet of pixels. All but ADM's are
# derived from images/s and counted FLOPs; none is a figure of ours.
GPUS = {
    "V100": Gpu(120e12, 0.36, "ADM, 256 px, optimised: printed, of 120 TFLOP/s (arXiv:2105.05233, Table 7)"),
    "A100": Gpu(_bf16("A100"), 0.28, "derived: MosaicML's SD-2 at 512 px, 36.3 images/s a GPU on 8"),
    "H100": Gpu(_bf16("H100"), 0.335, "derived: MLPerf Training 4.1, SD-2, 137.6 images/s a GPU on 8"),
    "H200": Gpu(_bf16("H200"), 0.341, "derived: MLPerf Training 4.1, SD-2, 139.9 images/s a GPU on 8"),
    "B200": Gpu(_bf16("B200"), 0.294, "derived: MLPerf Training 5.0, SD-2, 274.6 images/s a GPU on 8"),
}
