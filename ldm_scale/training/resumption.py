"""Whether a checkpoint may be continued under a configuration, which may have been changed since; what it owes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_scale.config.origin import FILE_KEYS, PROCESS_KEYS, TRAINING_KEYS
from ldm_scale.config.schema import Config, TrainConfig
from ldm_scale.engine import collectives
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.telemetry.side_files import read_record
from ldm_scale.telemetry.tensorboard import read_metrics
from ldm_scale.training.best import has_ended
from ldm_scale.training.state import TrainingState

# What decides which images a step sees, and so what `cur_images` means; and what the network's input and output mean.
FIXED_KEYS = (
    "train.seed",
    "train.global_batch",
    "data.resolution",
    "data.split",
    "data.lanes",
    "data.chunk_samples",
    "data.block_chunks",
    *(f"diffusion.{key}" for key in PROCESS_KEYS),
)
# Of conditioning all else is fixed: another tokenizer or layer gives the same shapes another meaning. These are files,
# which may move, and what training draws at random.
FREE_CONDITIONING_KEYS = FILE_KEYS | TRAINING_KEYS


def require_same_run(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Returns if the checkpoint's run is the one that is configured; both configurations as plain values.

    Raises: ConfigError naming the keys that differ.
    """
    before, now = _fixed(saved), _fixed(given)
    network = "autoencoder" if saved["stage"] == "autoencoder" else "unet"  # keys that no shape tells, such as heads
    for key in saved[network].keys() & given[network].keys() - TRAINING_KEYS:
        before[f"{network}.{key}"], now[f"{network}.{key}"] = saved[network][key], given[network][key]
    differences = [
        f"{key}: {before.get(key)} saved, {now.get(key)} given"
        for key in sorted(before | now)
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise ConfigError(
            f"the run in {path.parent.parent} was started with other settings ({'; '.join(differences)}); set them "
            "as before, or give another run_dir"
        )


def require_not_beyond_end(seen: int, train: TrainConfig, run_dir: Path) -> None:
    """Returns if a run that has seen so many images would not have ended before: its last step may exceed the total.

    Raises: ConfigError.
    """
    if seen - train.global_batch >= train.total_images:
        raise ConfigError(
            f"train.total_images={train.total_images}: the run in {run_dir} has seen {seen} images already, and its "
            f"weights are those of all of them; set train.total_images to {seen} or more, or choose another run_dir"
        )


def require_same_artifact(path: Path, saved: str, given: str, artifact: str | None) -> None:
    """Returns if the checkpoint's latents are those of the artifact; both by their content's hashes.

    Raises: CheckpointError naming both.
    """
    if saved != given:
        raise CheckpointError(
            f"{path} was trained on the autoencoder {saved[:12]}, artifact={artifact} is {given[:12]}: the "
            "latents of one mean nothing to the other; put the old artifact back, or give another run_dir"
        )


def require_same_data(saved: str, given: str, config: Config) -> None:
    """Returns if the run's position means the same in these shards; both by their digests.

    Raises: ConfigError naming the manifest.
    """
    if saved != given:
        raise ConfigError(
            f"the run in {config.run_dir} was started on other shards than data.manifest={config.data.manifest} "
            f"(split {config.data.split}) lists, so its position means nothing there; give the manifest of "
            "before, or another run_dir"
        )


def was_finished(result: Path, state: TrainingState, train: TrainConfig, is_main: bool) -> bool:
    """Whether the product of these images exists already.

    Making it again could change the last digit of the latent statistics (other ranks sum in another order) and so
    the artifact's hash, on which the runs of stage 2 insist. Collective: all ranks.
    """
    finished = False
    if is_main and has_ended(state, train):
        finished = read_record(result, lambda written: written["images"] == state.cur_images) is True
    return bool(collectives.broadcast_object(finished))


def owes_evaluation(state: TrainingState, config: Config, is_main: bool) -> bool:
    """Whether the run was stopped before what may fall due of validation and pictures was made, and has not been since.

    A stop is in a hurry, and saves first of all. That it was made up for, by an attempt which then was killed, only the
    figures tell; but not what was the best by then, for which they are made once more.
    Collective: all ranks.
    """
    if state.evaluated_images == state.cur_images:
        return False
    if config.train.best_metric is not None:
        return True
    return not has_figures(config, state.cur_images, "validation/", is_main)


def has_figures(config: Config, images: int, prefix: str, is_main: bool) -> bool:
    """Whether metrics.jsonl has figures of this step whose names begin so. Collective: all ranks."""
    rows = read_metrics(Path(config.run_dir)) if is_main else []
    names = (name for row in rows if row.get("images") == images for name in row)
    return bool(collectives.broadcast_object(any(name.startswith(prefix) for name in names)))


def _fixed(config: dict[str, Any]) -> dict[str, Any]:
    """What a run keeps to its end: key -> value."""
    values = {}
    for key in FIXED_KEYS:
        section, _, name = key.partition(".")
        values[key] = config[section].get(name)
    for kind, section in config["conditioning"].items():
        free = FREE_CONDITIONING_KEYS
        values |= {f"conditioning.{kind}.{key}": value for key, value in (section or {}).items() if key not in free}
    return values
