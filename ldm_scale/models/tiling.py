"""Encoding and decoding of images whose activations do not fit: image by image, in overlapping tiles.

Memory goes to the levels near the pixels, so only those run in tiles. What lies at the latents' resolution (the middle
with its attention over all pixels, the codebook) runs on the whole image and is the same as ever. Tiles overlap and
are blended by linear ramps over the overlap.

A group norm takes its statistics from the whole image. Taken from every tile by itself, they give tiles another
contrast each, and seams. So passes over all tiles come first that only measure them, and one set then serves all
tiles: the first pass measures with each tile's own, any other with those of the pass before. One pass (twice the
computation) brings most; with as many passes as norms follow each other they are the whole image's.

Not as in the whole image stay: pixels within the receptive field of a tile's inner edge, which see zeros beyond it
(the ramps give them little weight), and attention outside the middle (`attention_levels`), which sees its tile alone.
docs/decisions.md has the measured differences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.errors import ConfigError
from ldm_scale.models.autoencoder import Autoencoder
from ldm_scale.models.fused import GroupNorm

STATISTICS_PASSES = 1
OVERLAP_SHARE = 4  # the overlap is the tile over this where none is given

TileFunction = Callable[[Tensor], Tensor]


@torch.no_grad()
def encode_moments_tiled(
    network: Autoencoder, x: Tensor, tile: int, overlap: int | None = None, passes: int = STATISTICS_PASSES
) -> tuple[Tensor, Tensor | None]:
    """`network.encode_moments(x)`, with no more in memory than one tile's activations and the latents' resolution.

    An image no larger than a tile is encoded whole. Gradients are not kept. `passes` measure norms (see above).
    Units: tile and overlap in pixels; the overlap is a quarter of the tile without one.
    Shapes: as `encode_moments`.
    Raises: ConfigError if tile, overlap or a side of x is no multiple of f, or the overlap not smaller than the tile.
    """
    f = network.config.downsampling_factor
    tile, overlap = _checked(tile, overlap, f)
    if network.config.kind == "identity":
        return network.encode_moments(x)
    _require_whole_latents(x, f)
    encoder = network.encoder
    norms = _norms(encoder.levels, encoder.attentions)
    parts: list[tuple[Tensor, Tensor | None]] = []
    for image in torch.split(x, 1):
        if max(image.shape[2:]) <= tile:
            parts.append(network.encode_moments(image))
            continue
        plan = TilePlan(image.shape[2] // f, image.shape[3] // f, tile // f, overlap // f)
        features = _in_tiles(encoder.descend, image, plan, f, norms, passes)
        parts.append(network.posterior(encoder.finish(features)))
    logvars = [logvar for _, logvar in parts if logvar is not None]
    return torch.cat([mean for mean, _ in parts]), torch.cat(logvars) if logvars else None


@torch.no_grad()
def decode_raw_tiled(
    network: Autoencoder, z_raw: Tensor, tile: int, overlap: int | None = None, passes: int = STATISTICS_PASSES
) -> Tensor:
    """`network.decode_raw(z_raw)`; everything else as in `encode_moments_tiled`.

    Units: tile and overlap in pixels of what is decoded. Shapes: as `decode_raw`.
    Raises: as `encode_moments_tiled`.
    """
    f = network.config.downsampling_factor
    tile, overlap = _checked(tile, overlap, f)
    if network.config.kind == "identity":
        return network.decode_raw(z_raw)
    decoder = network.decoder
    norms = _norms(decoder.levels, decoder.attentions, decoder.norm_out)
    parts = []
    for latent in torch.split(z_raw, 1):
        if max(latent.shape[2:]) * f <= tile:
            parts.append(network.decode_raw(latent))
            continue
        plan = TilePlan(latent.shape[2], latent.shape[3], tile // f, overlap // f)
        features = decoder.begin(network.decoder_input(latent))
        parts.append(_in_tiles(lambda part: decoder.conv_out(decoder.ascend(part)), features, plan, 1, norms, passes))
    return torch.cat(parts)


@dataclass(frozen=True)
class _Span:
    """One tile along one axis, in latents; own parts of neighbours meet without overlapping."""

    start: int
    stop: int
    own_start: int
    own_stop: int


def _spans(size: int, tile: int, overlap: int) -> list[_Span]:
    """Tiles that cover 0 to size, the last one aligned to the end; one where a single one is enough."""
    if size <= tile:
        return [_Span(0, size, 0, size)]
    starts = [*range(0, size - tile, tile - overlap), size - tile]
    # Neighbours share an overlap equally; the last two may share more than `overlap`.
    borders = [0, *((after + before + tile) // 2 for before, after in pairwise(starts)), size]
    return [
        _Span(start, start + tile, own_start, own_stop)
        for start, own_start, own_stop in zip(starts, borders[:-1], borders[1:], strict=True)
    ]


class TilePlan:
    """The tiles of an image, in latents; the outermost `margin` of an overlap weighs nothing."""

    def __init__(self, height: int, width: int, tile: int, overlap: int, margin: int = 0) -> None:
        assert 2 * margin <= overlap, f"margin {margin} leaves nothing of the overlap {overlap}"
        self.height, self.width, self.overlap, self.margin = height, width, overlap, margin
        self.rows, self.columns = _spans(height, tile, overlap), _spans(width, tile, overlap)

    def __iter__(self) -> Iterator[tuple[_Span, _Span]]:
        return ((row, column) for row in self.rows for column in self.columns)

    def weights(self, spans: Sequence[_Span], span: _Span, scale: int) -> Tensor:
        """One tile's weights along an axis, `scale` values per latent; all tiles' add up to 1 everywhere."""
        total = torch.zeros(spans[-1].stop * scale)
        for other in spans:
            total[other.start * scale : other.stop * scale] += self._ramps(spans, other, scale)
        return self._ramps(spans, span, scale) / total[span.start * scale : span.stop * scale]

    def _ramps(self, spans: Sequence[_Span], span: _Span, scale: int) -> Tensor:
        """1, rising from and falling to almost 0 over the overlap (less its margins) at edges inside the image."""
        ramp = torch.ones((span.stop - span.start) * scale)
        width, margin = self.overlap * scale, self.margin * scale
        rising = ((torch.arange(width) + 0.5 - margin) / max(width - 2 * margin, 1)).clamp(0.0, 1.0)
        if span is not spans[0]:
            ramp[:width] = rising
        if span is not spans[-1]:
            ramp[len(ramp) - width :] *= rising.flip(0)
        return ramp


def _in_tiles(
    compute: TileFunction, x: Tensor, plan: TilePlan, scale: int, norms: dict[int, GroupNorm], passes: int
) -> Tensor:
    """compute(x), blended from tiles; x has `scale` values per latent along an axis.

    Shapes: x (1, C, H, W); returns (1, C', H', W') in the type of what `compute` returns.
    """
    statistics: dict[int, _Moments] = {}
    for _ in range(passes):
        measured: dict[int, _Moments] = {name: _Moments() for name in norms}
        for row, column in plan:
            with _norms_replaced(norms, statistics, measured, row, column):
                compute(_tile(x, row, column, scale))
        statistics = measured
    out: Tensor | None = None
    for row, column in plan:
        with _norms_replaced(norms, statistics, {}, row, column):
            part = compute(_tile(x, row, column, scale))
        grown = part.shape[2] // (row.stop - row.start)
        if out is None:
            out = part.new_zeros((1, part.shape[1], plan.height * grown, plan.width * grown), dtype=torch.float32)
        weights = plan.weights(plan.rows, row, grown)[:, None] * plan.weights(plan.columns, column, grown)
        _cut(out, row, column, grown).addcmul_(part.float(), weights.to(part.device))
    assert out is not None, "an image has at least one tile"
    return out.to(part.dtype).contiguous(memory_format=torch.channels_last)


def _tile(x: Tensor, row: _Span, column: _Span, scale: int) -> Tensor:
    """A tile's part of x, in the layout of the networks' activations."""
    return _cut(x, row, column, scale).contiguous(memory_format=torch.channels_last)


def _cut(x: Tensor, row: _Span, column: _Span, scale: int) -> Tensor:
    """A view of a tile's part of x."""
    return x[:, :, row.start * scale : row.stop * scale, column.start * scale : column.stop * scale]


@dataclass
class _Moments:
    """Number, mean and sum of squared deviations of a norm's groups over the tiles so far. Shapes: (groups,)."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm"."""
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + squares + delta.square() * (self.count * count / total)
        self.count = total


@contextmanager
def _norms_replaced(
    norms: dict[int, GroupNorm],
    statistics: dict[int, _Moments],
    measured: dict[int, _Moments],
    row: _Span,
    column: _Span,
) -> Iterator[None]:
    """The norms use `statistics` where there are some, and add what they see of the tile's own part to `measured`."""
    own = functools.partial(_own_part, row=row, column=column)
    for name, norm in norms.items():
        forward = functools.partial(_norm, norm, statistics.get(name), measured.get(name), own)
        # An attribute of the object hides the method of its class until it is removed.
        vars(norm)["forward"] = forward
    try:
        yield
    finally:
        for norm in norms.values():
            del vars(norm)["forward"]


def _norm(
    norm: GroupNorm, fixed: _Moments | None, measured: _Moments | None, own: TileFunction, x: Tensor, **options: object
) -> Tensor:
    """`norm(x)`. Shapes: x (1, C, h, w); returns the same."""
    if measured is not None:
        _measure(norm, own(x), measured)
    if fixed is None:
        return GroupNorm.forward(norm, x, **options)  # type: ignore[arg-type]
    assert isinstance(fixed.mean, Tensor), "measured by the pass before"
    rstd = torch.rsqrt(torch.as_tensor(fixed.squares) / fixed.count + norm.eps)
    each = norm.weight.numel() // norm.num_groups
    scale = norm.weight.double() * rstd.repeat_interleave(each)
    shift = norm.bias.double() - fixed.mean.repeat_interleave(each) * scale
    if norm.channel_bias is not None:
        shift = shift + norm.channel_bias.double() * scale
    y = torch.addcmul(shift.float()[:, None, None], x.float(), scale.float()[:, None, None])
    return (F.silu(y) if norm.activation == "silu" else y).to(x.dtype)


def _measure(norm: GroupNorm, x: Tensor, moments: _Moments) -> None:
    """Adds the groups of x (with the bias that the norm adds) to `moments`. Shapes: x (1, C, h, w)."""
    channels, height, width = x.shape[1:]
    x = x.float() if norm.channel_bias is None else x.float() + norm.channel_bias[:, None, None].float()
    x = x.contiguous(memory_format=torch.channels_last)
    # Five times faster on a CPU than var_mean, and just what the norm would take.
    pixels = height * width
    _, mean, rstd = torch.native_group_norm(x, None, None, 1, channels, pixels, norm.num_groups, norm.eps)
    variance = (rstd[0].double() ** -2 - norm.eps).clamp(min=0.0)
    count = pixels * channels // norm.num_groups
    moments.add(count, mean[0].double(), variance * count)


def _own_part(x: Tensor, row: _Span, column: _Span) -> Tensor:
    """The part of a tile's features that no other tile counts too."""
    scale = x.shape[2] // (row.stop - row.start)
    top, left = (span.own_start - span.start for span in (row, column))
    height, width = (span.own_stop - span.own_start for span in (row, column))
    return x[:, :, top * scale : (top + height) * scale, left * scale : (left + width) * scale]


def _norms(*parts: nn.Module) -> dict[int, GroupNorm]:
    modules = [module for part in parts for module in part.modules()]
    return {index: module for index, module in enumerate(modules) if isinstance(module, GroupNorm)}


def _require_whole_latents(x: Tensor, f: int) -> None:
    if any(side % f for side in x.shape[2:]):
        height, width = x.shape[2:]
        raise ConfigError(
            f"an image of {height} x {width} pixels: both sides must be multiples of the downsampling factor {f}; crop "
            f"it to {height // f * f} x {width // f * f}"
        )


def _checked(tile: int, overlap: int | None, f: int) -> tuple[int, int]:
    """Tile and overlap in pixels, if the autoencoder can work with them."""
    if tile < f or tile % f:
        near = max(tile // f, 1) * f
        raise ConfigError(f"tile={tile}: must be a multiple of the downsampling factor {f}; take {near}")
    default = tile // OVERLAP_SHARE // f * f
    if overlap is None:
        return tile, default
    if overlap < 0 or overlap % f or overlap >= tile:
        raise ConfigError(
            f"overlap={overlap}: must be 0 or a multiple of the downsampling factor {f} that is smaller than "
            f"tile={tile}; take {default}"
        )
    return tile, overlap
