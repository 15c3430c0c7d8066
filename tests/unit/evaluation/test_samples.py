"""Whether a sample's nearest real image has its label: on features made up so that the answer is known."""

import pytest
import torch

from ldm_scale.evaluation.samples import nearest_agreement


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
