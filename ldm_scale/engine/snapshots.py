"""Snapshots of power-function averages while a run trains: run_dir/snapshots, folders of `rank_files`.

All are kept: the longer the run, the more profiles their combinations reach. fp16 halves them; its rounding (2^-12 of a
weight) counts little beside what a step of training moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ldm_scale.config.schema import EmaConfig
from ldm_scale.engine.checkpoint import Trained
from ldm_scale.engine.ema import power_std
from ldm_scale.engine.folder_write import remove_folder, write_folder
from ldm_scale.engine.rank_files import Piece, complete_folders, images_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def snapshot_bytes(ema: EmaConfig, total_images: int, parameters: int) -> int:
    """Size of all snapshots of a run together."""
    count = total_images // ema.snapshot_every_images if ema.snapshot_every_images else 0
    return count * len(ema.power_stds) * parameters * DTYPES[ema.snapshot_dtype].itemsize


def save_snapshot(
    root: Path, images: int, trained: Mapping[str, Trained], ema: EmaConfig, config: dict[str, Any]
) -> Path:
    """Folder of the written snapshot.

    Raises: CheckpointError on all ranks if any rank could not write; nothing half-written stays.
    Collective: all ranks.
    """
    rank = next(iter(trained.values())).model.environment.rank
    averaged = {name: item for name, item in trained.items() if item.ema is not None}
    content: dict[str, Any] = {"models": {name: {} for name in averaged}, "config": config}
    return write_folder(root, images, rank, _pieces(averaged, DTYPES[ema.snapshot_dtype]), content)


def remove_snapshots_beyond(root: Path, images: int) -> int:
    """Number of snapshots removed because they are of more images than the run, continued from there, has seen."""
    later = [folder for folder in complete_folders(root) if images_of(folder) > images]
    for folder in later:
        remove_folder(folder)
    return len(later)


def _pieces(averaged: Mapping[str, Trained], dtype: torch.dtype) -> Iterator[Piece]:
    for name, item in averaged.items():
        averages = item.ema.names if item.ema else ()
        for piece in item.pieces(name):
            if piece.kind not in averages or power_std(piece.kind) is None:
                continue
            yield dataclasses.replace(piece, dtype=dtype)
