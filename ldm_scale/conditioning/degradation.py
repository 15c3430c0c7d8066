"""Small images from large ones: bicubic, or a random chain of what happens to real pictures (arXiv:2103.14006).

The chain is BSRGAN's in the moderate strength of arXiv:2112.10752 (D.6.1, figures from its code): a blur a quarter as
wide, a resizing, weak noise and good JPEG in random order, then the resizing to the final size and JPEG once more. In
full strength half of the images at 128 px are past recognition. Left out are the camera-sensor noise, which needs a
model of raw pictures, and the displaced nearest neighbour; filters without antialiasing have its aliasing. Both ways
end on 256 levels, because what a user enlarges comes from a file.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Image01 = Tensor  # (1, 3, h, w) in [0, 1]: the chain's own range

_BLUR = 0.25  # of BSRGAN's widths
_MAX_NOISE = 2  # of 255; BSRGAN: 25
_JPEG_QUALITIES = (80, 95)  # BSRGAN: 30 to 95
_JPEG_SHARE = 0.9  # of the images, besides the last JPEG, which all go through
_HALVED_SHARE = 0.25  # of the images whose factor allows it
_MARGIN = 10  # pixels beyond the edges that a blur sees: three of its largest deviations
_FILTERS = ("bilinear", "bicubic", "area")


def reduce_bicubic(x: Tensor, factor: int) -> Tensor:
    """Images `factor` times smaller by bicubic with antialiasing, on 256 levels.

    Shapes: pixels (B, 3, H, W); returns (B, 3, H / factor, W / factor).
    """
    size = (x.shape[-2] // factor, x.shape[-1] // factor)
    return _levels(F.interpolate(x.float(), size=size, mode="bicubic", antialias=True) / 2 + 0.5) * 2 - 1


def degrade(pixels: Tensor, factor: int, stream: np.random.Generator) -> Tensor:
    """One image `factor` times smaller, by a chain that the stream chooses; on the CPU.

    Shapes: pixels (3, H, W); returns (3, H / factor, W / factor).
    Source: arXiv:2103.14006, section 3 (its ranges for factors 2 and 4, continued along the same line).
    """
    size = (pixels.shape[-2] // factor, pixels.shape[-1] // factor)
    image: Image01 = pixels.detach().cpu().float()[None] / 2 + 0.5
    if factor % 4 == 0 and stream.random() < _HALVED_SHARE:
        image = _resize(image, (image.shape[-2] // 2, image.shape[-1] // 2), stream)
        factor //= 2
    steps: list[Callable[[Image01], Image01]] = [
        lambda image: _blur(image, _covariance(factor, stream)),
        lambda image: _resize(image, _size_between(image, factor, stream), stream),
        lambda image: _add_noise(image, stream),
        lambda image: _jpeg(image, stream) if stream.random() < _JPEG_SHARE else image,
    ]
    for index in stream.permutation(len(steps)):
        image = steps[index](image)
    image = _jpeg(_resize(image, size, stream), stream)
    return image[0] * 2 - 1


def _levels(image: Tensor) -> Tensor:
    """[0, 1] on the 256 levels of a file."""
    return (image.clamp(0, 1) * 255).round() / 255


def _covariance(factor: int, stream: np.random.Generator) -> Tensor:
    """Of a Gaussian, in pixels^2: by one deviation, or by two eigenvalues along any direction."""
    if stream.random() < 0.5:
        return torch.eye(2) * float(stream.uniform(0, _BLUR * (2.0 + 0.2 * factor))) ** 2
    angle = float(stream.uniform(0, math.pi))
    along, across = stream.uniform(0, _BLUR * (4.0 + factor), 2).tolist()
    axes = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return axes @ torch.diag(torch.tensor([along, across])) @ axes.T


def _blur(image: Image01, covariance: Tensor) -> Image01:
    """Convolution with a Gaussian, the image mirrored at its edges.

    By its spectrum, exp(-2 pi^2 f' C f) at frequencies f: half the time of windows, and no size to choose.
    """
    # Mirroring reaches no farther than the image is long.
    margin = min(_MARGIN, image.shape[-2] - 1, image.shape[-1] - 1)
    padded = F.pad(image, (margin,) * 4, mode="reflect")
    height, width = padded.shape[-2:]
    down, across = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :]
    (yy, yx), (_, xx) = covariance.tolist()
    exponent = yy * down**2 + 2 * yx * down * across + xx * across**2
    spectrum = torch.fft.rfft2(padded) * torch.exp(-2 * math.pi**2 * exponent)
    blurred: Tensor = torch.fft.irfft2(spectrum, s=(height, width))
    return blurred[..., margin : height - margin, margin : width - margin]


def _size_between(image: Image01, factor: int, stream: np.random.Generator) -> tuple[int, int]:
    """A size down to half of the final one, from which the last resizing goes up or down."""
    share = 1.0 / float(stream.uniform(1, 2 * factor))
    return max(1, round(image.shape[-2] * share)), max(1, round(image.shape[-1] * share))


def _resize(image: Image01, size: tuple[int, int], stream: np.random.Generator) -> Image01:
    """The image in another size by a random filter."""
    mode = _FILTERS[stream.integers(len(_FILTERS))]
    antialias = bool(stream.integers(2))
    if mode == "area":
        return F.interpolate(image, size=size, mode="area")
    return F.interpolate(image, size=size, mode=mode, antialias=antialias).clamp(0, 1)


def _add_noise(image: Image01, stream: np.random.Generator) -> Image01:
    """Gaussian noise: grey, of each channel, or with any correlation of the channels."""
    deviation = float(stream.integers(1, _MAX_NOISE + 1)) / 255
    kind = stream.choice(3, p=(0.4, 0.4, 0.2))
    channels = 1 if kind == 0 else 3
    noise = torch.from_numpy(stream.standard_normal((1, channels, *image.shape[-2:]), dtype=np.float32)) * deviation
    if kind == 2:
        mixing = np.linalg.qr(stream.standard_normal((3, 3)))[0] * np.sqrt(stream.random(3))
        noise = torch.einsum("ij,bjhw->bihw", torch.from_numpy(mixing.astype(np.float32)), noise)
    return (image + noise).clamp(0, 1)


def _jpeg(image: Image01, stream: np.random.Generator) -> Image01:
    """What JPEG of a random quality leaves of the image."""
    quality = int(stream.integers(_JPEG_QUALITIES[0], _JPEG_QUALITIES[1] + 1))
    values = (image[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="JPEG", quality=quality)
    decoded = np.array(Image.open(buffer).convert("RGB"))
    return torch.from_numpy(decoded).permute(2, 0, 1)[None].float() / 255
