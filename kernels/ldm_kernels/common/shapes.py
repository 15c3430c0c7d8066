"""The shapes that the operations meet in the models that matter, enumerated from the architectures.

A `Shape` leaves the batch out; `count` says how often one forward pass of the model meets it. The walk below repeats
the order of a UNet and of an autoencoder in a few lines instead of building them: this package knows no model, and
its lists must not follow a change in one without a test saying so (the tests compare both on the meta device).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

NORM_GROUPS = 32
TEXT_TOKENS = 77
TYPICAL = "sd2-64"  # the model that stands for the others where one must do


@dataclass(frozen=True)
class Shape:
    """One operation's dimensions in one model, for one image.

    The names in `dims` by operation: group_norm_silu channels, height, width, groups, silu (0 or 1), shifted (0 or 1:
    a timestep's shift comes in); attention and cross_attention heads, queries, keys, head_dim; geglu tokens, width
    (of the result); vector_quantize vectors, codes, dim; ema_update parameters, decays (no batch multiplies these).
    """

    operation: str
    model: str
    dims: tuple[tuple[str, int], ...]
    count: int = 1

    def __getitem__(self, name: str) -> int:
        return dict(self.dims)[name]

    def get(self, name: str) -> int:
        """The dimension of that name, or 0 where the operation has none."""
        return dict(self.dims).get(name, 0)

    @property
    def name(self) -> str:
        """The dimensions in few letters, such as 320x64x64, or 8h 4096x77 d40."""
        d = dict(self.dims)
        if self.operation == "group_norm_silu":
            extras = ("" if d["silu"] else " no silu") + (" shifted" if d["shifted"] else "")
            return f"{d['channels']}x{d['height']}x{d['width']}{extras}"
        if "attention" in self.operation:
            return f"{d['heads']}h {d['queries']}x{d['keys']} d{d['head_dim']}"
        return "x".join(str(size) for size in d.values())


@dataclass(frozen=True)
class UNetArchitecture:
    """What decides a UNet's shapes; exactly one of head_dim and num_heads is given."""

    base_channels: int
    channel_multipliers: tuple[int, ...]
    attention_levels: tuple[int, ...]
    head_dim: int | None = None
    num_heads: int | None = None
    context_tokens: int = TEXT_TOKENS
    num_res_blocks: int = 2


@dataclass(frozen=True)
class AutoencoderArchitecture:
    """What decides an autoencoder's shapes: three channels in and out, single-head attention in the middle."""

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int = 2


UNETS = {
    "sd1": UNetArchitecture(320, (1, 2, 4, 4), (0, 1, 2), num_heads=8),
    "sd2": UNetArchitecture(320, (1, 2, 4, 4), (0, 1, 2), head_dim=64),
    # Class-conditional ImageNet (arXiv:2112.10752, Table 13; the class is one token of context), with the heads of 32
    # channels of Tables 12 and 14.
    "ldm4": UNetArchitecture(192, (1, 2, 3, 5), (1, 2, 3), head_dim=32, context_tokens=1),
    "ldm8": UNetArchitecture(256, (1, 2, 4), (0, 1, 2), head_dim=32, context_tokens=1),
}
LATENT_SIZES = (64, 32)
KL_F8 = AutoencoderArchitecture(128, (1, 2, 4, 4))
IMAGE_SIZES = (256, 512)
# Codes x dimensions and the latents' side at 256 pixels (arXiv:2112.10752, Table 8).
CODEBOOKS = {"vq_f4": (8192, 3, 64), "vq_f8": (16384, 4, 32), "vq_f16": (16384, 8, 16)}
# Weights of the text-to-image UNets (configs/model): their averages are the largest.
UNET_PARAMETERS = {"sd1": 859_520_964, "sd2": 865_910_724}


def unet_shapes(model: str, architecture: UNetArchitecture, latent_size: int) -> list[Shape]:
    """Every shape of one forward pass at latents of that side, repeated ones counted.

    Source: arXiv:2112.10752, section 3.3 and appendix E.2.1 for the order of the blocks.
    """
    return _counted(f"{model}-{latent_size}", _unet(architecture, latent_size))


def autoencoder_shapes(model: str, architecture: AutoencoderArchitecture, image_size: int) -> list[Shape]:
    """Every shape of encoding and decoding one image of that side, repeated ones counted.

    Source: arXiv:2012.09841, Table 7, for the order of the blocks.
    """
    return _counted(f"{model}-{image_size}", _autoencoder(architecture, image_size))


def all_shapes() -> list[Shape]:
    """The shapes of every model above, model by model; the same dimensions come once per model that has them."""
    shapes: list[Shape] = []
    for model, unet in UNETS.items():
        for size in LATENT_SIZES:
            shapes += unet_shapes(model, unet, size)
    for size in IMAGE_SIZES:
        shapes += autoencoder_shapes("kl_f8", KL_F8, size)
    for model, (codes, dim, side) in CODEBOOKS.items():
        shapes.append(Shape("vector_quantize", model, (("vectors", side * side), ("codes", codes), ("dim", dim))))
    for model, parameters in UNET_PARAMETERS.items():
        for decays in (1, 2):
            shapes.append(Shape("ema_update", model, (("parameters", parameters), ("decays", decays))))
    return shapes


Dims = tuple[str, tuple[tuple[str, int], ...]]


def _counted(model: str, dims: Iterator[Dims]) -> list[Shape]:
    return [Shape(operation, model, named, count) for (operation, named), count in Counter(dims).items()]


def _unet(unet: UNetArchitecture, size: int) -> Iterator[Dims]:
    widths = [unet.base_channels * m for m in unet.channel_multipliers]
    channels, skips = widths[0], [widths[0]]
    for level, width in enumerate(widths):
        for _ in range(unet.num_res_blocks):
            yield from _unet_block(unet, level, channels, width, size)
            channels = width
            skips.append(width)
        if level < len(widths) - 1:
            skips.append(width)
            size //= 2
    yield from _residual_block(channels, channels, size, shifted=1)
    yield from _transformer(unet, channels, size)
    yield from _residual_block(channels, channels, size, shifted=1)
    for level in reversed(range(len(widths))):
        for _ in range(unet.num_res_blocks + 1):
            yield from _unet_block(unet, level, channels + skips.pop(), widths[level], size)
            channels = widths[level]
        if level > 0:
            size *= 2
    yield _norm(channels, size)


def _unet_block(unet: UNetArchitecture, level: int, in_channels: int, out_channels: int, size: int) -> Iterator[Dims]:
    yield from _residual_block(in_channels, out_channels, size, shifted=1)
    if level in unet.attention_levels:
        yield from _transformer(unet, out_channels, size)


def _autoencoder(autoencoder: AutoencoderArchitecture, size: int) -> Iterator[Dims]:
    widths = [autoencoder.base_channels * m for m in autoencoder.channel_multipliers]
    channels = autoencoder.base_channels
    for level, width in enumerate(widths):
        for _ in range(autoencoder.num_res_blocks):
            yield from _residual_block(channels, width, size)
            channels = width
        if level < len(widths) - 1:
            size //= 2
    yield from _autoencoder_middle(channels, size)
    yield _norm(channels, size)
    yield from _autoencoder_middle(channels, size)
    for level in reversed(range(len(widths))):
        for _ in range(autoencoder.num_res_blocks + 1):
            yield from _residual_block(channels, widths[level], size)
            channels = widths[level]
        if level > 0:
            size *= 2
    yield _norm(channels, size)


def _autoencoder_middle(channels: int, size: int) -> Iterator[Dims]:
    yield from _residual_block(channels, channels, size)
    yield _norm(channels, size, silu=0)
    yield _attention("attention", 1, size * size, size * size, channels)
    yield from _residual_block(channels, channels, size)


def _residual_block(in_channels: int, out_channels: int, size: int, shifted: int = 0) -> Iterator[Dims]:
    yield _norm(in_channels, size)
    yield _norm(out_channels, size, shifted=shifted)


def _transformer(unet: UNetArchitecture, channels: int, size: int) -> Iterator[Dims]:
    heads = unet.num_heads or channels // (unet.head_dim or channels)
    tokens = size * size
    yield _norm(channels, size, silu=0)
    yield _attention("attention", heads, tokens, tokens, channels // heads)
    yield _attention("cross_attention", heads, tokens, unet.context_tokens, channels // heads)
    yield "geglu", (("tokens", tokens), ("width", 4 * channels))


def _norm(channels: int, size: int, silu: int = 1, shifted: int = 0) -> Dims:
    sizes = (("channels", channels), ("height", size), ("width", size), ("groups", NORM_GROUPS))
    return "group_norm_silu", (*sizes, ("silu", silu), ("shifted", shifted))


def _attention(operation: str, heads: int, queries: int, keys: int, head_dim: int) -> Dims:
    return operation, (("heads", heads), ("queries", queries), ("keys", keys), ("head_dim", head_dim))
