"""The artifact in, or made from, whatever this program or another has left of a trained model on disk.

    artifact | diffusion artifact | diffusers folder | CompVis export | run | checkpoint

A run folder stands for its newest checkpoint, except that a finished stage-1 run stands for its artifact, whose latent
statistics the checkpoint does not hold.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ldm_scale.config.convert import config_from_dict, config_to_dict
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.ema import canonical_name
from ldm_scale.engine.rank_files import MANIFEST, complete_folders, read_manifest
from ldm_scale.engine.weights import BEST, default_weights, read_full_tensors
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import (
    AUTOENCODER_FORMAT,
    DESCRIPTION,
    DIFFUSION_FORMAT,
    Artifact,
    DiffusionArtifact,
    artifact_format,
    make_artifact,
    make_diffusion_artifact,
    read_artifact,
    read_diffusion_artifact,
)
from ldm_scale.interchange.safetensors_io import read_json
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.telemetry.log import get_logger

FOREIGN_FILES = ("model_index.json", "config.json")  # of a pipeline and of a single model of diffusers
Weights = str  # raw, ema, or ema=STD: the power-function profile of that relative standard deviation


def read_source(path: Path, weights: Weights | None = None, option: str = "--weights ") -> Artifact | DiffusionArtifact:
    """The artifact in, or made from, an artifact, an export, a run folder or a checkpoint.

    `weights` as in `load.load_autoencoder`. A run's best.json stands for the checkpoint that it names. `option` is what
    an error calls the choice of weights.

    Raises: CheckpointError if the folder is none of these, or incomplete; ConfigError if it has other weights alone.
    """
    if weights is None:
        return _read_folder(path, None)
    weights = canonical_name(weights)
    artifact = _read_folder(path, weights)
    held = artifact.provenance.get("weights")
    if held != weights:
        raise ConfigError(
            f"{option}{weights}: {path} holds {held or 'unnamed'} weights alone; leave it out, or give a checkpoint, "
            "which has several"
        )
    return artifact


def _read_folder(path: Path, weights: Weights | None) -> Artifact | DiffusionArtifact:
    if path.name == BEST and path.is_file():
        return _read_checkpoint(_best_checkpoint(path), weights)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder: give an artifact, an export, a run folder or a checkpoint")
    found = artifact_format(path)
    if found == AUTOENCODER_FORMAT:
        return read_artifact(path)
    if found == DIFFUSION_FORMAT:
        return read_diffusion_artifact(path)
    if (path / DESCRIPTION).is_file():
        if read_json(path / DESCRIPTION).get("layout") == "compvis":
            from ldm_scale.interchange.compvis_folder import read_compvis_folder

            return read_compvis_folder(path)
        require_diffusers()
        # diffusers takes seconds to import, and only its own folders need it.
        from ldm_scale.interchange.diffusers import read_diffusers

        return read_diffusers(path)
    if (path / MANIFEST).is_file():
        return _read_checkpoint(path, weights)
    if any((path / name).is_file() for name in FOREIGN_FILES):
        require_diffusers()
        from ldm_scale.interchange.diffusers_import import read_foreign_diffusers

        get_logger().info(f"reading {path}, a folder in diffusers' layout that another program wrote")
        return read_foreign_diffusers(path)
    return _read_run(path, weights)


def require_diffusers() -> None:
    """Nothing, if the libraries behind the diffusers format are installed.

    Raises: ConfigError that says how to install them.
    """
    absent = [name for name in ("diffusers", "transformers") if find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"the diffusers format needs {' and '.join(absent)}, which this environment lacks: "
            "pip install 'ldm-scale[interchange]'"
        )


def _read_run(run_dir: Path, weights: Weights | None) -> Artifact | DiffusionArtifact:
    artifact = run_dir / "artifact"
    if artifact_format(artifact) == AUTOENCODER_FORMAT:
        get_logger().info(f"reading {artifact}: the run is finished, its artifact has the weights it ended with")
        return read_artifact(artifact)
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            f"{run_dir} holds no artifact, export or complete checkpoint: give the run_dir of a run that has saved one"
        )
    return _read_checkpoint(checkpoint, weights)


def _best_checkpoint(path: Path) -> Path:
    """The checkpoint that a run's best.json names."""
    named = read_json(path).get("checkpoint")
    checkpoint = path.parent / str(named)
    if not isinstance(named, str) or not (checkpoint / MANIFEST).is_file():
        others = ", ".join(folder.name for folder in complete_folders(path.parent / "checkpoints")) or "none"
        raise CheckpointError(
            f"{path} names the checkpoint {named}, which is not there (there: {others}): put it back, or give the run "
            "or another checkpoint"
        )
    return checkpoint


def _read_checkpoint(checkpoint: Path, weights: Weights | None) -> Artifact | DiffusionArtifact:
    manifest = read_manifest(checkpoint)
    config = config_from_dict(manifest["config"])
    if config.stage == "classifier":
        raise CheckpointError(
            f"{checkpoint} holds a classifier of latents, which guides the sampling of a diffusion model: give that "
            "model, and this run with `ldm-scale sample --classifier`"
        )
    model = "autoencoder" if config.stage == "autoencoder" else "diffusion"
    if weights is None:
        weights = default_weights(manifest, model)
    get_logger().info(f"reading the {weights} weights of {checkpoint}")
    provenance = {
        "images": manifest["images"],
        "weights": weights,
        "resolution": config.data.resolution,
        "config": config_to_dict(config),
        "labels": manifest["state"].get("labels", {}),
    }
    if manifest["state"].get("init"):
        provenance["init"] = manifest["state"]["init"]
    if config.stage == "autoencoder":
        get_logger().warning(
            f"{checkpoint} has no latent statistics (they are measured when stage 1 ends): its latents are raw latents"
        )
        state = read_full_tensors(checkpoint, model, weights)
        return make_artifact(state, config.autoencoder, LatentStatistics(), provenance)
    if not Path(config.artifact).is_dir():
        raise CheckpointError(
            f"{checkpoint} was trained on the autoencoder artifact={config.artifact}, which is not there: put the "
            "folder back, or start from the directory that the path is relative to"
        )
    autoencoder = read_artifact(Path(config.artifact))
    saved_hash = manifest["state"].get("autoencoder_hash", "")
    if saved_hash != autoencoder.content_hash:
        raise CheckpointError(
            f"{checkpoint} was trained on the autoencoder {saved_hash[:12] or 'of an unknown hash'}, "
            f"artifact={config.artifact} is {autoencoder.content_hash[:12]}: the latents of one mean nothing to the "
            "other; put the old artifact back"
        )
    return make_diffusion_artifact(
        read_full_tensors(checkpoint, model, weights),
        autoencoder,
        unet=config.unet,
        conditioning=config.conditioning,
        diffusion=config.diffusion,
        sampling=config.sampling,
        provenance=provenance,
    )
