"""CLIP scores by a tiny random model: OpenCLIP's own cosines, captions that are missing or cut, companions."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from ldm_scale.errors import ConfigError
from ldm_scale.evaluation.clip_score import ClipScorer, clip_figure
from tests.helpers.towers import TINY_MODEL, tiny_tower


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_tower(tmp_path_factory.mktemp("clip")).weights


def test_cosines_are_open_clips(weights: str) -> None:
    scorer = ClipScorer(TINY_MODEL, weights)
    levels = torch.randint(0, 256, (3, 3, 24, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    captions = ["a red square", "a cat", "two dogs"]
    model, _, preprocess = open_clip.create_model_and_transforms(TINY_MODEL, pretrained=weights)
    model.eval()
    pictures = torch.stack([preprocess(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in levels])
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer(TINY_MODEL)(captions), normalize=True)
        expected = (model.encode_image(pictures, normalize=True) * texts).sum(dim=1)
    images, told = scorer.images(levels / 127.5 - 1), scorer.texts(captions)
    torch.testing.assert_close((images * told).sum(dim=1), expected, rtol=1e-5, atol=1e-6)
    figure = clip_figure(images, told, captions, images, resamples=4)
    assert figure["value"] == pytest.approx(float(expected.clamp(min=0).mean()), abs=1e-6)
    assert figure["real"] == figure["value"]
    assert figure["shuffled"] != figure["value"]
    assert 0 <= figure["interval"]["low"] <= figure["value"] <= figure["interval"]["high"] <= 1


def test_images_without_a_caption_are_left_out() -> None:
    images = torch.eye(4)
    texts = torch.eye(4)[[0, 1, 3, 3]]
    figure = clip_figure(images, texts, ["a", " ", "b", "c"])
    assert figure["num_images"] == 3
    assert figure["value"] == pytest.approx(2 / 3)
    assert clip_figure(images, texts, [""] * 4)["not_measured"] == "no image has a caption"


def test_a_cosine_below_zero_counts_as_zero() -> None:
    assert clip_figure(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]), ["a"])["value"] == 0


def test_cut_captions_are_said(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("ldm_scale.evaluation.clip_score.say_once", lambda key, message: said.append(message))
    scorer = ClipScorer(TINY_MODEL, weights)
    scorer.texts(["a cat", "one two three four five six seven"])
    assert said == [], "seven words with begin and end fill nine tokens"
    scorer.texts(["a cat", "one two three four five six seven eight"])
    assert "reads 9 tokens of a caption, not all of 'one two" in said[0]


def test_unreadable_weights_are_refused(weights: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=r"--clip-weights=.*w\.pt: cannot be loaded into tiny"):
        ClipScorer(TINY_MODEL, str(tmp_path / "w.pt"))
    with pytest.raises(ConfigError, match="--clip-model=ViT-Z: OpenCLIP has no architecture"):
        ClipScorer("ViT-Z", "openai")
