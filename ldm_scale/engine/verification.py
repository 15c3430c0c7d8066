"""Which checkpoint a run continues from, or goes back to: the newest whose every byte is what was written, or an error.

The ranks divide a folder's files among themselves and read all of them before any weight is touched. A damaged folder
is renamed out of the way, for a person to look at, and the one before is taken. A run that had checkpoints and has none
that is whole does not begin from scratch: that is for a person to decide.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ldm_scale.engine import collectives
from ldm_scale.engine.checkpoint import PROGRESS
from ldm_scale.engine.folder_write import restore_replaced
from ldm_scale.engine.rank_files import DamagedError, check_file, files_of_rank, has_own_name, images_of, read_manifest
from ldm_scale.engine.tensor_file import file_crc32
from ldm_scale.errors import CheckpointError
from ldm_scale.telemetry.log import get_logger

DAMAGED = "damaged-"
READ_PAUSES_S = (1.0, 3.0)  # before a file that cannot be read is tried again


class Verified(NamedTuple):
    """A checkpoint whose files were all read and found whole."""

    path: Path
    manifest: dict[str, Any]


def newest_verified(root: Path, rank: int, checksum_of: Callable[[Path], int] = file_crc32) -> Verified | None:
    """The checkpoint to continue from; None if the run has had none yet. `checksum_of` may know some (EarlyChecksums).

    Raises: CheckpointError on all ranks if none is whole though the run had some, or files cannot be read at all.
    Collective: all ranks.
    """
    newest, damaged = newest_whole(root, rank, checksum_of=checksum_of)
    if newest is not None:
        return newest
    had = collectives.broadcast_object(_traces(root) if rank == 0 else None)
    if damaged or had:
        raise CheckpointError(_none_left(root, damaged, had))
    return None


def newest_whole(
    root: Path,
    rank: int,
    counts: Callable[[int], bool] = lambda images: True,
    checksum_of: Callable[[Path], int] = file_crc32,
) -> tuple[Verified | None, list[str]]:
    """The newest whole checkpoint of those whose images count, if any is; and which were damaged: they are set aside.

    Raises: CheckpointError on all ranks if files cannot be read at all.
    Collective: all ranks.
    """
    found = collectives.broadcast_object(_outcome(lambda: _candidates(root)) if rank == 0 else None)
    _require_readable([found])
    damaged: list[str] = []
    for path in found["value"]:
        if not counts(images_of(path)):
            continue
        manifest, damages = _examine(path, rank, checksum_of)
        if not damages:
            return Verified(path, manifest), damaged
        damaged.append(f"{path.name}: {damages[0]}")
        if rank == 0:
            kept = _set_aside(path)
            get_logger(rank).error(f"DAMAGED CHECKPOINT {path}: {'; '.join(damages)}; kept as {kept}, trying others")
    return None, damaged


def _candidates(root: Path) -> list[Path]:
    """Folders that bear a checkpoint's name, newest first, those without a manifest among them."""
    if not root.exists():
        return []
    restore_replaced(root)
    # iterdir and not glob, which takes a folder that it must not list for an empty one.
    return sorted((p for p in root.iterdir() if has_own_name(p) and p.is_dir()), key=images_of, reverse=True)


def _examine(path: Path, rank: int, checksum_of: Callable[[Path], int]) -> tuple[dict[str, Any], list[str]]:
    """The manifest, and what is wrong with the folder. Collective: all ranks."""
    first = collectives.broadcast_object(_outcome(lambda: _read_own_manifest(path)) if rank == 0 else None)
    _require_readable([first])
    if "damage" in first:
        return {}, [first["damage"]]
    manifest: dict[str, Any] = first["value"]

    def check() -> None:
        for name in files_of_rank(manifest, rank, collectives.world_size()):
            check_file(path, manifest, name, checksum_of)

    outcomes = collectives.gather_objects(_outcome(check))
    _require_readable(outcomes)
    return manifest, [outcome["damage"] for outcome in outcomes if "damage" in outcome]


def _read_own_manifest(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    if manifest["images"] != images_of(path):
        raise DamagedError(f"{path} has the manifest of {manifest['images']} images: it was renamed or exchanged")
    if not all(isinstance(manifest.get(name), dict) for name in ("state", "config")):
        raise DamagedError(f"{path} has no state or no config: it is no checkpoint of a run")
    return manifest


def _outcome(action: Callable[[], Any]) -> dict[str, Any]:
    """The action's value, the damage that it found, or the error that keeps it from telling."""
    for pause_s in (*READ_PAUSES_S, None):
        try:
            return {"value": action()}
        except DamagedError as error:
            return {"damage": error.damage}
        except CheckpointError as error:
            return {"error": str(error)}
        except OSError as error:
            if pause_s is not None:
                time.sleep(pause_s)
            elif error.errno in (errno.EIO, errno.ENOENT):  # a bad sector, a file that went between two looks
                return {"damage": str(error)}
            else:
                return {"error": f"{error}: nothing was changed; see to it that all ranks can read the folder"}
    raise AssertionError("the last pause is None")


def _require_readable(outcomes: list[dict[str, Any]]) -> None:
    errors = [f"rank {rank}: {o['error']}" for rank, o in enumerate(outcomes) if "error" in o]
    if errors:
        raise CheckpointError("; ".join(errors))


def _set_aside(path: Path) -> Path:
    """Where the damaged folder is now; where it was, if it cannot be renamed."""
    taken = {p.name for p in path.parent.glob(f"{DAMAGED}*")}
    name = f"{DAMAGED}{path.name}"
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    try:
        return path.rename(path.with_name(next(n for n in names if n not in taken)))
    except OSError:
        return path


def _traces(root: Path) -> list[str]:
    """What tells that the run had checkpoints."""
    kept = sorted(str(p) for p in root.glob(f"{DAMAGED}*")) if root.exists() else []
    record = root.parent / PROGRESS
    return ([str(record)] if record.exists() else []) + kept


def _none_left(root: Path, damaged: list[str], had: list[str]) -> str:
    found = f"all are damaged ({'; '.join(damaged)})" if damaged else "there is none"
    return (
        f"no whole checkpoint is left in {root}: {found}, though the run had some ({', '.join(had)}); put one back "
        "from a copy, or give another run_dir; to begin this one from scratch, remove those"
    )
