"""What must fit at run time: the global batch and the ranks, the artifact and the UNet.

Apart from `validate.py` because training asks these two questions again, with what it finds: its ranks and the
artifact that it has opened.
"""

from __future__ import annotations

from ldm_scale.config.schema import BatchPlan, Config, TrainConfig
from ldm_scale.errors import ConfigError

EVALUATION = "evaluation/"  # how names of an evaluation's figures begin


def batch_plan(config: Config, world_size: int) -> BatchPlan:
    """How the global batch is divided among ranks and accumulation steps.

    Raises: ConfigError if it does not divide.
    """
    assert world_size >= 1, f"world_size {world_size}"
    train = config.train
    if train.global_batch % world_size:
        raise ConfigError(
            f"train.global_batch={train.global_batch} does not divide by the {world_size} ranks of this run; set "
            f"train.global_batch to a multiple of {world_size} ({neighbours(train.global_batch, world_size)})"
        )
    per_rank = train.global_batch // world_size
    micro_batch = per_rank if train.micro_batch is None else train.micro_batch
    if per_rank % micro_batch:
        divisors = [d for d in range(1, min(per_rank, micro_batch) + 1) if per_rank % d == 0]
        raise ConfigError(
            f"train.micro_batch={micro_batch} does not divide the {per_rank} images of each rank (train.global_batch="
            f"{train.global_batch} over {world_size} ranks); set train.micro_batch={divisors[-1]}, or null for one "
            "forward pass per step"
        )
    return BatchPlan(
        micro_batch=micro_batch, accumulation_steps=per_rank // micro_batch, global_batch=train.global_batch
    )


def judges_evaluation(train: TrainConfig) -> bool:
    """Whether the best checkpoint is told by a figure of an evaluation, and not of validation."""
    return train.best_metric is not None and train.best_metric.startswith(EVALUATION)


def check_artifact_fits(config: Config, f: int, latent_channels: int) -> None:
    """Nothing, if the artifact's f and c are those that the configuration was written for.

    Raises: ConfigError that names both sides.
    """
    expected = config.autoencoder
    if f != expected.downsampling_factor:
        raise ConfigError(
            f"artifact={config.artifact} has f={f}, the config's autoencoder has f={expected.downsampling_factor} "
            f"({len(expected.channel_multipliers)} levels); they must agree: give the artifact of that autoencoder, or "
            f"autoencoder=NAME with f={f}"
        )
    if latent_channels != expected.latent_channels:
        raise ConfigError(
            f"artifact={config.artifact} has latents of {latent_channels} channels, the config says "
            f"autoencoder.latent_channels={expected.latent_channels}; they must agree: give the artifact of that "
            f"autoencoder, or set autoencoder.latent_channels={latent_channels}"
        )
    check_latent_resolution(config, f, f"the artifact {config.artifact}")


def check_posterior(config: Config, kind: str, measured: str, num_images: int) -> None:
    """Nothing, if a KL artifact's statistics were measured on what stage 2 takes: samples of the posterior, or modes.

    Raises: ConfigError that names both sides.
    """
    wanted = "sample" if config.latents.sample_posterior else "mode"
    if kind == "kl" and num_images > 0 and measured != wanted:
        raise ConfigError(
            f"latents.sample_posterior={str(config.latents.sample_posterior).lower()}, but the statistics of artifact="
            f"{config.artifact} were measured on the posterior's {measured}s, so that latents would not have a "
            f"deviation of 1; set latents.sample_posterior={str(measured == 'sample').lower()}"
        )


def check_latent_resolution(config: Config, f: int, owner: str) -> None:
    """Nothing, if every level of the UNet halves latents of whole numbers; `owner` says whose f it is.

    Raises: ConfigError.
    """
    resolution = config.data.resolution
    levels = len(config.unet.channel_multipliers)
    multiple = f * 2 ** (levels - 1)
    if resolution % multiple:
        latent = f"{resolution // f}" if resolution % f == 0 else f"{resolution}/{f}"
        raise ConfigError(
            f"data.resolution={resolution} gives latents of {latent} per side (f={f} of {owner}), which the "
            f"{levels} levels of the UNet cannot halve {levels - 1} times; set data.resolution to a multiple of "
            f"{multiple} ({neighbours(resolution, multiple)})"
        )


def neighbours(value: int, multiple: int) -> str:
    """The multiples on both sides of `value`, for a message ("32 or 48")."""
    lower = value // multiple * multiple
    return f"{lower} or {lower + multiple}" if lower else str(multiple)
