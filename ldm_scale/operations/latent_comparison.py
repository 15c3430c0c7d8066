"""Cached latents decoded and compared with the pictures that they were encoded from.

The comparison needs no threshold of quality: the cache must decode as well as what the artifact makes of the picture
now, however good the autoencoder is. Where it does not, the usual defects are tried one after the other, and the one
that explains the stored moments is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm_scale.data.decode import image_extension, to_pixels
from ldm_scale.data.latent_rendering import variant_box
from ldm_scale.data.latents import LatentCache, read_moments, read_record
from ldm_scale.data.metadata import member_bytes
from ldm_scale.data.pictures import Picture
from ldm_scale.data.policy import BadSample
from ldm_scale.data.shards import Dataset
from ldm_scale.errors import DataError
from ldm_scale.evaluation.reconstruction import psnr
from ldm_scale.interchange.load import LoadedAutoencoder
from ldm_scale.operations.doctor_report import Report
from ldm_scale.telemetry.log import shows_progress

MAX_SHOWN = 10  # findings of one kind that are told one by one
MAX_LOSS_DB = 0.5  # below what the artifact gives for the source now
MAX_DB = 50.0  # what is better is as good: beyond it a comparison would measure the rounding of stored moments
# Relative root mean square between stored moments and those computed now: far above rounding, far below any defect.
TOLERANCE = {"fp32": 0.02, "bf16": 0.1}


@dataclass
class Shown:
    """Findings of one kind: the first few in full, the others as a count."""

    report: Report
    counts: Counter[str] = field(default_factory=Counter)

    def error(self, kind: str, what: str, where: str, fix: str = "") -> None:
        """Notes an error."""
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_SHOWN:
            self.report.error(what, where, fix)

    def close(self) -> None:
        """Notes how many were not told."""
        for kind, count in self.counts.items():
            if count > MAX_SHOWN:
                self.report.error(f"{kind}: {count - MAX_SHOWN} more like these", fix="encode the cache anew")


@dataclass
class Pair:
    """A split of the cache and of its source."""

    cached: Dataset
    source: Dataset
    cache: LatentCache

    def where(self, number: int) -> str:
        """Shard and key of a sample, for findings."""
        return f"{self.cached.shard_of(number).path} {self.cached.key(number)}"

    def numbers(self) -> Iterator[int]:
        """The samples in latent shards."""
        first = 0
        for shard in self.cached.shards:
            if shard.holds_latents:
                yield from range(first, first + shard.num_samples)
            first += shard.num_samples

    def picture(self, number: int, variant: str) -> tuple[Tensor, dict[str, Any]]:
        """Pixels of a variant, from the source, and what its record should say. Shapes: returns (1, 3, H, W).

        Raises: BadSample if the picture does not decode.
        """
        raw = self.source.read(number)
        extension = image_extension(raw)
        if extension is None:
            raise BadSample("no image")
        picture = Picture(member_bytes(raw, extension))
        box, mirror = variant_box(variant, *picture.size, self.cache, self.source.key(number))
        side = self.cache.transform.resolution
        pixels = to_pixels(np.stack([picture.render(box, mirror, (side, side))]))
        return pixels, {"box": list(box), "flip": mirror}


@dataclass
class Compared:
    """A sample's stored moments beside those of its source now. Shapes: x (1, 3, H, W), moments (1, C, h, w)."""

    number: int
    variant: str
    x: Tensor
    stored: Tensor
    now: Tensor


@torch.no_grad()
def compare(
    pair: Pair,
    autoencoder: LoadedAutoencoder,
    numbers: list[int],
    min_psnr: float | None,
    shown: Shown,
    report: Report,
) -> None:
    """Notes samples that do not decode as their source does, with the cause where one is found."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, split, before = autoencoder.to(device).network, pair.cached.split, shown.counts.total()
    stored_db, now_db, permuted_db = [], [], []
    tolerance = TOLERANCE[pair.cache.transform.precision]
    for index, number in enumerate(
        tqdm(numbers, desc=f"decode {split}", unit="images", mininterval=1.0, disable=not shows_progress())
    ):
        variant = pair.cache.variants[index % len(pair.cache.variants)]
        where = f"{pair.where(number)} ({variant})"
        raw = pair.cached.read(number)
        try:
            x, crop = pair.picture(number, variant)
        except BadSample as error:
            shown.error("pairing", f"holds moments, but its source cannot be used ({error})", where)
            continue
        recorded = read_record(raw)["variants"].get(variant)
        if recorded != crop:
            shown.error("crops", f"recorded as {recorded}, its variant is {crop}", where, "encode the shard anew")
        x = x.to(device)
        stored = torch.from_numpy(read_moments(raw, variant, pair.cache).astype(np.float32))[None].to(device)
        item = Compared(number, variant, x, stored, _encode(network, x))
        y, y_now = (_decode(network, moments, pair.cache).clamp(-1, 1) for moments in (item.stored, item.now))
        stored_db.append(_psnr(x, y))
        now_db.append(_psnr(x, y_now))
        permuted_db.append([_psnr(x, y[:, list(order)]) for order in _PERMUTATIONS])
        difference = _difference(item.stored, item.now, pair.cache)
        if difference > tolerance or stored_db[-1] < min(now_db[-1], MAX_DB) - MAX_LOSS_DB:
            shown.error(
                "decoding",
                f"decodes to {stored_db[-1]:.1f} dB, what its source encodes to now to {now_db[-1]:.1f} dB; moments "
                f"differ by {difference:.0%}{_cause(pair, autoencoder, item, tolerance)}",
                where,
                "encode the cache anew",
            )
        if min_psnr is not None and stored_db[-1] < min_psnr:
            shown.error("decoding", f"decodes to {stored_db[-1]:.1f} dB, below --min-psnr {min_psnr:g}", where)
    if stored_db:
        _summarise(pair, stored_db, now_db, permuted_db, shown.counts.total() == before, report)


@torch.no_grad()
def keys_that_differ(pair: Pair, autoencoder: LoadedAutoencoder, numbers: Iterable[int]) -> list[str]:
    """Keys of the samples of which any stored moment is not what the artifact gives for the source now.

    Each number is looked at by itself, unlike in `compare`: one altered number is lost in a mean.
    """
    network = autoencoder.to("cuda" if torch.cuda.is_available() else "cpu").network
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    tolerance = 2 * TOLERANCE[pair.cache.transform.precision]
    bar = tqdm(numbers, desc="encode anew", unit="images", mininterval=1.0, disable=not shows_progress(), leave=False)
    return [pair.cached.key(number) for number in bar if _differs(pair, network, device, number, tolerance)]


def _differs(pair: Pair, network: Any, device: torch.device, number: int, tolerance: float) -> bool:
    """Whether a moment of a sample is off by more than the tolerance, relative to their root mean square."""
    try:
        raw = pair.cached.read(number)
        if "unusable" in read_record(raw):
            return False
        for variant in pair.cache.variants:
            stored = torch.from_numpy(read_moments(raw, variant, pair.cache).astype(np.float32))[None]
            now = _encode(network, pair.picture(number, variant)[0].to(device)).cpu()
            parts = 2 if pair.cache.kind == "kl" else 1
            for a, b in zip(stored.chunk(parts, dim=1), now.chunk(parts, dim=1), strict=True):
                if (a - b).abs().max() > tolerance * b.square().mean().sqrt():
                    return True
    except (DataError, BadSample):
        return True
    return False


_PERMUTATIONS = [order for order in permutations(range(3)) if order != (0, 1, 2)]


def _summarise(
    pair: Pair,
    stored_db: list[float],
    now_db: list[float],
    permuted_db: list[list[float]],
    clean: bool,
    report: Report,
) -> None:
    """Notes the means, and channels that would fit better in another order."""
    split = pair.cached.split
    mean, reference = float(np.mean(stored_db)), float(np.mean(now_db))
    permuted = dict(zip(_PERMUTATIONS, np.mean(permuted_db, axis=0).tolist(), strict=True))
    best = max(permuted, key=lambda order: permuted[order])
    report.facts[split] |= {
        "compared": len(stored_db),
        "psnr_db": mean,
        "psnr_min_db": min(stored_db),
        "source_psnr_db": reference,
        "permuted_channels_psnr_db": permuted[best],
    }
    if permuted[best] > mean and not clean:
        report.error(
            f"{split}: decoded pictures fit better with their channels in the order {best} ({permuted[best]:.1f} dB "
            f"instead of {mean:.1f}): colour channels were swapped before encoding",
            str(pair.cached.manifest_path),
            "encode the cache anew",
        )
    elif permuted[best] > mean + MAX_LOSS_DB:
        report.warning(
            f"{split}: decoded pictures fit better with their channels in the order {best} ({permuted[best]:.1f} dB "
            f"instead of {mean:.1f}), and so do those encoded now: the artifact itself mixes colours up",
        )
    elif clean:
        report.ok(
            f"{split}: {len(stored_db)} samples decode to {mean:.2f} dB (least {min(stored_db):.2f}), their sources "
            f"encoded now to {reference:.2f}; with channels permuted at best {permuted[best]:.2f}"
        )


def _cause(pair: Pair, autoencoder: LoadedAutoencoder, item: Compared, tolerance: float) -> str:
    """Which known defect explains the stored moments, as the end of a sentence; "" if none does."""
    network, x = autoencoder.network, item.x
    pictures: dict[str, Tensor] = {
        "those of pixels in [0, 1] instead of [-1, 1]": (x + 1) / 2,
        "those of pixels in 0 to 255 instead of [-1, 1]": (x + 1) * 127.5,
        "those of pixels in [-0.5, 0.5] instead of [-1, 1]": x / 2,
        "those of the picture with red and blue swapped": x.flip(1),
        "those of the mirrored picture": x.flip(-1),
        "those of the picture upside down": x.flip(-2),
    }
    for other in (item.number - 1, item.number + 1):
        if 0 <= other < pair.source.num_samples:
            try:
                pictures[f"those of {pair.source.key(other)}"], _ = pair.picture(other, item.variant)
            except BadSample:
                continue
    for cause, picture in pictures.items():
        picture = picture.to(x.device)
        if _difference(item.stored, _encode(network, picture), pair.cache) < tolerance:
            return f": they are {cause}"
    mean, *rest = item.now.chunk(2, dim=1) if pair.cache.kind == "kl" else (item.now,)
    scaled = torch.cat([autoencoder.latent_statistics.normalize(mean), *rest], dim=1)
    if _difference(item.stored, scaled, pair.cache) < tolerance:
        return ": they have the latent statistics applied already"
    return ""


def _encode(network: Any, x: Tensor) -> Tensor:
    """Moments as a cache stores them. Shapes: (1, 3, H, W) to (1, C, h, w)."""
    return torch.cat([part for part in network.encode_moments(x) if part is not None], dim=1).float()


def _decode(network: Any, moments: Tensor, cache: LatentCache) -> Tensor:
    """Pixels of the moments' mode."""
    mean = moments.chunk(2, dim=1)[0] if cache.kind == "kl" else moments
    return network.decode_raw(mean).float()  # type: ignore[no-any-return]


def _difference(stored: Tensor, now: Tensor, cache: LatentCache) -> float:
    """Root mean square of the difference, relative to that of `now`: the larger one of mean's and log-variance's.

    Together, log-variances around -20 would hide means that are off.
    """
    parts = 2 if cache.kind == "kl" else 1
    pairs = zip(stored.chunk(parts, dim=1), now.chunk(parts, dim=1), strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def _psnr(x: Tensor, y: Tensor) -> float:
    """PSNR in dB; equal pictures count as 100, so that means stay finite."""
    return min(float(psnr(x, y)), 100.0)
