"""Image shards to latent shards: what `ldm-scale encode` does on one rank.

Shard i belongs to rank i modulo the number of ranks, whatever the others do: no process group, so any launcher will do,
and ranks may start and end at different times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from ldm_scale import __version__
from ldm_scale.conditioning.frozen_text import FrozenTextEncoder
from ldm_scale.config.fit import neighbours
from ldm_scale.data.decode import to_pixels
from ldm_scale.data.latent_rendering import Rendered, pack_sample, read_pieces
from ldm_scale.data.latent_shards import CacheFolder, Source, sha256_of
from ldm_scale.data.latents import LATENTS, LatentCache, LatentTransform
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.env import Launch, choose_device, cpu_threads
from ldm_scale.engine.preemption import Stop, StopRequest
from ldm_scale.engine.rank_files import MANIFEST, read_manifest
from ldm_scale.engine.restarts import count_start
from ldm_scale.errors import CheckpointError, ConfigError, DataError
from ldm_scale.interchange.artifact import AUTOENCODER_FORMAT, DESCRIPTION, Artifact, artifact_format
from ldm_scale.interchange.cached_text import describe_text, open_text_encoder
from ldm_scale.interchange.load import LoadedAutoencoder, read_source
from ldm_scale.telemetry.log import get_logger, shows_progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Stopped(Exception):
    """A signal asked for the end; the shard under way is given up."""


@dataclass
class _Tally:
    images: int = 0
    unusable: int = 0
    encoded: int = 0
    kept: int = 0
    seconds: float = 0.0


def encode(arguments: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    """What was encoded and what the cache holds now, as plain values.

    Raises: ConfigError for arguments that cannot be, CheckpointError for the artifact, DataError for the shards.
    """
    log = get_logger(launch.rank)
    _require_finished(arguments.artifact)
    artifact = read_source(arguments.artifact)
    artifact = artifact if isinstance(artifact, Artifact) else artifact.autoencoder
    text_encoder = _open_text_encoder(arguments)
    cache = describe_cache(artifact, arguments, text_encoder)
    folder = CacheFolder(arguments.out, arguments.manifest, cache)
    chosen = choose_shards(folder, arguments.split, arguments.max_shards)
    mine = chosen[launch.rank :: launch.world_size]
    pending = [source for source in mine if folder.find(source) is None]
    tally = _Tally(kept=len(mine) - len(pending))
    device = _device(arguments.device, launch)
    log.info(
        f"encode: {len(pending)} of {len(mine)} shards of this rank to do ({launch.world_size} ranks), {device.type}, "
        f"{cache.transform.precision}, moments {cache.moments_shape} in {cache.transform.dtype} x "
        f"{len(cache.variants)} variants; output in {folder.out}"
    )
    folder.remove_abandoned()
    if launch.rank == 0:
        count_start(folder.out, sum(folder.find(source) is not None for source in chosen))
    started = time.monotonic()
    stop = StopRequest()
    stopped = ""
    if pending:
        dtype = DTYPES[cache.transform.precision]
        autoencoder = LoadedAutoencoder(artifact).to(device, dtype)
        if text_encoder is not None:
            text_encoder.to(device, dtype)
        with stop:
            encoder = _Encoder(folder, autoencoder, text_encoder, device, stop, tally)
            try:
                encoder.encode_shards(pending, arguments.batch, arguments.workers)
            except _Stopped:
                stopped = stop.signal_name
    tally.seconds = time.monotonic() - started
    manifest = folder.publish()
    restart = bool(stopped) and stop.kind is Stop.RESTART
    report = _report(folder, manifest, tally, text_encoder, stopped, launch) | {"restart": restart}
    if stopped:
        log.warning(f"stopped by {stopped}: the same command goes on from here")
    return report


def _require_finished(path: Path) -> None:
    """Nothing, unless the folder is a stage-1 checkpoint, or a run that has nothing better.

    Its statistics are measured when stage 1 ends and are part of the hash: no artifact would ever have the cache's.
    Raises: CheckpointError then.
    """
    if artifact_format(path) or (path / DESCRIPTION).is_file():
        return
    if artifact_format(path / "artifact") == AUTOENCODER_FORMAT:
        return
    checkpoint = path if (path / MANIFEST).is_file() else latest_checkpoint(path / "checkpoints")
    if checkpoint is not None and read_manifest(checkpoint)["config"].get("stage") == "autoencoder":
        found = "a stage-1 checkpoint" if checkpoint == path else "a stage-1 run that is not finished"
        raise CheckpointError(
            f"{path} is {found}, whose hash no artifact will have, so that no stage 2 could use the cache: finish the "
            "run first, then give the run folder or its artifact"
        )


def _open_text_encoder(arguments: argparse.Namespace) -> FrozenTextEncoder | None:
    """The text tower whose contexts are to be stored, on the CPU; None without any.

    Raises: ConfigError if it cannot be had.
    """
    if (arguments.text_encoder is None) != (arguments.text_weights is None):
        raise ConfigError(
            f"--text-encoder {arguments.text_encoder} with --text-weights {arguments.text_weights}: contexts need an "
            "architecture and its weights; give both or neither"
        )
    if arguments.text_encoder is None:
        return None
    return open_text_encoder(arguments.text_encoder, arguments.text_weights, arguments.text_layer)


def describe_cache(
    artifact: Artifact, arguments: argparse.Namespace, text_encoder: FrozenTextEncoder | None = None
) -> LatentCache:
    """The provenance that the arguments ask for.

    Raises: ConfigError if they contradict each other or the artifact.
    """
    config = artifact.config
    resolution = artifact.provenance["resolution"] if arguments.resolution is None else arguments.resolution
    if resolution % config.downsampling_factor:
        raise ConfigError(
            f"--resolution {resolution}: must be a multiple of the artifact's f={config.downsampling_factor}; give "
            f"{neighbours(resolution, config.downsampling_factor)}"
        )
    scale = arguments.crop_scale_min
    if (arguments.crops > 0) != (scale < 1.0):
        raise ConfigError(
            f"--crops {arguments.crops} with --crop-scale-min {scale:g}: random crops need both, a number above 0 and "
            "a scale below 1; give both or neither"
        )
    transform = LatentTransform(
        resolution, arguments.crops, scale, arguments.flips, arguments.precision, arguments.dtype
    )
    return LatentCache(
        artifact.content_hash,
        config.kind,
        config.downsampling_factor,
        config.latent_channels,
        transform,
        f"ldm-scale {__version__}",
        None if text_encoder is None else describe_text(text_encoder),
    )


def choose_shards(folder: CacheFolder, splits: list[str], max_shards: int | None) -> list[Source]:
    """The first `max_shards` (None: all) shards of the splits ([]: of all splits), the same on every rank.

    Raises: DataError if there is no such split.
    """
    unknown = [split for split in splits if split not in folder.sources]
    if unknown:
        raise DataError(
            f"--split {unknown[0]}: {folder.source_manifest} has no such split; it has: {', '.join(folder.sources)}"
        )
    return [source for split in splits or folder.sources for source in folder.sources[split]][:max_shards]


class _Encoder:
    """Runs shards through the autoencoder."""

    def __init__(
        self,
        folder: CacheFolder,
        autoencoder: LoadedAutoencoder,
        text_encoder: FrozenTextEncoder | None,
        device: torch.device,
        stop: StopRequest,
        tally: _Tally,
    ) -> None:
        self._folder, self._autoencoder, self._device = folder, autoencoder, device
        self._text_encoder = text_encoder
        self._stop, self._tally = stop, tally

    def encode_shards(self, sources: list[Source], batch: int, num_workers: int) -> None:
        """Nothing; the latent shards of these sources are written.

        Raises: _Stopped when a signal asked for it; DataError if a source is not what its manifest says.
        """
        pieces = [
            (source.split, range(first, min(first + batch, source.first + source.num_samples)))
            for source in sources
            for first in range(source.first, source.first + source.num_samples, batch)
        ]
        groups = read_pieces(self._folder.datasets, self._folder.cache, pieces, num_workers)
        total = sum(source.num_samples for source in sources)
        with tqdm(total=total, desc="encode", unit="images", mininterval=1.0, disable=not shows_progress()) as bar:
            for source in sources:
                _check_sum(source)
                self._folder.write(source, self._samples(source, groups, bar))
                self._tally.encoded += 1

    def _samples(self, source: Source, groups: Iterator[list[Rendered]], bar: Any) -> Iterator[dict[str, Any]]:
        """The samples of the latent shard."""
        left = source.num_samples
        while left:
            if self._stop.requested:
                raise _Stopped
            rendered = next(groups)
            moments = self._moments(np.concatenate([sample.images for sample in rendered]))
            contexts = self._contexts([caption for sample in rendered for caption in sample.captions])
            at = context_at = 0
            for sample in rendered:
                end, context_end = at + len(sample.images), context_at + len(sample.captions)
                of_sample = None if contexts is None else contexts[context_at:context_end]
                yield pack_sample(sample, moments[at:end], self._folder.cache, of_sample)
                at, context_at = end, context_end
                self._tally.unusable += not len(sample.images)
            left -= len(rendered)
            self._tally.images += len(rendered)
            bar.update(len(rendered))

    def _contexts(self, captions: list[str]) -> NDArray[np.float32] | None:
        """The text tower's output, if it is wanted. Shapes: returns (len(captions), M, d)."""
        text = self._folder.cache.text
        if self._text_encoder is None or text is None:
            return None
        if not captions:
            return np.empty((0, text.max_tokens, text.width), np.float32)
        contexts: NDArray[np.float32] = self._text_encoder(captions).float().cpu().numpy()
        return contexts

    @torch.no_grad()
    def _moments(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Mean and, of a KL posterior, log-variance below it. Shapes: (N, H, W, 3) to (N, C, h, w)."""
        network = self._autoencoder.network
        dtype = DTYPES[self._folder.cache.transform.precision]
        if not len(images):
            return np.empty((0, *self._folder.cache.moments_shape), np.float32)
        parts = network.encode_moments(to_pixels(images).to(self._device, dtype))
        moments: NDArray[np.float32] = torch.cat([part for part in parts if part is not None], 1).float().cpu().numpy()
        return moments


def _check_sum(source: Source) -> None:
    """Returns if the image shard is the one of its manifest: the cache states its checksum."""
    found = sha256_of(source.path)
    if found != source.entry["sha256"]:
        raise DataError(
            f"{source.path}: its sha256 is {found[:12]}, its manifest says {source.entry['sha256'][:12]}; the shard "
            "was changed: copy it again or index it anew with `ldm-scale prepare index`"
        )


def _device(wanted: str, launch: Launch) -> torch.device:
    """This rank's device; on the CPU also its share of threads."""
    device = choose_device(wanted, launch, "--device ")
    if device.type == "cpu":
        torch.set_num_threads(cpu_threads(launch.local_world_size))
    return device


def _report(
    folder: CacheFolder,
    manifest: dict[str, Any],
    tally: _Tally,
    text_encoder: FrozenTextEncoder | None,
    stopped: str,
    launch: Launch,
) -> dict[str, Any]:
    """What the command prints; its counts are of this rank's shards alone, its splits of the whole cache."""
    splits = {}
    for split, entry in manifest["splits"].items():
        cached = [shard for shard in entry["shards"] if shard.get("kind") == LATENTS]
        splits[split] = {
            "num_samples": entry["num_samples"],
            "shards": len(entry["shards"]),
            "latent_shards": len(cached),
            "bytes": sum(shard["bytes"] for shard in cached),
        }
    complete = all(split["shards"] == split["latent_shards"] for split in splits.values())
    return {
        "manifest": str(folder.out / "manifest.json"),
        "artifact_sha256": folder.cache.artifact_sha256,
        "transform_sha256": folder.cache.transform.sha256,
        "moments_shape": list(folder.cache.moments_shape),
        "variants": list(folder.cache.variants),
        "contexts": None if folder.cache.text is None else asdict(folder.cache.text),
        "splits": splits,
        "complete": complete,
        "note": "" if complete or launch.world_size == 1 else "so far; other ranks may still be encoding",
        "rank": launch.rank,
        "world_size": launch.world_size,
        "counts_of": "this rank" if launch.world_size > 1 else "all",
        "encoded_shards": tally.encoded,
        "kept_shards": tally.kept,
        "images": tally.images,
        "unusable": tally.unusable,
        "truncated_captions": 0 if text_encoder is None else text_encoder.truncated,
        "images_per_s": round(tally.images / max(tally.seconds, 1e-9), 2),
        "stopped_by": stopped,
    }
