"""From a validated configuration to a finished run: look at the inputs, start the rank, describe the plan, train."""

from __future__ import annotations

from pathlib import Path

from ldm_scale.config.fit import batch_plan, check_artifact_fits
from ldm_scale.config.schema import Config
from ldm_scale.data import open_manifest
from ldm_scale.engine import env
from ldm_scale.errors import ConfigError
from ldm_scale.models.fused import check_kernels
from ldm_scale.telemetry.log import get_logger


def train(config: Config, launch: env.Launch) -> bool:
    """Whether the run reached its end (False: stopped on request, checkpoint written).

    Raises: ConfigError, DataError or CheckpointError before any process group starts where that can be told.
    """
    _check_inputs(config)
    environment = env.start(launch, config.train)
    check_kernels(config.kernels, environment.device)
    plan = batch_plan(config, launch.world_size)
    log = get_logger(environment.rank)
    log.info(
        f"{config.experiment or 'run'} ({config.stage}): {environment.describe()}; ZeRO stage {config.zero.stage}; "
        f"{plan.global_batch} images a step = {launch.world_size} x {plan.micro_batch} x {plan.accumulation_steps} "
        f"(ranks x micro-batch x accumulation), {config.train.total_images} images in all; output in {config.run_dir}"
    )
    # DeepSpeed and the networks take seconds to import; a refused configuration should not wait for them.
    from ldm_scale.training.autoencoder_step import AutoencoderTask
    from ldm_scale.training.diffusion_step import DiffusionTask
    from ldm_scale.training.trainer import Trainer

    task = (AutoencoderTask if config.stage == "autoencoder" else DiffusionTask)(config, plan, environment)
    finished = Trainer(config, task, environment).run()
    env.stop()
    return finished


def _check_inputs(config: Config) -> None:
    """Returns if the data and the artifact can be opened."""
    open_manifest(config.data.manifest, config.data.split)
    if config.data.validation_split:
        open_manifest(config.data.manifest, config.data.validation_split)
    if config.stage == "diffusion":
        _check_artifact(config)


def _check_artifact(config: Config) -> None:
    """Returns if the artifact is whole and its latents are those that the UNet is configured for."""
    if not Path(config.artifact).is_dir():
        raise ConfigError(
            f"artifact={config.artifact}: there is no such folder; train stage 1 first "
            "(its run_dir/artifact is the one), or set artifact to an autoencoder artifact"
        )
    from ldm_scale.interchange.artifact import read_artifact

    autoencoder = read_artifact(Path(config.artifact)).config
    check_artifact_fits(config, autoencoder.downsampling_factor, autoencoder.latent_channels)
