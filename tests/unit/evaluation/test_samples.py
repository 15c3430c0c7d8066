"""Whether a sample's nearest real image has its label: on features made up so that the answer is known."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditions
from ldm_scale.errors import NumericsError
from ldm_scale.evaluation.samples import Judge, SampleMeter, nearest_agreement
from ldm_scale.evaluation.set_figures import Network


def test_agreement_counts_labels_of_nearest_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_scale.evaluation.samples._ROWS_AT_ONCE", 2)
    real = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.1], [0.0, -1.0], [0.0, 0.9]])
    labels = ["a", "a", "b", "c", ""]
    made = torch.tensor([[0.9, 0.0], [-0.9, 0.0], [-0.8, 0.1], [0.9, 0.1], [0.0, 9.0]])
    found = nearest_agreement(real, made, real, labels)
    assert found["num_images"] == 4  # without a label there is nothing to agree with
    assert found["num_labels"] == 3
    assert found["agreement"] == 0.5  # the first and the third
    assert found["chance"] == pytest.approx((2 * 2 / 4 + 1 / 4 + 1 / 4) / 4)
    assert found["reconstructions"] == 1
    assert found["real_others"] == 1  # of both images of "a" the nearest other one is the other
    distinct = nearest_agreement(real, made, real, ["a", "b", "c", "d", "e"])
    assert distinct["real_others"] is None
    assert nearest_agreement(real, made, real, [-1] * 5) == {"not_measured": "no image has one"}


def test_labels_of_unlike_images_do_not_agree() -> None:
    features = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    unrelated = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    found = nearest_agreement(features, unrelated, features, [number % 4 for number in range(256)])
    assert found["agreement"] == pytest.approx(found["chance"], abs=0.1)
    assert found["real_others"] == pytest.approx(0.25, abs=0.1)


class Means:
    """Ten numbers of each image."""

    weights_hash = ""
    protocol: ClassVar[dict[str, str | int]] = {"features": "means"}

    def extract(self, images: Tensor) -> Tensor:
        return images.flatten(start_dim=1)[:, :10].cpu()


def judge() -> Judge:
    return Judge(("classes",), Means(), "FD-Means", 4, Network("Means", num_components=4), {}, lambda x: x * 0.9)


def test_ranks_and_batches_change_no_figure() -> None:
    """Eleven images on one rank in their order, and dealt out to three in batches of two."""
    generator = torch.Generator().manual_seed(0)
    real, made = (torch.rand(12, 3, 4, 4, generator=generator) * 2 - 1 for _ in range(2))
    labels = torch.arange(12) % 3

    def add(meter: SampleMeter, numbers: list[int]) -> None:
        meter.add(made[numbers], real[numbers], Conditions(classes=labels[numbers]), numbers)

    alone, *ranks = (SampleMeter(judge()) for _ in range(4))
    add(alone, list(range(12)))
    for batch in ([10, 3], [0, 7], [11, 1], [2, 4], [6, 5], [9, 8]):
        add(ranks[batch[0] % 3], batch)
    for rank in ranks[1:]:
        ranks[0].rows.take(rank.rows.part)
    assert ranks[0].figures() == alone.figures()
    assert alone.figures()["samples"]["frechet"]["num_images"] == 12


def test_samples_that_are_no_numbers_are_refused() -> None:
    made = torch.zeros(3, 3, 4, 4)
    made[1, 0, 2, 2] = torch.nan
    with pytest.raises(NumericsError, match="1 of 3 samples are not finite, the first for image 8 in the order"):
        SampleMeter(judge()).add(made, torch.zeros(3, 3, 4, 4), Conditions(classes=torch.zeros(3)), [7, 8, 9])
