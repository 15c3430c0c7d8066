"""From a model in memory to a folder for others: written beside its place, read back, compared, then renamed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config
from ldm_scale.engine.lazy_tensors import LazyTensors
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import (
    DESCRIPTION,
    Artifact,
    DiffusionArtifact,
    artifact_format,
    fill_artifact_folder,
    make_artifact,
    make_diffusion_artifact,
)
from ldm_scale.interchange.comparison import differences as compared
from ldm_scale.interchange.model_card import Target, model_card
from ldm_scale.interchange.output_folder import published_folder
from ldm_scale.interchange.safetensors_io import read_json, spilled
from ldm_scale.interchange.sources import read_source, require_diffusers
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.telemetry.log import get_logger

CARD = "README.md"


@dataclass(frozen=True)
class Published:
    """What was written."""

    path: Path
    target: Target
    kind: str  # "autoencoder" or "diffusion"
    content_hash: str
    differences: dict[str, float]  # part -> |theirs - ours| / |ours|; empty for our own format


def publish(artifact: Artifact | DiffusionArtifact, target: Target, out: Path, compute: bool = False) -> Published:
    """What `out` holds from now on; an earlier export there is replaced.

    `compute`: an artifact of ours is run, too, as it is read back.
    Raises: ConfigError without the target's libraries; CheckpointError if `out` holds anything else, if the target
    cannot hold the model, or if what was written does not compute the same. `out` is as before then.
    """
    log = get_logger()
    if target == "diffusers":
        require_diffusers()
    with published_folder(out, may_replace=is_export) as folder:
        log.info(f"writing {target} files for {out}")
        if target == "diffusers":
            # diffusers takes seconds to import: only what writes its format waits for it.
            from ldm_scale.interchange.diffusers import fill_diffusers_folder
            from ldm_scale.interchange.verify import measure_differences

            fill_diffusers_folder(folder, artifact)
            log.info("reading them back with diffusers and comparing outputs")
            differences = measure_differences(folder, artifact)
        elif target == "compvis":
            # An importer with many parts, which only its own target needs.
            from ldm_scale.interchange.compvis_folder import measure_compvis
            from ldm_scale.interchange.compvis_write import fill_compvis_folder

            fill_compvis_folder(folder, artifact)
            log.info("reading them back as another program's and comparing outputs")
            differences = measure_compvis(folder, artifact)
        else:
            fill_artifact_folder(folder, artifact)
            log.info("reading them back")
            back = _read_same(folder, artifact)
            differences = compared(back, artifact) if compute else {}
        (folder / CARD).write_text(model_card(artifact, target, differences), encoding="utf-8")
    kind = "autoencoder" if isinstance(artifact, Artifact) else "diffusion"
    return Published(out, target, kind, artifact.content_hash, differences)


def out_of_memory(artifact: Artifact | DiffusionArtifact, folder: Path) -> Artifact | DiffusionArtifact:
    """The same model, its weights in a file in `folder` that ends with it, where they were in memory.

    Averages that nobody kept and untrained models are made there: else verification would hold them twice.
    Raises: OSError that names the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(artifact, DiffusionArtifact):
        artifact = replace(artifact, autoencoder=cast(Artifact, out_of_memory(artifact.autoencoder, folder)))
    if isinstance(artifact.state, LazyTensors):
        return artifact
    return replace(artifact, state=spilled(artifact.state, folder))


def is_export(folder: Path) -> bool:
    """Whether `publish` wrote the folder (and not a training run, whose artifact must not be replaced by mistake)."""
    return (folder / CARD).is_file() and ((folder / DESCRIPTION).is_file() or artifact_format(folder) is not None)


def target_of(folder: Path) -> Target | None:
    """The layout in which `publish` wrote the folder; None if it did not."""
    if not is_export(folder):
        return None
    if artifact_format(folder) is not None:
        return "safetensors"
    return "compvis" if read_json(folder / DESCRIPTION).get("layout") == "compvis" else "diffusers"


def untrained_artifact(config: Config, seed: int) -> Artifact | DiffusionArtifact:
    """The model of `config` as a run with train.seed = `seed` starts with it.

    Its latent statistics are unmeasured; a diffusion model gets an autoencoder that is untrained too.
    """
    provenance = {
        "images": 0,
        "weights": f"untrained, seed {seed}",
        "resolution": config.data.resolution,
        "config": config_to_dict(config),
    }
    state = build_seeded(lambda: build_autoencoder(config.autoencoder), seed).state_dict()
    autoencoder = make_artifact(state, config.autoencoder, LatentStatistics(), provenance)
    if config.stage == "autoencoder":
        return autoencoder
    network = build_seeded(
        lambda: LatentDiffusion(config.unet, config.conditioning, config.autoencoder.latent_channels), seed
    )
    return make_diffusion_artifact(
        network.state_dict(),
        autoencoder,
        unet=config.unet,
        conditioning=config.conditioning,
        diffusion=config.diffusion,
        sampling=config.sampling,
        provenance=provenance,
    )


def _read_same(folder: Path, artifact: Artifact | DiffusionArtifact) -> Artifact | DiffusionArtifact:
    back = read_source(folder)
    if back.content_hash != artifact.content_hash:
        raise CheckpointError(f"{folder} is read back with other content than was written; is the disk sound?")
    return back
