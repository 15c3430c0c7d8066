"""Checkpoints of our own: weights, Adam's moments, averages and the training state, as folders of `rank_files`.

Kinds of tensors: weight, exp_avg, exp_avg_sq, an average's name ("ema", "ema=0.05"), all fp32 and sharded as ZeRO
shards them; and buffer, which rank 0 writes: what is the same on all ranks and no optimizer steps. On loading, each
rank takes from the files the elements that its fragments cover: any ranks and any stage continue any other's run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale import faults
from ldm_scale.engine.background_save import BackgroundSave, HostMemory
from ldm_scale.engine.ema import EMA, ShardedEma
from ldm_scale.engine.folder_write import remove_folder, write_folder
from ldm_scale.engine.rank_files import Piece, Reader, complete_folders, images_of, read_manifest
from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.engine.zero import Fragment, ShardedModel
from ldm_scale.errors import CheckpointError
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.side_files import side_write

WEIGHT, BUFFER = "weight", "buffer"
PROGRESS = "progress.json"  # of a run: that it had checkpoints, so that losing them all does not pass for a beginning


Spares = Sequence[Callable[[int], bool]]  # of checkpoints by their images; the newest of each stays


@dataclass
class Trained:
    """A model with what is saved beside its weights."""

    model: ShardedModel
    ema: ShardedEma | None = None
    buffers: dict[str, Tensor] = field(default_factory=dict)  # equal on all ranks: running averages, usage counts

    def write_rows(self, name: str, rows: Tensor, values: Tensor, restart: bool) -> None:
        """Nothing; those rows of a parameter get new values.

        With `restart` they begin anew: the averages take the values too, and Adam forgets what led to the old ones.
        Shapes: the parameter (K, D), rows (n,) int64, values (n, D), equal on all ranks. Collective: all ranks.
        """
        for index, fragment in enumerate(self.model.fragments):
            if fragment.name != name:
                continue
            places, new = fragment.elements_of_rows(rows, values)
            fragment.master[places] = new
            if restart:
                for _, average in self.averages(index):
                    average[places] = new
                for moment in self.model.moments(fragment).values():
                    moment[places] = 0.0
        self.model.publish_rows(name, rows, values)

    def averages(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the averages of a fragment, by its place in the model's list."""
        if self.ema is not None:
            for name, values in self.ema.averages.items():
                yield name, values[index]

    def tensors(self) -> Iterator[tuple[Fragment, str, Tensor]]:
        """Every saved tensor of this rank: its fragment, its kind, a view of its values."""
        for index, fragment in enumerate(self.model.fragments):
            yield fragment, WEIGHT, fragment.master
            for key, value in self.model.moments(fragment).items():
                yield fragment, key, value
            for name, value in self.averages(index):
                yield fragment, name, value

    def pieces(self, name: str) -> Iterator[Piece]:
        """What this rank writes of `tensors`, as pieces of the model `name`.

        Stage 0 has all values on all ranks: each rank writes its share of the parameters.
        """
        environment = self.model.environment
        ranks = environment.world_size if self.model.stage == 0 else 1
        names = sorted({fragment.name for fragment in self.model.fragments})
        mine = {n for index, n in enumerate(names) if ranks == 1 or index % ranks == environment.rank}
        for fragment, kind, values in self.tensors():
            if fragment.name in mine:
                yield Piece(name, kind, fragment.name, fragment.shape, fragment.offset, values)


def save_checkpoint(
    root: Path,
    images: int,
    trained: Mapping[str, Trained],
    state: dict[str, Any],
    config: dict[str, Any],
    keep: int | None,
    spares: Spares = (),
) -> Path:
    """Folder of the written checkpoint; older ones beyond the newest `keep` are removed afterwards.

    With None it is not read back, and so none is removed: where there is no time, and the next start looks at it.
    Of each of `spares` the newest stays besides.

    Raises: CheckpointError on all ranks if any rank could not write; nothing half-written stays.
    Collective: all ranks.
    """
    rank = _rank(trained)
    values = _pieces(trained, rank), _content(trained, state, config)
    return write_folder(
        root,
        images,
        rank,
        *values,
        after=lambda: retire_older(root, images, rank, keep, spares),
        read_back=keep is not None,
    )


def start_save(
    root: Path,
    images: int,
    trained: Mapping[str, Trained],
    state: dict[str, Any],
    config: dict[str, Any],
    keep: int,
    memory: HostMemory,
    spares: Spares = (),
) -> BackgroundSave:
    """A save of what the tensors hold now, by threads, from copies in `memory`; it ends as `save_checkpoint` does.

    Raises: CheckpointError on all ranks if the folder cannot be made.
    Collective: all ranks.
    """
    rank = _rank(trained)
    values = _pieces(trained, rank), _content(trained, state, config)
    return BackgroundSave(
        root, images, rank, *values, after=lambda: retire_older(root, images, rank, keep, spares), memory=memory
    )


def latest_checkpoint(root: Path) -> Path | None:
    """Newest complete checkpoint below root, None if there is none."""
    complete = complete_folders(root)
    return complete[-1] if complete else None


def load_checkpoint(checkpoint: Path, trained: Mapping[str, Trained], verified: bool = False) -> dict[str, Any]:
    """The saved training state; weights, moments and averages are copied into this rank's fragments.

    `verified` says that all files were looked at just now (`verification`): they are not once more.

    An exponential average that the checkpoint lacks starts from its weights: it forgets them again.
    Raises: CheckpointError if a tensor or a profile is missing, has another shape, or a file's checksum is wrong.
    Collective: all ranks.
    """
    manifest = read_manifest(checkpoint)
    reader = Reader(checkpoint, manifest, verified)
    with torch.no_grad():
        for name, item in trained.items():
            _require_same_parameters(checkpoint, manifest, name, item.model)
            _require_profiles(checkpoint, manifest, name, item)
            for fragment, kind, values in item.tensors():
                saved = WEIGHT if kind == EMA and not reader.has(name, EMA, fragment.name) else kind
                reader.read(name, saved, fragment.name, fragment.offset, values)
            for key, buffer in item.buffers.items():
                if not reader.has(name, BUFFER, key):
                    raise CheckpointError(
                        f"{checkpoint} does not hold {key} of the {name}: an earlier version wrote it, or another "
                        "configuration; continue with that one, or choose another run_dir"
                    )
                buffer.copy_(reader.whole(name, BUFFER, key))
            item.model.set_optimizer_steps(manifest["models"][name]["optimizer_steps"])
            item.model.publish_masters()
    return manifest["state"]  # type: ignore[no-any-return]


def write_weights(model: ShardedModel, weights: Mapping[str, Tensor], absent: Collection[str] = ()) -> None:
    """Nothing; the model has these weights, its optimizer is as new. `absent` may be missing: they stay as they are.

    Into the masters: through the weights that compute, bfloat16 would round them. A tensor is read at a time.
    Collective: all ranks.
    """
    missing = model.parameter_shapes.keys() - weights.keys()
    assert missing <= set(absent), f"no weights for {sorted(missing)}"
    with torch.no_grad():
        for fragment in model.fragments:
            if fragment.name in missing:
                continue
            whole = weights[fragment.name]
            assert tuple(whole.shape) == fragment.shape, f"{fragment.name}: {tuple(whole.shape)}, not {fragment.shape}"
            fragment.master.copy_(whole.flatten()[fragment.offset : fragment.offset + fragment.length])
        model.publish_masters()


def _rank(trained: Mapping[str, Trained]) -> int:
    return next(iter(trained.values())).model.environment.rank


def _content(trained: Mapping[str, Trained], state: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    models = {
        name: {"optimizer_steps": item.model.optimizer_steps, "zero_stage": item.model.stage}
        for name, item in trained.items()
    }
    return {"models": models, "state": state, "config": config}


def retire_older(root: Path, images: int, rank: int, keep: int | None, spares: Spares = ()) -> None:
    """Nothing; the run's record knows of the checkpoint, and those before it beyond `keep` are gone (None: all stay).

    Only now: each rank has read the new one back from the disk. What is newer than it is not of this run's making.
    """
    faults.reach("save.retain")
    if rank > 0:
        return
    with side_write(root.parent / PROGRESS):
        replace_file(root.parent / PROGRESS, json.dumps({"images": images}) + "\n")
    if keep is not None:
        remove_older(root, images, keep, spares)


def remove_older(root: Path, images: int, keep: int, spares: Spares) -> None:
    """Nothing; of the checkpoints up to `images`, which was read whole, the newest `keep` and of `spares` stay."""
    folders = [folder for folder in complete_folders(root) if images_of(folder) <= images]
    spared = [folder for spare in spares for folder in [f for f in folders if spare(images_of(f))][-1:]]
    for folder in folders[: max(0, len(folders) - max(keep, 1))]:
        if folder not in spared:
            remove_folder(folder)


def _pieces(trained: Mapping[str, Trained], rank: int) -> Iterator[Piece]:
    for name, item in trained.items():
        yield from item.pieces(name)
        for key, buffer in item.buffers.items() if rank == 0 else ():
            yield Piece(name, BUFFER, key, tuple(buffer.shape), 0, buffer.detach().float().flatten())


def _require_profiles(checkpoint: Path, manifest: dict[str, Any], name: str, item: Trained) -> None:
    """Nothing, if the checkpoint holds the averages that cannot begin later."""
    saved = manifest["models"][name]["tensors"]
    missing = [average for average in (item.ema.names if item.ema else ()) if average not in saved]
    if EMA in missing:
        get_logger(item.model.environment.rank).info(
            f"{checkpoint} has no exponential average of the {name}: it starts from the weights there"
        )
        missing.remove(EMA)
    if missing:
        held = [kind.partition("=")[2] for kind in saved if kind.startswith(f"{EMA}=")]
        raise CheckpointError(
            f"{checkpoint} has no average {missing[0]} of the {name}, and a power-function profile weighs the whole "
            f"run: it cannot begin at {manifest['images']} images; set ema.power_stds=[{','.join(held)}] and "
            "reconstruct others afterwards, or choose another run_dir"
        )


def _require_same_parameters(checkpoint: Path, manifest: dict[str, Any], name: str, model: ShardedModel) -> None:
    if name not in manifest["models"]:
        raise CheckpointError(f"{checkpoint} holds {', '.join(manifest['models'])}, not {name}: it is of another stage")
    saved = Reader(checkpoint, manifest).shapes(name, WEIGHT)
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
