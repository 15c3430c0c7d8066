"""Checkpoints of our own: one safetensors file per rank and a manifest that says where every element lies.

    checkpoints/images-0000012800/
        rank-00000.safetensors    keys "<model>/<kind>/<parameter>": this rank's elements, flat, fp32; rank 0's also
                                  "<model>/buffer/<name>": what is the same on all ranks and no optimizer steps
        manifest.json             for every tensor its shape and pieces (file, offset, length); sizes and CRC-32 of the
                                  files; the training state; the configuration; the CRC-32 of all this

Pieces are keyed by parameter name and offset, so any number of ranks and any ZeRO stage can read what any other wrote:
each rank takes from the files the elements that its own fragments cover. The folder is written under a temporary name
and renamed when it is complete; a folder without a manifest does not count. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_scale.engine import collectives
from ldm_scale.engine.ema import ShardedEma
from ldm_scale.engine.zero import Fragment, ShardedModel
from ldm_scale.errors import CheckpointError

FORMAT = "ldm-scale-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
PREFIX = "images-"
TEMPORARY = ".tmp-"
CHECKSUM = "crc32"  # the manifest's own
WEIGHT, EMA, BUFFER = "weight", "ema", "buffer"


@dataclass
class Trained:
    """A model with what is saved beside its weights."""

    model: ShardedModel
    ema: ShardedEma | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)  # equal on all ranks: running averages, usage counts

    def write_rows(self, name: str, rows: Tensor, values: Tensor, restart: bool) -> None:
        """Nothing; those rows of a parameter get new values.

        With `restart` they begin anew: the average takes the values too, and Adam forgets what led to the old ones.
        Shapes: the parameter (K, D), rows (n,) int64, values (n, D), equal on all ranks. Collective: all ranks.
        """
        for index, fragment in enumerate(self.model.fragments):
            if fragment.name != name:
                continue
            places, new = fragment.elements_of_rows(rows, values)
            fragment.master[places] = new
            if restart:
                if self.ema is not None:
                    self.ema.values[index][places] = new
                for moment in self.model.moments(fragment).values():
                    moment[places] = 0.0
        self.model.publish_rows(name, rows, values)

    def tensors(self) -> Iterator[tuple[Fragment, str, Tensor]]:
        """Every saved tensor of this rank: its fragment, its kind, a view of its values."""
        for index, fragment in enumerate(self.model.fragments):
            yield fragment, WEIGHT, fragment.master
            for key, value in self.model.moments(fragment).items():
                yield fragment, key, value
            if self.ema is not None:
                yield fragment, EMA, self.ema.values[index]


def save_checkpoint(
    root: Path, images: int, trained: Mapping[str, Trained], state: dict[str, Any], config: dict[str, Any], keep: int
) -> Path:
    """Folder of the written checkpoint; older ones beyond the newest `keep` are removed afterwards.

    Raises: CheckpointError on all ranks if any rank could not write; nothing half-written stays.
    Collective: all ranks.
    """
    final = root / f"{PREFIX}{images:010d}"
    temporary = root / f"{TEMPORARY}{final.name}"
    rank = next(iter(trained.values())).model.environment.rank
    prepared = _attempt(lambda: _prepare(root, temporary)) if rank == 0 else {}
    collectives.barrier()
    written = prepared if "error" in prepared else _attempt(lambda: _write_rank_file(temporary, rank, trained))
    reports = collectives.gather_objects(written)
    failures = [f"rank {r}: {report['error']}" for r, report in enumerate(reports) if "error" in report]
    if rank == 0 and not failures:
        published = _attempt(lambda: _publish(temporary, final, reports, trained, state, config, images))
        if "error" in published:
            failures = [f"rank 0: {published['error']}"]
    if rank == 0 and failures:
        shutil.rmtree(temporary, ignore_errors=True)
    failures = collectives.broadcast_object(failures)
    if failures:
        raise CheckpointError(
            f"checkpoint {final} not written ({'; '.join(failures)}); free space or fix the folder's permissions, "
            "earlier checkpoints are untouched"
        )
    if rank == 0:
        _remove_old(root, keep)
    return final


def latest_checkpoint(root: Path) -> Path | None:
    """Newest complete checkpoint below root, None if there is none."""
    complete = sorted(p for p in root.glob(f"{PREFIX}*") if (p / MANIFEST).is_file()) if root.is_dir() else []
    return complete[-1] if complete else None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest, its files' sizes checked.

    Raises: CheckpointError if it is absent, unreadable, of another format, or a file is missing or cut short.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is no checkpoint: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}); take an earlier checkpoint") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else None
    if found != (FORMAT, VERSION):
        raise CheckpointError(f"{path} has format and version {found}; this program reads {(FORMAT, VERSION)}")
    if manifest.pop(CHECKSUM, None) != _json_crc32(manifest):
        raise CheckpointError(f"{path} is damaged: its CRC-32 is not the one it states; take an earlier checkpoint")
    for name, record in manifest["files"].items():
        file = checkpoint / name
        size = file.stat().st_size if file.is_file() else None
        if size != record["bytes"]:
            actual = "is missing" if size is None else f"has {size} bytes"
            raise CheckpointError(
                f"{file} {actual}, the manifest says {record['bytes']}: the checkpoint is cut short; remove the folder "
                f"{checkpoint} to continue from the one before"
            )
    return manifest  # type: ignore[no-any-return]


def load_checkpoint(checkpoint: Path, trained: Mapping[str, Trained]) -> dict[str, Any]:
    """The saved training state; weights, moments and averages are copied into this rank's fragments.

    Raises: CheckpointError if a tensor is missing, has another shape, or a file's checksum is wrong.
    Collective: all ranks.
    """
    manifest = read_manifest(checkpoint)
    reader = _Reader(checkpoint, manifest)
    with torch.no_grad():
        for name, item in trained.items():
            _require_same_parameters(checkpoint, manifest, name, item.model)
            for fragment, kind, values in item.tensors():
                if kind == EMA and not reader.has(name, EMA, fragment.name):
                    values.copy_(reader.read(name, WEIGHT, fragment))
                else:
                    values.copy_(reader.read(name, kind, fragment))
            for key, buffer in item.buffers.items():
                if not reader.has(name, BUFFER, key):
                    raise CheckpointError(
                        f"{checkpoint} does not hold {key} of the {name}: an earlier version wrote it, or another "
                        "configuration; continue with that one, or choose another run_dir"
                    )
                whole = Fragment(key, tuple(buffer.shape), 0, torch.empty(0), 0, buffer.numel())
                buffer.copy_(reader.read(name, BUFFER, whole).view(buffer.shape))
            item.model.set_optimizer_steps(manifest["models"][name]["optimizer_steps"])
            item.model.publish_masters()
    return manifest["state"]  # type: ignore[no-any-return]


def read_full_tensors(checkpoint: Path, model: str, weights: str) -> dict[str, Tensor]:
    """All parameters of a model, put together from the ranks' pieces. weights: "raw" or "ema".

    Raises: CheckpointError if the checkpoint has no such model or no EMA.
    """
    manifest = read_manifest(checkpoint)
    if model not in manifest["models"]:
        raise CheckpointError(f"{checkpoint} holds {', '.join(manifest['models'])}, not {model}")
    kind = {"raw": WEIGHT, "ema": EMA}[weights]
    tensors = manifest["models"][model]["tensors"].get(kind)
    if not tensors:
        raise CheckpointError(
            f"{checkpoint} has no EMA of {model} (the run had ema.half_life_images=0); use raw weights"
        )
    reader = _Reader(checkpoint, manifest)
    full = {}
    for name, record in tensors.items():
        length = int(torch.Size(record["shape"]).numel())
        whole = Fragment(name, tuple(record["shape"]), 0, torch.empty(0), 0, length)
        full[name] = reader.read(model, kind, whole).view(record["shape"])
    return full


class _Reader:
    """Reads elements of tensors out of the pieces that the ranks wrote."""

    def __init__(self, checkpoint: Path, manifest: dict[str, Any]) -> None:
        self._checkpoint, self._manifest = checkpoint, manifest
        self._open: dict[str, Any] = {}

    def has(self, model: str, kind: str, name: str) -> bool:
        """Whether the checkpoint holds that kind of tensor for the parameter."""
        return name in self._manifest["models"][model]["tensors"].get(kind, {})

    def read(self, model: str, kind: str, fragment: Fragment) -> Tensor:
        """Elements fragment.offset to offset + length of a tensor. Shapes: returns (length,)."""
        record = self._manifest["models"][model]["tensors"][kind][fragment.name]
        result = torch.empty(fragment.length)
        begin, end = fragment.offset, fragment.offset + fragment.length
        covered = 0
        for piece in record["pieces"]:
            first, last = max(begin, piece["offset"]), min(end, piece["offset"] + piece["length"])
            if first < last:
                values = self._file(piece["file"]).get_slice(f"{model}/{kind}/{fragment.name}")
                result[first - begin : last - begin] = values[first - piece["offset"] : last - piece["offset"]]
                covered += last - first
        if covered != fragment.length:
            raise CheckpointError(
                f"{self._checkpoint}: {model}/{kind}/{fragment.name} has {covered} of the {fragment.length} elements "
                "asked for; the checkpoint is damaged"
            )
        return result

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._checkpoint / name
            if _crc32(path) != self._manifest["files"][name]["crc32"]:
                raise CheckpointError(
                    f"{path} is damaged: its CRC-32 is not the manifest's; take an earlier checkpoint"
                )
            self._open[name] = safe_open(path, framework="pt")
        return self._open[name]


def _attempt(action: Any) -> dict[str, Any]:
    """The action's report, or its error as text: a rank that cannot write must still meet the others."""
    try:
        return action() or {}
    except (OSError, SafetensorError) as error:  # safetensors hides the system's error in one of its own
        return {"error": str(error)}


def _prepare(root: Path, temporary: Path) -> None:
    """Makes the folder that the ranks write into; removes what saves that were killed have left."""
    for left in root.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(parents=True)


def _write_rank_file(folder: Path, rank: int, trained: Mapping[str, Trained]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    pieces = []
    file = f"rank-{rank:05d}.safetensors"
    for model, item in trained.items():
        # Stage 0 has all values on all ranks: each rank writes its share of the parameters.
        ranks = item.model.environment.world_size if item.model.stage == 0 else 1
        names = sorted({fragment.name for fragment in item.model.fragments})
        mine = {name for index, name in enumerate(names) if ranks == 1 or index % ranks == rank}
        for fragment, kind, values in item.tensors():
            if fragment.name in mine:
                tensors[f"{model}/{kind}/{fragment.name}"] = values.detach().cpu().contiguous()
                pieces.append((model, kind, fragment.name, fragment.shape, fragment.offset, fragment.length))
        for key, buffer in item.buffers.items() if rank == 0 else ():
            tensors[f"{model}/{BUFFER}/{key}"] = buffer.detach().float().cpu().flatten().contiguous()
            pieces.append((model, BUFFER, key, tuple(buffer.shape), 0, buffer.numel()))
    path = folder / file
    save_file(tensors, path)
    _sync(path)
    return {"file": file, "bytes": path.stat().st_size, "crc32": _crc32(path), "pieces": pieces}


def _publish(
    temporary: Path,
    final: Path,
    reports: list[dict[str, Any]],
    trained: Mapping[str, Trained],
    state: dict[str, Any],
    config: dict[str, Any],
    images: int,
) -> None:
    models: dict[str, Any] = {
        name: {"optimizer_steps": item.model.optimizer_steps, "zero_stage": item.model.stage, "tensors": {}}
        for name, item in trained.items()
    }
    for report in reports:
        for model, kind, name, shape, offset, length in report["pieces"]:
            record = (
                models[model]["tensors"].setdefault(kind, {}).setdefault(name, {"shape": list(shape), "pieces": []})
            )
            record["pieces"].append({"file": report["file"], "offset": offset, "length": length})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "images": images,
        "world_size": len(reports),
        "files": {r["file"]: {"bytes": r["bytes"], "crc32": r["crc32"]} for r in reports},
        "models": models,
        "state": state,
        "config": config,
    }
    path = temporary / MANIFEST
    path.write_text(json.dumps(manifest | {CHECKSUM: _json_crc32(manifest)}))
    _sync(path)
    if final.exists():  # the same image count was saved before, by a run that then stopped without progress
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)


def _require_same_parameters(checkpoint: Path, manifest: dict[str, Any], name: str, model: ShardedModel) -> None:
    if name not in manifest["models"]:
        raise CheckpointError(f"{checkpoint} holds {', '.join(manifest['models'])}, not {name}: it is of another stage")
    saved = {key: tuple(r["shape"]) for key, r in manifest["models"][name]["tensors"][WEIGHT].items()}
    expected = model.parameter_shapes
    if saved == expected:
        return
    missing, extra = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    shaped = [
        f"{key}: {saved[key]} saved, {expected[key]} configured"
        for key in sorted(saved.keys() & expected.keys())
        if saved[key] != expected[key]
    ]
    parts = [
        f"missing {', '.join(missing[:5])}" if missing else "",
        f"unknown {', '.join(extra[:5])}" if extra else "",
        "; ".join(shaped[:5]),
    ]
    raise CheckpointError(
        f"{checkpoint} does not fit the configured {name}: {'; '.join(p for p in parts if p)} "
        f"({len(missing) + len(extra) + len(shaped)} differences); continue with the configuration that it was saved "
        "with, or choose another run_dir"
    )


def _remove_old(root: Path, keep: int) -> None:
    complete = sorted(p for p in root.glob(f"{PREFIX}*") if (p / MANIFEST).is_file())
    for old in complete[: -max(keep, 1)]:
        shutil.rmtree(old, ignore_errors=True)


def _json_crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            value = zlib.crc32(chunk, value)
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
