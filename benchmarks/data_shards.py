"""Shards that the benchmarks of the data layer read: parts of a photograph as JPEGs, and random numbers as latents."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import webdataset as wds
from PIL import Image

from ldm_scale.data.latent_shards import CacheFolder
from ldm_scale.data.latents import LatentCache, LatentTransform, pack_moments
from ldm_scale.data.sources.tars import index_tars

Members = dict[str, Any]
QUALITY = 92
LATENTS = LatentCache("0" * 64, "kl", 8, 4, LatentTransform(256))  # moments of 8x32x32 in float16: 16 KiB


def make_pictures(folder: Path, num_samples: int, num_shards: int, side: int, broken_share: float = 0.0) -> list[Path]:
    """Tars of square JPEGs with a caption each, different parts of a photograph; a share of them is cut short."""
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photograph = Image.open(path).convert("RGB")
    rng = np.random.default_rng(0)

    def samples() -> Iterator[Members]:
        for number in range(num_samples):
            extent = float(rng.uniform(0.6, 1.0)) * 512
            left, top = rng.uniform(0, photograph.width - extent), rng.uniform(0, photograph.height - extent)
            box = (left, top, left + extent, top + extent)
            picture = photograph.resize((side, side), Image.Resampling.BICUBIC, box=box)
            pixels = np.asarray(picture, dtype=np.int16) + rng.normal(0, 3, (side, side, 1)).astype(np.int16)
            buffer = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
            content = buffer.getvalue()
            if rng.random() < broken_share:
                content = content[: len(content) // 2]
            yield {"__key__": f"{number:07d}", "jpg": content, "txt": f"part {number} of a photograph".encode()}

    return _write(folder, samples(), num_samples, num_shards)


def make_latents(folder: Path, num_samples: int, num_shards: int) -> Path:
    """The manifest of a latent cache with a caption a sample; its pictures have one pixel."""
    content = one_pixel()
    pictures = (
        {"__key__": f"{number:07d}", "png": content, "txt": f"caption number {number}".encode()}
        for number in range(num_samples)
    )
    source = folder / "pictures" / "manifest.json"
    index_tars(_write(source.parent, pictures, num_samples, num_shards), source, "train")
    cache = CacheFolder(folder / "latents", source, LATENTS)
    rng = np.random.default_rng(0)
    for shard in cache.sources["train"]:
        cache.write(shard, (_latent_sample(cache, shard.first + row, rng) for row in range(shard.num_samples)))
    cache.publish()
    return folder / "latents" / "manifest.json"


def one_pixel() -> bytes:
    """A PNG of one pixel."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def _latent_sample(cache: CacheFolder, number: int, rng: np.random.Generator) -> Members:
    raw = cache.datasets["train"].read(number)
    moments = rng.standard_normal(LATENTS.moments_shape, dtype=np.float32)
    return {
        "__key__": str(raw["__key__"]).rpartition("/")[2],
        "latents.center.npy": pack_moments(moments, LATENTS.transform.dtype, str(number)),
        "latents.json": b'{"size": [1, 1], "variants": {"center": {"box": [0, 0, 1, 1], "flip": false}}}',
        "txt": bytes(raw["txt"]),  # type: ignore[arg-type]
    }


def _write(folder: Path, samples: Iterator[Members], num_samples: int, num_shards: int) -> list[Path]:
    """The tars, with as many of the samples each."""
    assert num_samples % num_shards == 0, f"{num_samples} samples in {num_shards} shards"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"shard-{number:06d}.tar" for number in range(num_shards)]
    for path in paths:
        with wds.TarWriter(str(path), encoder=False, mtime=0.0) as writer:
            for _ in range(num_samples // num_shards):
                writer.write(next(samples))
    return paths
