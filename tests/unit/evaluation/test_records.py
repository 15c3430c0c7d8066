"""Records of figures: each alone says what it is, of how many images, by what, beside what, and how sure."""

from __future__ import annotations

import math

import pytest
import torch

from ldm_scale.evaluation.reconstruction import num_summarised, summary
from ldm_scale.evaluation.records import figure_records, versions
from tests.helpers.evaluations import kl_result


def test_every_figure_of_a_result_becomes_a_record() -> None:
    document = kl_result() | {"command": "ldm-scale evaluate autoencoder x", "versions": versions()}
    document["protocol"]["frechet"] = {"features": "net", "weights_sha256": "w", "resize": "bilinear"}
    document["model"]["sampling"] = {"sampler": "ddim", "num_steps": 20, "eta": 0.0, "guidance_scale": 2.0}
    records = {record["figure"]: record for record in figure_records(document)}
    psnr = records["psnr_db"]
    assert (psnr["value"], psnr["n"], psnr["weights"]) == (25.0, 100, "ema")
    assert psnr["interval"]["high"] - 25.0 == pytest.approx(1.96 * 2.0 / math.sqrt(99), rel=1e-3)
    assert (psnr["sampler"], psnr["num_steps"], psnr["guidance_scale"]) == ("ddim", 20, 2.0)
    frechet = records["frechet"]
    assert (frechet["name"], frechet["value"]) == ("FD-EffNetLite0-PCA32", 1.5)
    assert (frechet["extractor"], frechet["extractor_sha256"], frechet["resizer"]) == ("net", "w", "bilinear")
    assert frechet["reference"] == "e" * 32
    assert records["rate.kl_bits_per_pixel"]["value"] == 2.4
    assert records["perceptual.unrelated"]["value"] == 0.5
    assert psnr["extractor"] is None


def test_a_mean_is_over_the_images_that_have_the_figure() -> None:
    """Images that come back exactly are left out of the mean of PSNR: n and the error are of the others."""
    document = kl_result() | {"command": "", "versions": {}}
    psnr = torch.tensor([20.0, 30.0, 25.0, math.inf, math.nan, 21.0], dtype=torch.float64)
    document["figures"]["psnr_db"] = summary(psnr)
    document["figures"]["counts"] = {"psnr_db": num_summarised(psnr), "bicubic.psnr_db": 98}
    share = torch.ones(6, dtype=torch.float64)
    document["figures"]["inpainting"] = {name: summary(share) | {"num_images": 6} for name in ("known_exact", "ssim")}
    document["figures"]["inpainting"]["known_exact"]["share"] = True
    records = {record["figure"]: record for record in figure_records(document)}
    found = records["psnr_db"]
    assert (found["value"], found["n"]) == (24.0, 4)
    error = psnr[psnr.isfinite()].std(correction=1).item() / 2
    assert found["interval"]["standard_error"] == pytest.approx(error, rel=1e-12)
    assert (records["bicubic.psnr_db"]["n"], records["bicubic.ssim"]["n"]) == (98, 100)
    assert not [name for name in records if "counts" in name]
    wilson = records["inpainting.known_exact"]["interval"]
    assert (wilson["low"], wilson["high"]) == (pytest.approx(6 / (6 + 1.959964**2), rel=1e-6), pytest.approx(1))
    assert records["inpainting.ssim"]["interval"] is None, "images that do not differ say nothing of others"


def test_another_protocol_has_another_hash() -> None:
    documents = [kl_result() | {"command": "", "versions": {}} for _ in range(2)]
    documents[1]["protocol"]["resolution"] = 128
    hashes = [{record["protocol_sha256"] for record in figure_records(document)} for document in documents]
    assert len(hashes[0]) == len(hashes[1]) == 1
    assert hashes[0] != hashes[1]
