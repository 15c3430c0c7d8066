"""Whether a checkpoint may be continued under a configuration, which may have been changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_scale.errors import CheckpointError, ConfigError

# What decides which images a step sees, and so what `cur_images` means; and what the network's input and output mean.
FIXED_KEYS = (
    "train.seed",
    "train.global_batch",
    "data.resolution",
    "data.split",
    "data.lanes",
    "data.chunk_samples",
    "data.block_chunks",
    "diffusion.prediction",
    "diffusion.num_timesteps",
    "diffusion.schedule",
    "diffusion.beta_start",
    "diffusion.beta_end",
    "diffusion.zero_terminal_snr",
    "diffusion.sigma_data",
)
# Of conditioning all else is fixed: another tokenizer or layer gives the same shapes another meaning. These are files,
# which may move, and what training draws at random.
FREE_CONDITIONING_KEYS = frozenset({"weights", "vocabulary", "drop_probability", "degradation", "masks"})


def require_same_run(path: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Returns if the checkpoint's run is the one that is configured; both configurations as plain values.

    Raises: ConfigError naming the keys that differ.
    """
    before, now = _fixed(saved), _fixed(given)
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


def require_same_artifact(path: Path, saved: str, given: str, artifact: str | None) -> None:
    """Returns if the checkpoint's latents are those of the artifact; both by their content's hashes.

    Raises: CheckpointError naming both.
    """
    if saved != given:
        raise CheckpointError(
            f"{path} was trained on the autoencoder {saved[:12]}, artifact={artifact} is {given[:12]}: the "
            "latents of one mean nothing to the other; put the old artifact back, or give another run_dir"
        )


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
