"""Four ways from shards to batches, with one decoder and one collation: ours, webdataset, torchdata's, MosaicML's."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from benchmarks.data_shards import make_latents, make_pictures
from ldm_scale.config.schema import DataConfig
from ldm_scale.data import build_loader
from ldm_scale.data.decode import DecodeSettings, decode_image, to_pixels
from ldm_scale.data.sources.tars import index_tars

BATCH = 64
NUM_SHARDS = 8
SHUFFLE = 1000  # samples in webdataset's buffer
SETTINGS = DecodeSettings(resolution=256, augment=False)
NEEDED = {"torchdata": "torchdata", "mosaicml-streaming": "streaming"}  # package -> module
INSTALL = "pip install --no-deps torchdata mosaicml-streaming brotli cramjam python-snappy xxhash catalogue zstd"

Batches = Iterator[Any]


def prepare(folder: Path, case: str, num_samples: int) -> None:
    """Nothing; the shards of a case lie there, for every way that is installed."""
    if case == "latents":
        make_latents(folder, num_samples, NUM_SHARDS)
        return
    tars = make_pictures(folder / "pictures", num_samples, NUM_SHARDS, side=512)
    index_tars(tars, folder / "pictures" / "manifest.json", "train")
    if find_spec("streaming"):
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "mds"), columns={"jpg": "bytes", "txt": "str", "key": "str"}) as writer:
            for sample in wds.WebDataset([str(tar) for tar in tars], shardshuffle=False):
                writer.write({"jpg": sample["jpg"], "txt": sample["txt"].decode(), "key": sample["__key__"]})


def ways(case: str) -> dict[str, Callable[[Path, int], Batches]]:
    """Endless batches of a folder's samples by so many loader processes, for every way that is installed.

    A batch is (pictures or moments, captions).
    """
    if case == "latents":
        return {
            "ours": lambda folder, workers: _ours(folder / "latents" / "manifest.json", workers),
            "webdataset": lambda folder, workers: _webdataset(folder / "latents", workers, _latent_tuples, np.stack),
        }
    found: dict[str, Callable[[Path, int], Batches]] = {
        "ours": lambda folder, workers: _ours(folder / "pictures" / "manifest.json", workers),
        "webdataset": lambda folder, workers: _webdataset(folder / "pictures", workers, _picture_tuples, _pixels),
    }
    if find_spec("torchdata"):
        found["torchdata over webdataset"] = _torchdata
    if find_spec("streaming"):
        found["mosaicml-streaming"] = _streaming
    return found


def _ours(manifest: Path, workers: int) -> Batches:
    data = DataConfig(manifest=str(manifest), resolution=256, num_workers=workers, prefetch_batches=1)
    loader = build_loader(
        data, seed=0, global_batch=BATCH, micro_batch=BATCH, rank=0, world_size=1, augment=False, accept_latents=True
    )
    for batch in loader:
        yield (batch.images if batch.moments is None else batch.moments), batch.captions


def _decode_jpeg(key: str, data: bytes) -> Any:
    """webdataset's interface of a decoder: the picture, None for what it does not decode."""
    return decode_image(data, SETTINGS, 0, key) if key.endswith(".jpg") else None


def _decode_npy(key: str, data: bytes) -> Any:
    return np.load(io.BytesIO(data)) if key.endswith(".npy") else None


def _picture_tuples(dataset: Any) -> Any:
    return dataset.decode(_decode_jpeg).to_tuple("jpg", "txt")


def _latent_tuples(dataset: Any) -> Any:
    return dataset.decode(_decode_npy).to_tuple("latents.center.npy", "txt")


def _pixels(images: Any) -> torch.Tensor:
    return to_pixels(np.stack(images))


def _samples(folder: Path) -> Any:
    """webdataset's usual pipeline, up to the decoder."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    return wds.WebDataset(tars, shardshuffle=NUM_SHARDS).shuffle(SHUFFLE)


def _webdataset(folder: Path, workers: int, tuples: Callable[[Any], Any], stack: Callable[[Any], Any]) -> Batches:
    def collate(samples: list[Any]) -> Any:
        arrays, captions = zip(*samples, strict=True)
        stacked = stack(arrays)
        return (torch.from_numpy(stacked) if isinstance(stacked, np.ndarray) else stacked), list(captions)

    dataset = tuples(_samples(folder)).repeat().batched(BATCH, collation_fn=collate, partial=False)
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


def _collate(samples: list[Any]) -> Any:
    images, captions = zip(*samples, strict=True)
    return _pixels(images), list(captions)


def _torchdata(folder: Path, workers: int) -> Batches:
    from torchdata.stateful_dataloader import StatefulDataLoader

    dataset = _picture_tuples(_samples(folder / "pictures")).repeat()
    return iter(StatefulDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=_collate))


def _streaming(folder: Path, workers: int) -> Batches:
    from streaming import StreamingDataset

    class Pictures(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return decode_image(sample["jpg"], SETTINGS, 0, sample["key"]), sample["txt"]

    dataset = Pictures(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    while True:
        yield from torch.utils.data.DataLoader(dataset, BATCH, num_workers=workers, collate_fn=_collate, drop_last=True)
