"""CLIP score: the cosine of an image's and its caption's embeddings, by OpenCLIP's model, tokenizer and preprocessing.

As a plain cosine, at least 0. Times 2.5 it is CLIPScore (arXiv:2104.08718); others write it times 100. Beside it stand
what real images get with their own captions, and what the samples get with another image's: how much of the number
says only that they are pictures and captions of this kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm_scale.conditioning.open_clip_models import load_open_clip
from ldm_scale.evaluation.intervals import Halves
from ldm_scale.evaluation.set_figures import with_interval
from ldm_scale.interchange.safetensors_io import tensors_sha256
from ldm_scale.telemetry.log import say_once

DEFINITION = "mean over captioned images of max(0, cosine of the embeddings); times 2.5 it is CLIPScore"


class ClipScorer:
    """Embeds images and captions.

    Raises: ConfigError if there is no such model, or its weights cannot be had.
    """

    def __init__(self, model: str, weights: str, device: torch.device | str = "cpu") -> None:
        import open_clip

        self._model, self._weights, self._device = model, weights, torch.device(device)
        self._clip = load_open_clip(model, weights, "--clip-model", "--clip-weights").to(self._device)
        settings = open_clip.transform.PreprocessCfg(**self._clip.visual.preprocess_cfg)
        self._prepare = open_clip.transform.image_transform_v2(settings, is_train=False)
        self._resize = f"OpenCLIP's: {settings.interpolation} of Pillow, {settings.resize_mode}, {settings.size} px"
        self._tokenize = open_clip.get_tokenizer(model)

    @property
    def protocol(self) -> dict[str, Any]:
        """What a score depends on, to be written beside it."""
        return {
            "definition": DEFINITION,
            "features": f"OpenCLIP {self._model}",
            "resize": self._resize,
            "weights_sha256": tensors_sha256(self._clip.state_dict()),
        }

    @torch.inference_mode()
    def images(self, pixels: Tensor) -> Tensor:
        """Embeddings of length 1. Shapes: (B, 3, H, W) in [-1, 1] of 8-bit values; returns (B, d) fp32, CPU."""
        levels = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        prepared = torch.stack([self._prepare(Image.fromarray(picture)) for picture in levels])
        return F.normalize(self._clip.encode_image(prepared.to(self._device)).float(), dim=1).cpu()

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of length 1, of what the model reads of each. Shapes: returns (B, d) fp32, CPU."""
        tokens = self._tokenize(list(captions))
        length = tokens.shape[1]
        # Of a caption that was cut, the end token stands later where there is room for one more.
        cut = (tokens != self._tokenize(list(captions), context_length=length + 1)[:, :length]).any(dim=1)
        if cut.any():
            first = captions[int(cut.nonzero()[0])]
            say_once(
                f"truncated captions of {self._model}",
                f"CLIP score: {self._model} reads {length} tokens of a caption, not all of {first[:60]!r}...",
            )
        return F.normalize(self._clip.encode_text(tokens.to(self._device)).float(), dim=1).cpu()


def clip_figure(
    images: Tensor, texts: Tensor, captions: Sequence[str], real: Tensor | None = None, resamples: int = 0
) -> dict[str, Any]:
    """The score of samples, over those with a caption; `real` are the images whose captions they are.

    Shapes: embeddings (N, d) of length 1, row i with captions[i].
    """
    told = torch.tensor([i for i, caption in enumerate(captions) if caption.strip()], dtype=torch.int64)
    if not len(told):
        return {"name": "CLIP score", "not_measured": "no image has a caption"}
    scores = _scores(images[told], texts[told])
    halves = Halves(len(told), resamples)
    figure = with_interval(
        float(scores.mean()), halves, 1, lambda: [float(scores[half].mean()) for half in halves.indices()], (0.0, 1.0)
    )
    return {
        "name": "CLIP score",
        **figure,
        "num_images": len(told),
        "shuffled": float(_scores(images[told], texts[told].roll(1, dims=0)).mean()),
        "real": None if real is None else float(_scores(real[told], texts[told]).mean()),
    }


def _scores(images: Tensor, texts: Tensor) -> Tensor:
    return (images.double() * texts.double()).sum(dim=1).clamp(min=0)
