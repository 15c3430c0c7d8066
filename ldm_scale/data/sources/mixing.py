"""`prepare mix`: several data sets drawn in fixed shares, as a manifest that names theirs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm_scale.data.indexing import write_json
from ldm_scale.data.manifest import FORMAT, VERSION, manifest_path, read_manifest, read_mixture
from ldm_scale.data.sources import Prepared
from ldm_scale.errors import DataError


def mix_manifests(weighted: Sequence[tuple[Path, float]], out: Path) -> Prepared:
    """The manifest at `out` that mixes these, with weights that sum to 1.

    Raises: DataError if one cannot be opened, a weight is not positive, or their classes or kinds do not go together.
    """
    if out.is_dir():
        raise DataError(f"--out {out}: a folder; name the manifest, such as {out / 'mixture.json'}")
    base = out.resolve().parent
    base.mkdir(parents=True, exist_ok=True)  # first, for the paths from there to be looked up
    total = sum(weight for _, weight in weighted)
    entries, splits = list[dict[str, Any]](), set[str]()
    for path, weight in weighted:
        own = manifest_path(path)
        if not 0.0 < weight < float("inf"):
            raise DataError(f"{path}={weight:g}: weights must be positive")
        if own.resolve() == out.resolve():
            raise DataError(f"--out {out}: one of the manifests to mix; choose another place")
        place = Path(os.path.relpath(own.resolve(), base)).as_posix()
        if any(entry["manifest"] == place for entry in entries):
            raise DataError(f"{path}: named twice; give it once, with the sum of its weights")
        content = read_manifest(own)
        if "splits" not in content:
            raise DataError(f"{own}: a mixture itself; list its data sets")
        splits |= set(content["splits"])
        entries.append({"manifest": place, "weight": weight / total})
    for split in sorted(splits):
        read_mixture(out, split, entries)
    manifest = {"format": FORMAT, "version": VERSION, "mixture": entries}
    existing = read_manifest(out) if out.exists() else None
    if existing is not None and existing != manifest:
        raise DataError(f"{out}: another manifest, so it stays as it is; choose another --out or remove it")
    if existing is None:
        write_json(out, manifest)
    return Prepared(out, manifest, reused=existing is not None)
