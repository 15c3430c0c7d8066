"""Weights that a run begins with in place of random ones (`init`): where they lie, and what they are weights of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm_scale.config.convert import config_from_dict
from ldm_scale.config.schema import Config
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.rank_files import DamagedError, complete_folders, read_manifest
from ldm_scale.engine.weights import BEST
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import (
    AUTOENCODER_FOLDER,
    AUTOENCODER_FORMAT,
    DIFFUSION_FORMAT,
    Artifact,
    DiffusionArtifact,
    artifact_format,
)
from ldm_scale.interchange.sources import read_source


def has_begun(config: Config) -> bool:
    """Whether the run has a checkpoint of its own, from which it goes on whatever `init` says."""
    return latest_checkpoint(_checkpoints(config)) is not None


def own_beginning(config: Config) -> str:
    """What the run that has begun did begin with: the path that `init` was, or "random weights"."""
    manifest = _own_manifest(config) or {}
    path = manifest.get("state", {}).get("init", {}).get("path")
    return "random weights" if path is None else str(path)


def networks_of_origin(config: Config) -> Config:
    """A configuration whose networks, process, sampling and artifact are those that the run begins or goes on with.

    Of its own newest checkpoint, where it has one: the weights of its beginning may be gone by then.
    Raises: as `read_initial`.
    """
    manifest = _own_manifest(config)
    if manifest is not None:
        return config_from_dict(manifest["config"])
    return source_config(config, read_initial(config))


def read_initial(config: Config) -> Artifact | DiffusionArtifact:
    """What `init` names, of the kind that the stage trains; its tensors are read when they are asked for.

    Raises: CheckpointError or ConfigError, which name init, if there is none, it is incomplete or of another stage.
    """
    path = Path(config.init)
    if path.is_file() and path.name != BEST:
        raise CheckpointError(
            f"init={config.init} is a file; make an artifact of it with `ldm-scale import {config.init} --out DIR`, "
            "and give init=DIR"
        )
    try:
        source = read_source(path, config.init_weights, option="init_weights=")
    except (CheckpointError, ConfigError) as error:
        kind = ConfigError if isinstance(error, ConfigError) else CheckpointError
        raise kind(f"init={config.init}: {error}") from error
    if isinstance(source, Artifact) and config.stage == "diffusion":
        raise ConfigError(
            f"init={config.init} holds an autoencoder, stage=diffusion trains a diffusion model; give the autoencoder "
            f"as artifact={config.init}, or init=FOLDER of a diffusion model"
        )
    if isinstance(source, DiffusionArtifact) and config.stage == "autoencoder":
        inside = path / AUTOENCODER_FOLDER
        autoencoder = f"init={inside}" if inside.is_dir() else "init=FOLDER of its autoencoder"
        raise ConfigError(
            f"init={config.init} holds a diffusion model, stage=autoencoder trains an autoencoder; set stage=diffusion "
            f"to train the model on, or {autoencoder} to train its autoencoder"
        )
    return source


def source_config(config: Config, source: Artifact | DiffusionArtifact) -> Config:
    """The networks of what `init` names, as a configuration."""
    if isinstance(source, Artifact):
        return Config(stage="autoencoder", autoencoder=source.config)
    return Config(
        stage="diffusion",
        artifact=_artifact_of(Path(config.init), source),
        autoencoder=source.autoencoder.config,
        unet=source.unet,
        conditioning=source.conditioning,
        diffusion=source.diffusion,
        sampling=source.sampling,
    )


def require_same_latents(config: Config, source: DiffusionArtifact, artifact: Artifact) -> None:
    """Returns if latents of `artifact` are those that `source` was trained on: same weights, statistics, architecture.

    Not the same content hash: provenance and the float16 probe change no latent.
    Raises: ConfigError that names both.
    """
    own = source.autoencoder
    differences = [name for name, a, b in _latents(own, artifact) if a != b]
    if differences:
        raise ConfigError(
            f"artifact={config.artifact} is the autoencoder {artifact.content_hash[:12]}, init={config.init} was "
            f"trained on {own.content_hash[:12]} (other {' and '.join(differences)}): the latents of one mean nothing "
            "to the other; give that one"
        )


def describe_initial(config: Config, source: Artifact | DiffusionArtifact) -> dict[str, Any]:
    """Where a run's first weights come from, as it records it: path, weights, content hash and images seen there."""
    return {
        "path": config.init,
        "weights": source.provenance.get("weights"),
        "content_sha256": source.content_hash,
        "images": source.provenance.get("images"),
    }


def _artifact_of(path: Path, source: DiffusionArtifact) -> str:
    """Folder of the autoencoder artifact that belongs to a diffusion model; "" where none lies on the disk.

    In the layouts of other programs the autoencoder is no artifact. Whether what is found is the right one, the start
    looks at (`require_same_latents`).
    """
    if artifact_format(path) == DIFFUSION_FORMAT:
        return str(path / AUTOENCODER_FOLDER)
    trained = source.provenance.get("config")  # ours, in checkpoints and in what was exported of them
    found = trained.get("artifact") if isinstance(trained, dict) else None
    return found if isinstance(found, str) and artifact_format(Path(found)) == AUTOENCODER_FORMAT else ""


def _latents(first: Artifact, second: Artifact) -> list[tuple[str, Any, Any]]:
    """What latents depend on, side by side."""

    def of(artifact: Artifact) -> dict[str, Any]:
        statistics = artifact.statistics
        return {
            "weights": artifact.content["weights_sha256"],
            "architecture": artifact.config,
            "latent statistics": (
                statistics.shift,
                statistics.scale,
                statistics.channel_mean,
                statistics.channel_std,
            ),
        }

    a, b = of(first), of(second)
    return [(name, a[name], b[name]) for name in a]


def _own_manifest(config: Config) -> dict[str, Any] | None:
    """Of the run's newest checkpoint whose manifest is whole; the start looks at all of them and says what is wrong."""
    if not config.run_dir:
        return None
    for folder in reversed(complete_folders(_checkpoints(config))):
        try:
            return read_manifest(folder)
        except DamagedError:
            continue
    return None


def _checkpoints(config: Config) -> Path:
    return Path(config.run_dir) / "checkpoints"
