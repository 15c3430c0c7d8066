"""Whole weights out of a checkpoint: the trained ones, an average that it holds, or one reconstructed afterwards.

What a checkpoint holds is read a tensor at a time, when it is asked for. Reconstruction needs no GPU: memory for one
set of weights, and each snapshot read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_scale.engine.checkpoint import WEIGHT
from ldm_scale.engine.ema import EMA, RAW, canonical_name, power_name, power_std
from ldm_scale.engine.power_profiles import Profile, fit_profile
from ldm_scale.engine.rank_files import Reader, complete_folders, images_of, read_manifest
from ldm_scale.errors import CheckpointError
from ldm_scale.telemetry.log import get_logger

BEST = "best.json"  # of a run: names the best of its checkpoints
SNAPSHOTS = "snapshots"  # folder of a run, beside its checkpoints
MAX_FIT_ERROR = 0.1  # of the wanted profile's norm


def default_weights(manifest: dict[str, Any], model: str) -> str:
    """Name of the weights that a checkpoint is taken for: its first average, or the raw ones."""
    held = held_weights(manifest, model)
    return held[1] if len(held) > 1 else RAW


def held_weights(manifest: dict[str, Any], model: str) -> list[str]:
    """Names of the weights that a checkpoint holds of a model: "raw", then its averages."""
    kinds = manifest["models"].get(model, {}).get("tensors", {})
    return [RAW, *(kind for kind in kinds if kind.partition("=")[0] == EMA)]


def read_full_tensors(checkpoint: Path, model: str, weights: str) -> Mapping[str, Tensor]:
    """All parameters of a model in fp32. weights: "raw", "ema" or "ema=STD", kept or not.

    What the checkpoint keeps is read when it is asked for, from files that stay open: it may be removed meanwhile.

    Raises: ConfigError if `weights` names none; CheckpointError if the checkpoint has no such model or no such average
    and, of a profile, what the run has kept does not come near to it.
    """
    name, std = canonical_name(weights), power_std(weights)
    manifest = read_manifest(checkpoint)
    if model not in manifest["models"]:
        raise CheckpointError(f"{checkpoint} holds {', '.join(manifest['models'])}, not {model}")
    held = held_weights(manifest, model)
    if name in held:
        kind = WEIGHT if name == RAW else name
        return Reader(checkpoint, manifest, streams=True).later(model, kind)
    if std is None:
        raise CheckpointError(
            f"{checkpoint} has no EMA of {model} (the run had ema.half_life_images=0); use {' or '.join(held)} weights"
        )
    return _reconstruct(checkpoint, manifest, model, std)


class _Kept(NamedTuple):
    """An average of a power-function profile in a file."""

    reader: Reader
    kind: str
    profile: Profile


def _reconstruct(checkpoint: Path, manifest: dict[str, Any], model: str, std: float) -> dict[str, Tensor]:
    images = manifest["images"]
    kept = _kept_in(checkpoint, manifest, model)
    root = checkpoint.parent.parent / SNAPSHOTS
    snapshots = [folder for folder in complete_folders(root) if images_of(folder) < images]
    for folder in snapshots:
        kept += _kept_in(folder, read_manifest(folder), model)
    if not kept:
        raise CheckpointError(
            f"{checkpoint}: {power_name(std)} cannot be reconstructed: the run kept no power-function profile of "
            f"{model} (ema.power_stds=[]); use {' or '.join(held_weights(manifest, model))} weights"
        )
    fit = fit_profile(Profile(std, images), [item.profile for item in kept])
    widths = ", ".join(f"{value:g}" for value in sorted({item.profile.relative_std for item in kept}))
    if not fit.error <= MAX_FIT_ERROR:
        raise CheckpointError(
            f"{checkpoint}: {power_name(std)} cannot be reconstructed from the profiles {widths} there and in "
            f"{len(snapshots)} snapshots in {root}: the best combination misses it by {fit.error:.0%} of its norm "
            f"(allowed {MAX_FIT_ERROR:.0%}); take an STD nearer to theirs, or snapshot more often "
            "(ema.snapshot_every_images)"
        )
    get_logger().info(
        f"{power_name(std)} reconstructed from {len(kept)} averages (profiles {widths}; {len(snapshots)} snapshots), "
        f"which miss the profile by {fit.error:.2%} of its norm"
    )
    shapes = kept[0].reader.shapes(model, kept[0].kind)
    full = {}
    for name, shape in shapes.items():
        total = torch.zeros(shape, dtype=torch.float64)  # coefficients of both signs: sums cancel
        for item, coefficient in zip(kept, fit.coefficients, strict=True):
            total += coefficient * item.reader.whole(model, item.kind, name)
        full[name] = total.float()
    return full


def _kept_in(folder: Path, manifest: dict[str, Any], model: str) -> list[_Kept]:
    reader = Reader(folder, manifest, streams=True)
    kinds = [(kind, power_std(kind)) for kind in held_weights(manifest, model)]
    return [_Kept(reader, kind, Profile(std, manifest["images"])) for kind, std in kinds if std is not None]
