"""The folder of a latent cache: what is encoded already, how a shard gets there, the manifest.

A shard counts as encoded when its sidecar is there: the tar is written under another name, renamed, and only then
indexed, so that a process killed at any moment leaves nothing that would pass for whole. The sidecar carries the
provenance, by which a later run knows what to keep. Nobody owns the manifest: whoever has encoded writes down what it
finds, and looks once more, so that of ranks that finish at the same time one sees all. Shards that are not encoded yet
stand in it as the source's image shards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_scale.data.indexing import index_shard, write_json
from ldm_scale.data.latents import LATENTS, LatentCache
from ldm_scale.data.manifest import MANIFEST_NAME, manifest_path, plain_splits, read_manifest
from ldm_scale.data.shard_files import new_shard, remove_abandoned
from ldm_scale.data.shards import Dataset, open_manifest
from ldm_scale.data.sidecar import SUFFIX, open_sidecar
from ldm_scale.errors import DataError


@dataclass(frozen=True)
class Source:
    """One image shard that is to be encoded, or has been."""

    split: str
    index: int  # in its split
    first: int  # number of its first sample in the split
    path: Path
    entry: dict[str, Any]  # of the source's manifest

    @property
    def num_samples(self) -> int:
        """Samples in it."""
        return int(self.entry["num_samples"])

    @property
    def identity(self) -> dict[str, Any]:
        """What a latent shard says about the image shard that it stands for."""
        return {"file": self.path.name, **{key: self.entry[key] for key in ("num_samples", "bytes", "sha256")}}


@dataclass
class CacheFolder:
    """The folder of a latent cache, and the image manifest that it is made from."""

    out: Path
    source_manifest: Path
    cache: LatentCache
    datasets: dict[str, Dataset] = field(init=False)
    sources: dict[str, list[Source]] = field(init=False)

    def __post_init__(self) -> None:
        """Opens the source.

        Raises: DataError if it cannot be opened, is a mixture, has buckets or holds latents itself, or if `out` holds
        something else.
        """
        self.source_manifest = manifest_path(self.source_manifest)
        self._manifest = read_manifest(self.source_manifest)
        splits = plain_splits(
            self.source_manifest, self._manifest, "encode the data sets that it was made from, then mix their caches"
        )
        self.datasets = {split: open_manifest(self.source_manifest, split) for split in splits}
        self.sources = {split: self._list(split) for split in self.datasets}
        self._check_out()

    def _list(self, split: str) -> list[Source]:
        dataset, entries = self.datasets[split], self._manifest["splits"][split]["shards"]
        if dataset.latents is not None:
            raise DataError(f"{self.source_manifest}: holds latent shards itself; give the manifest of the images")
        sources, first = [], 0
        for index, (shard, entry) in enumerate(zip(dataset.shards, entries, strict=True)):
            entry = {**entry, "sha256": entry.get("sha256") or sha256_of(shard.path)}
            sources.append(Source(split, index, first, shard.path, entry))
            first += shard.num_samples
        return sources

    def _check_out(self) -> None:
        """Returns if `out` is new, or a cache of this source; the source itself must never be overwritten."""
        stems = [source.path.name for sources in self.sources.values() for source in sources]
        if len(set(stems)) < len(stems):
            raise DataError(f"{self.source_manifest}: two shards have one name, so keys repeat; rename one of them")
        folders = {source.path.resolve().parent for sources in self.sources.values() for source in sources}
        if self.out.resolve() in {*folders, self.source_manifest.resolve().parent}:
            raise DataError(f"--out {self.out}: the images lie there; choose another folder")
        if (self.out / MANIFEST_NAME).exists() and "latents" not in read_manifest(self.out / MANIFEST_NAME):
            raise DataError(f"--out {self.out}: holds a data set that is no latent cache; choose another folder")

    def paths(self, source: Source) -> tuple[Path, Path]:
        """Tar and sidecar of a latent shard."""
        tar = self.out / source.path.name
        return tar, tar.with_suffix(SUFFIX)

    def find(self, source: Source) -> dict[str, Any] | None:
        """The manifest's entry of a shard that is encoded, None if it is not.

        Raises: DataError if what lies there was encoded otherwise, or was cut short since.
        """
        tar, sidecar = self.paths(source)
        if not sidecar.exists():
            return None
        content = open_sidecar(sidecar)
        provenance = content.extra.get("latents")
        if not isinstance(provenance, dict):
            raise DataError(f"{sidecar}: not the index of a latent shard; choose another --out")
        there = LatentCache.from_dict(provenance.get("cache"), str(sidecar))
        if there != self.cache:
            raise DataError(
                f"{tar}: encoded by {_describe(there)}, asked for is {_describe(self.cache)}; choose another --out, or "
                "remove the old cache"
            )
        encoded = provenance.get("source", {})
        # Of a filtered manifest, the same tar may stand for as many other samples.
        others = content.keys_digest != source.entry.get("keys", content.keys_digest)
        if encoded != source.identity or others:
            difference = f"another {source.path.name} (sha256 {str(encoded.get('sha256'))[:12]}, now "
            difference += f"{source.entry['sha256'][:12]})"
            if encoded.get("sha256") == source.entry["sha256"]:
                difference = f"other samples of the same {source.path.name} ({len(content)}, now {source.num_samples})"
            raise DataError(f"{tar}: encoded from {difference}; choose another --out, or remove the old cache")
        size = tar.stat().st_size if tar.exists() else 0
        if size != provenance["file"]["bytes"]:
            raise DataError(
                f"{tar}: {size} bytes, but its index says {provenance['file']['bytes']}; it was changed or copied in "
                f"part: copy it again, or remove {sidecar.name} and run this again"
            )
        return {
            "kind": LATENTS,
            "file": tar.name,
            "num_samples": source.num_samples,
            "keys": content.keys_digest,
            **provenance["file"],
            "index": sidecar.name,
            "source": source.identity,
        }

    def write(self, source: Source, samples: Iterable[dict[str, Any]]) -> None:
        """Nothing; the latent shard of these samples (members and "__key__") lies there, whole, with its sidecar.

        Leaves nothing if `samples` raises.
        """
        tar, sidecar = self.paths(source)
        self.out.mkdir(parents=True, exist_ok=True)
        with new_shard(tar, samples) as rows:
            keys = [f"{source.path.stem}/{row.name}" for row in rows]
            wanted = [self.datasets[source.split].key(source.first + row) for row in range(source.num_samples)]
            assert keys == wanted, f"{tar}: not the samples of its source"
        index_shard(tar, sidecar, self.out, rows, latents=self._provenance(source, tar))

    def remove_abandoned(self) -> None:
        """Nothing; files that killed processes left half-written are gone, those of living ones stay."""
        remove_abandoned(self.out)

    def _provenance(self, source: Source, tar: Path) -> dict[str, Any]:
        """What the sidecar says besides the index."""
        return {
            "cache": self.cache.to_dict(),
            "source": source.identity,
            "file": {"bytes": tar.stat().st_size, "sha256": sha256_of(tar)},
        }

    def publish(self) -> dict[str, Any]:
        """The manifest that lies there from now on: latent shards where they are encoded, image shards elsewhere."""
        written: dict[str, Any] | None = None
        while True:
            manifest = self._describe_all()
            if manifest == written:
                return manifest
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / MANIFEST_NAME, manifest)
            written = manifest

    def _describe_all(self) -> dict[str, Any]:
        base = self.source_manifest.resolve().parent
        splits = {}
        for split, sources in self.sources.items():
            shards = [self.find(source) or self._image_entry(source, base) for source in sources]
            splits[split] = {"num_samples": self.datasets[split].num_samples, "shards": shards}
        kept = {key: value for key, value in self._manifest.items() if key not in ("request", "splits")}
        return {
            **kept,
            "request": {"source": "encode", "manifest": _relative(self.source_manifest, self.out)},
            "latents": self.cache.to_dict(),
            "splits": splits,
        }

    def _image_entry(self, source: Source, base: Path) -> dict[str, Any]:
        """A shard of the source as the cache's manifest lists it."""
        places = {name: _relative(base / source.entry[name], self.out) for name in ("file", "index")}
        return {**source.entry, **places}


def _describe(cache: LatentCache) -> str:
    """A cache in a few words that differ where caches do."""
    transform, text = cache.transform, cache.text
    contexts = f"contexts of {text.model} {text.weights_sha256[:12]}, {text.layer} layer" if text else "no contexts"
    return (
        f"artifact {cache.artifact_sha256[:12]} at {transform.resolution} px into {transform.dtype} "
        f"(transform {transform.sha256[:12]}: {transform.random_crops} crops from {transform.crop_scale_min:g}, "
        f"{'with' if transform.horizontal_flip else 'no'} flips, {transform.precision}), {contexts}"
    )


def _relative(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path.resolve(), base.resolve())).as_posix()


def sha256_of(path: Path) -> str:
    """Checksum of a file.

    Raises: DataError if it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
