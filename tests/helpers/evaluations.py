"""Made-up results of evaluations, for tests of what reads them."""

from __future__ import annotations

import copy
from typing import Any

RESULT: dict[str, Any] = {
    "format": "ldm-scale-autoencoder-evaluation",
    "version": 1,
    "model": {
        "label": "kl-f4-c3",
        "path": "runs/kl",
        "content_sha256": "ab" * 32,
        "weights": "ema",
        "kind": "kl",
        "f": 4,
        "parameters": 1000,
    },
    "protocol": {
        "program_version": "0.1.0",
        "data": {"digest": "d" * 32, "split": "heldout", "num_images": 100, "pixels_digest": "e" * 32},
        "resolution": 64,
        "ssim": "11x11",
    },
    "figures": {
        "psnr_db": {"mean": 25.0, "std": 2.0},
        "exact_images": 0,
        "ssim": {"mean": 0.8, "std": 0.1},
        "mean_absolute_error": {"mean": 0.05, "std": 0.01},
        "perceptual": {"name": "EffNetLite0-distance", "mean": 0.1, "std": 0.02, "unrelated": 0.5},
        "frechet": {
            "name": "FD-EffNetLite0-PCA32",
            "distance": 1.5,
            "halves_reconstructed": 9.0,
            "halves_original": 8.0,
        },
        "bicubic": {"psnr_db": 20.0, "ssim": 0.6, "perceptual": 0.2},
        "rate": {"numbers_per_pixel": 0.1875, "kl_bits_per_pixel": 2.4, "kl_bits_per_pixel_fitted": 1.2},
    },
    "bad_images": {"count": 0, "reasons": {}, "names": {}},
}


def kl_result() -> dict[str, Any]:
    """A KL model of f = 4."""
    return copy.deepcopy(RESULT)


def vq_result() -> dict[str, Any]:
    """A VQ model of f = 8, of half the rate and worse, under the same protocol."""
    result = copy.deepcopy(RESULT)
    result["model"] |= {"label": "vq-f8-n256-c4", "path": "runs/vq", "kind": "vq", "f": 8, "content_sha256": "cd" * 32}
    figures = result["figures"]
    figures["psnr_db"], figures["perceptual"]["mean"] = {"mean": 22.0, "std": 2.0}, 0.25
    figures["rate"] = {"numbers_per_pixel": 0.0625, "code_bits_per_pixel": 0.125, "code_entropy_bits_per_pixel": 0.12}
    figures["codes"] = {"share_used": 0.75, "perplexity": 200.5, "num_chosen": 6400}
    return result


def identity_result() -> dict[str, Any]:
    """The pixels themselves, under the same protocol."""
    result = copy.deepcopy(RESULT)
    result["model"] |= {"label": "identity-f1-c3", "path": "runs/pixels", "kind": "identity", "f": 1}
    figures = result["figures"]
    figures["psnr_db"], figures["perceptual"]["mean"] = {"mean": None, "std": None}, 0.0
    figures["exact_images"] = 100
    figures["bicubic"] = {"psnr_db": None, "ssim": 1.0, "perceptual": 0.0}
    figures["rate"] = {"numbers_per_pixel": 3.0, "stored_bits_per_pixel": 24.0}
    return result
