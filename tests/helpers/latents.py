"""Latent caches for tests: made by the command, and spoilt by rewriting their tars with the standard library."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ldm_scale.data.indexing import index_shard, index_tar
from ldm_scale.data.sidecar import open_sidecar
from ldm_scale.encode import main as encode_main
from ldm_scale.interchange.artifact import write_artifact
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded
from tests.helpers.runs import AUTOENCODER
from tests.helpers.shards import write_tar

Members = dict[str, bytes]


def encode(folder: Path, *options: str, out: str = "cache", artifact: str = "artifact") -> dict[str, Any]:
    """The command's report on `folder`/data encoded with `folder`/artifact into `folder`/cache."""
    arguments = [str(folder / artifact), str(folder / "data" / "manifest.json"), "--out", str(folder / out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert encode_main([*arguments, "--device", "cpu", "--workers", "0", "--json", *options]) == 0
    return json.loads(printed.getvalue())  # type: ignore[no-any-return]


def other_artifact(directory: Path, **changes: Any) -> Path:
    """An artifact with random weights like `tiny_artifact`'s, of another hash; `changes` are of its architecture."""
    config = dataclasses.replace(AUTOENCODER, **changes)
    network = build_seeded(lambda: build_autoencoder(config), seed=6)
    state = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}
    provenance = {"images": 0, "resolution": 16, "weights": "raw"}
    write_artifact(directory, state, config, LatentStatistics(scale=0.5, num_images=8), provenance=provenance)
    return directory


def read_tar(path: Path) -> dict[str, Members]:
    """Sample name -> members by extension, as the standard library reads them."""
    samples: dict[str, Members] = {}
    with tarfile.open(path) as archive:
        for info in archive:
            name, _, extension = info.name.partition(".")
            stream = archive.extractfile(info)
            assert stream is not None
            samples.setdefault(name, {})[extension] = stream.read()
    return samples


def rewrite(manifest: Path, change: Callable[[dict[str, Members]], None], shard: int = 0, split: str = "train") -> None:
    """Nothing; a latent shard's samples are changed, and its index, its checksums and its manifest fit it again."""
    content = json.loads(manifest.read_text())
    entry = content["splits"][split]["shards"][shard]
    path, sidecar = manifest.parent / entry["file"], manifest.parent / entry["index"]
    samples = read_tar(path)
    change(samples)
    write_tar(path, list(samples.items()))
    provenance = open_sidecar(sidecar).extra["latents"]
    provenance["file"] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    entry |= index_shard(path, sidecar, manifest.parent, index_tar(path), latents=provenance)
    manifest.write_text(json.dumps(content))


def npy(values: np.ndarray) -> bytes:
    """The array as .npy."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def array(content: bytes) -> np.ndarray:
    """The array of a .npy."""
    return np.load(io.BytesIO(content))  # type: ignore[no-any-return]
