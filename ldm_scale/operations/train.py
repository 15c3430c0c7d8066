"""From a validated configuration to a finished run: look at the inputs, start the rank, describe the plan, train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ldm_scale.config.convert import flat_config
from ldm_scale.config.fit import batch_plan, check_artifact_fits, check_posterior, judges_evaluation
from ldm_scale.config.origin import process_differences, require_same_networks
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Dataset, LatentCache, check_moments, open_manifest, open_unindexed, require_images
from ldm_scale.data.manifest import needs_manifest
from ldm_scale.engine import collectives, env
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.collectives import set_time_limit
from ldm_scale.engine.early_checksums import EarlyChecksums
from ldm_scale.engine.rank_files import images_of
from ldm_scale.engine.restarts import count_start
from ldm_scale.engine.versions import require_versions
from ldm_scale.engine.watchdog import Watchdog
from ldm_scale.errors import ConfigError, Restart
from ldm_scale.models.fused import check_kernels
from ldm_scale.telemetry.log import get_logger

if TYPE_CHECKING:
    from ldm_scale.training.measuring import Evaluator
    from ldm_scale.training.task import Task


def train(config: Config, launch: env.Launch) -> bool:
    """Whether the run reached its end (False: stopped on request, checkpoint written).

    Raises: ConfigError, DataError or CheckpointError before any process group starts where that can be told; Restart if
    it stopped with a checkpoint and is to be started again.
    """
    require_versions()
    inputs = _check_inputs(config, launch.world_size) | _check_init(config, launch.rank)
    evaluator = _evaluator(config)
    if launch.rank == 0:
        newest = latest_checkpoint(Path(config.run_dir) / "checkpoints")
        count_start(Path(config.run_dir), 0 if newest is None else images_of(newest))
    environment = env.start(launch, config.train, config.watchdog, facts_of(config) | inputs)
    check_kernels(config.kernels, environment.device)
    plan = batch_plan(config, launch.world_size)
    log = get_logger(environment.rank)
    log.info(
        f"{config.experiment or 'run'} ({config.stage}): {environment.describe()}; ZeRO stage {config.zero.stage}; "
        f"{plan.global_batch} images a step = {launch.world_size} x {plan.micro_batch} x {plan.accumulation_steps} "
        f"(ranks x micro-batch x accumulation), {config.train.total_images} images in all; output in {config.run_dir}"
    )
    from ldm_scale.training.trainer import Trainer

    assert environment.meeting is not None, "started here"
    with Watchdog(config.watchdog, Path(config.run_dir), environment.rank, environment.meeting):
        early = EarlyChecksums(Path(config.run_dir) / "checkpoints", environment.rank, environment.world_size)
        task = build_task(config, plan, environment)
        set_time_limit(env.collective_limit(config.watchdog))  # of the groups that DeepSpeed made, too
        try:
            finished = Trainer(config, task, environment, early.of, evaluator).run()
        except Restart:
            _leave()
            raise
        _leave()
    return finished


def build_task(config: Config, plan: BatchPlan, environment: env.Environment) -> Task:
    """The stage that is configured. Collective: all ranks."""
    # DeepSpeed and the networks take seconds to import; a refused configuration should not wait for them.
    from ldm_scale.training.autoencoder_step import AutoencoderTask
    from ldm_scale.training.classifier_step import ClassifierTask
    from ldm_scale.training.diffusion_step import DiffusionTask

    kinds: dict[str, Callable[[Config, BatchPlan, env.Environment], Task]]
    kinds = {"autoencoder": AutoencoderTask, "diffusion": DiffusionTask, "classifier": ClassifierTask}
    return kinds[config.stage](config, plan, environment)


def _evaluator(config: Config) -> Evaluator | None:
    """What measures the run's checkpoints, after it has looked at all that it needs; None if they are not measured."""
    if not config.evaluation.every_images:
        return None
    from ldm_scale.operations.evaluate_checkpoints import CheckpointEvaluator

    evaluator = CheckpointEvaluator(config)
    evaluator.check()
    return evaluator


def _leave() -> None:
    """Returns when all ranks are done: a launcher may take the first that leaves for the end of all. Collective."""
    collectives.barrier()
    env.stop()


def facts_of(config: Config) -> dict[str, str]:
    """The configuration's keys and values, as texts."""
    return {key: str(value) for key, value in flat_config(config).items()}


def _check_inputs(config: Config, world_size: int) -> dict[str, str]:
    """Digests of the data and of the artifact, if they can be opened and belong together."""
    unindexed = open_unindexed(config.data.manifest)
    if unindexed is not None:
        return {"digest of the data": unindexed.digest} | _check_unindexed(config)
    splits = dict.fromkeys([config.data.split, config.data.validation_split or config.data.split])
    # A run that lost a shard goes on without it, also after an interruption; one that begins needs all that it names.
    begins = latest_checkpoint(Path(config.run_dir) / "checkpoints") is None
    datasets = [open_manifest(config.data.manifest, split, check_sizes=begins) for split in splits]
    for dataset in datasets:
        _check_buckets(config, dataset)
    digests = {"digest of the data": datasets[0].digest, "digest of the validation data": datasets[-1].digest}
    if config.stage == "autoencoder":
        for dataset in datasets:
            require_images(dataset)
        return digests
    artifact_hash = _check_artifact(config)
    for dataset in datasets:
        if dataset.num_samples < world_size:
            raise ConfigError(
                f"data.manifest={config.data.manifest} has {dataset.num_samples} samples in its split "
                f"{dataset.split!r} and each of the {world_size} ranks needs one to validate on; use fewer ranks, or "
                "another split"
            )
        if config.stage == "diffusion" and config.conditioning.needs_pictures:
            require_images(dataset)
        if config.stage == "classifier":
            _require_enough_classes(config, len(dataset.class_names))
        if dataset.latents is not None:
            check_cache_fits(config, dataset.latents, artifact_hash)
            check_moments(dataset)
    return digests | {"digest of the artifact": artifact_hash}


def _check_buckets(config: Config, dataset: Dataset) -> None:
    """Nothing; raises ConfigError if pictures of an aspect-ratio bucket do not divide as the networks need."""
    multiple = config.autoencoder.downsampling_factor
    if config.stage != "autoencoder":
        multiple *= 2 ** (len(config.unet.channel_multipliers) - 1)
    for part in dataset.parts:
        if part.size is not None and any(side % multiple for side in part.size):
            height, width = part.size
            raise ConfigError(
                f"data.manifest={config.data.manifest} has a bucket of {height} x {width} pixels, and both must be "
                f"multiples of {multiple} (the autoencoder's f, times the UNet's in stage 2); make the buckets with "
                f"`ldm-scale prepare buckets --step {multiple}`, or a multiple of it"
            )


def _check_unindexed(config: Config) -> dict[str, str]:
    """The artifact's digest, if shards without a manifest are enough for the stage, and it is whole."""
    conditioning = config.conditioning
    if config.train.best_metric is not None and not judges_evaluation(config.train):
        raise needs_manifest(config.data.manifest, "train.best_metric, a figure of validation,")
    if config.stage == "classifier" or (config.stage == "diffusion" and conditioning.classes is not None):
        raise needs_manifest(config.data.manifest, "training on classes")
    if config.stage == "diffusion" and (conditioning.layout is not None or conditioning.semantic_map is not None):
        raise needs_manifest(config.data.manifest, "a conditioning on boxes or maps")
    return {} if config.stage == "autoencoder" else {"digest of the artifact": _check_artifact(config)}


def _require_enough_classes(config: Config, listed: int) -> None:
    if listed > config.classifier.num_classes:
        raise ConfigError(
            f"classifier.num_classes={config.classifier.num_classes}: data.manifest={config.data.manifest} lists "
            f"{listed} classes; set classifier.num_classes={listed}"
        )


def _check_artifact(config: Config) -> str:
    """The artifact's content hash, if it is whole and its latents are those that the UNet is configured for."""
    if not Path(config.artifact).is_dir():
        raise ConfigError(
            f"artifact={config.artifact}: there is no such folder; train stage 1 first "
            "(its run_dir/artifact is the one), or set artifact to an autoencoder artifact"
        )
    from ldm_scale.interchange.artifact import read_artifact

    artifact = read_artifact(Path(config.artifact))
    check_artifact_fits(config, artifact.config.downsampling_factor, artifact.config.latent_channels)
    check_posterior(config, artifact.config.kind, artifact.statistics.posterior, artifact.statistics.num_images)
    return artifact.content_hash


def _check_init(config: Config, rank: int) -> dict[str, str]:
    """The digest of the weights that the run begins with, if they fit its networks; nothing where it goes on."""
    if not config.init:
        return {}
    from ldm_scale.interchange import initial
    from ldm_scale.interchange.artifact import DiffusionArtifact, read_artifact

    log = get_logger(rank)
    if initial.has_begun(config):
        if rank == 0:
            began = initial.own_beginning(config)
            say = log.info if began == config.init else log.warning
            say(
                f"init={config.init} is not read: {config.run_dir} has a checkpoint and goes on from that (it began "
                f"with {began}); give another run_dir to begin anew"
            )
        return {}
    source = initial.read_initial(config)
    networks = initial.source_config(config, source)
    require_same_networks(config, networks)
    if isinstance(source, DiffusionArtifact):
        initial.require_same_latents(config, source, read_artifact(Path(config.artifact)))
        differences = process_differences(config, networks)
        if differences and rank == 0:
            log.warning(
                f"init={config.init} was trained for another process, {', '.join(differences)}: the network has to "
                "learn it anew"
            )
    seen = source.provenance["resolution"]
    if seen != config.data.resolution and rank == 0:
        log.warning(f"data.resolution={config.data.resolution}: init={config.init} was trained at {seen} pixels")
    return {"digest of the initial weights": source.content_hash}


def check_cache_fits(config: Config, cache: LatentCache, artifact_hash: str) -> None:
    """Nothing, if these cached latents are those that training on images with this configuration would compute.

    Raises: ConfigError that names both sides.
    """
    manifest, transform = f"data.manifest={config.data.manifest}", cache.transform
    if transform.resolution != config.data.resolution:
        raise ConfigError(
            f"{manifest} holds latents of images of {transform.resolution} pixels, the config says data.resolution="
            f"{config.data.resolution}; set data.resolution={transform.resolution}, or encode at that resolution"
        )
    sides = {"f": (cache.f, config.autoencoder.downsampling_factor), "c": (cache.c, config.autoencoder.latent_channels)}
    for name, (found, expected) in sides.items():
        if found != expected:
            raise ConfigError(
                f"{manifest} holds latents with {name}={found}, the config's autoencoder has {name}={expected}; give "
                "the cache of that autoencoder, or encode one with `ldm-scale encode`"
            )
    if cache.artifact_sha256 != artifact_hash:
        raise ConfigError(
            f"{manifest} holds latents of the autoencoder {cache.artifact_sha256[:12]}, artifact={config.artifact} is "
            f"{artifact_hash[:12]}: the latents of one mean nothing to the other; give the artifact that the cache was "
            "encoded with, or encode anew with `ldm-scale encode`"
        )
    if transform.horizontal_flip != config.data.horizontal_flip:
        held = "with" if transform.horizontal_flip else "without"
        raise ConfigError(
            f"{manifest} was encoded {held} mirror images, the config says data.horizontal_flip="
            f"{str(config.data.horizontal_flip).lower()}; set data.horizontal_flip="
            f"{str(transform.horizontal_flip).lower()}, or encode {'without' if held == 'with' else 'with'} --flips"
        )
    if transform.crop_scale_min != config.data.crop_scale_min:
        raise ConfigError(
            f"{manifest} was encoded with random crops from a scale of {transform.crop_scale_min:g} (1 = none), the "
            f"config says data.crop_scale_min={config.data.crop_scale_min:g}; set data.crop_scale_min="
            f"{transform.crop_scale_min:g}, or encode with other --crops and --crop-scale-min"
        )
