"""Rules that span several fields of a configuration, checked before any process group starts.

Types and closed choices are `convert.py`'s matter, bounds of single numbers `ranges.py`'s, the batch arithmetic of a
run's ranks `fit.py`'s. Here: shapes that must fit each other and what a stage cannot do without. The first breach is
raised, as one line with the key, the value, the rule and a fix that can be typed as an override. Nothing is rounded
or corrected in silence.
"""

from __future__ import annotations

from ldm_scale.command_line import output_path
from ldm_scale.conditioning.tokenizers import build_tokenizer
from ldm_scale.config.fit import batch_plan, check_latent_resolution, judges_evaluation, neighbours
from ldm_scale.config.networks import (
    check_attention,
    check_attention_levels,
    check_classifier,
    check_context,
    check_kind,
    check_levels,
    check_spatial,
    check_unet,
)
from ldm_scale.config.ranges import check_ranges
from ldm_scale.config.schema import (
    BatchPlan,
    Config,
)
from ldm_scale.diffusion.guidance import check_interval
from ldm_scale.diffusion.process import build_process
from ldm_scale.diffusion.sampler import check_sampler
from ldm_scale.engine.cuda_graphs import check_cuda_graphs
from ldm_scale.errors import ConfigError


def validate(config: Config, *, world_size: int) -> None:
    """Nothing, if a run of `world_size` ranks can train `config`.

    Raises: ConfigError on the first rule that is broken.
    """
    validate_architecture(config)
    _check_run(config)
    _check_offload(config)
    _check_speed(config, world_size)
    plan = batch_plan(config, world_size)
    if config.stage == "autoencoder":
        _check_discriminator_norm(config, plan, world_size)


def _check_offload(config: Config) -> None:
    zero = config.zero
    if zero.offload_optimizer and zero.stage == 0:
        raise ConfigError(
            "zero.offload_optimizer=true needs zero.stage of 1 to 3: stage 0 divides nothing and keeps all on the "
            "device; set zero.stage=1"
        )
    if zero.offload_parameters and (zero.stage != 3 or not zero.offload_optimizer):
        raise ConfigError(
            f"zero.offload_parameters=true needs zero.stage=3 and zero.offload_optimizer=true, got zero.stage="
            f"{zero.stage} and zero.offload_optimizer={str(zero.offload_optimizer).lower()}: below stage 3 every rank "
            "computes with all parameters, and the optimizer's state is larger than they are; set both, or offload the "
            "optimizer alone"
        )


def _check_speed(config: Config, world_size: int) -> None:
    train = config.train
    if train.compile == "blocks" and config.stage == "autoencoder":
        raise ConfigError(
            "train.compile=blocks compiles the blocks of a UNet (stage=diffusion, stage=classifier); the networks of "
            "stage=autoencoder compute as they are: set train.compile=none"
        )
    if train.cuda_graphs:
        check_cuda_graphs(config, world_size)


def _check_budget(config: Config) -> None:
    train = config.train
    has_budget = train.activation_checkpointing == "budget"
    if has_budget and train.memory_budget_gib is None:
        raise ConfigError(
            "train.activation_checkpointing=budget needs train.memory_budget_gib, the GiB that the plan may count for "
            "a device; set it, such as to 70 for a GPU of 80 GB, or choose selective or full"
        )
    if not has_budget and train.memory_budget_gib is not None:
        raise ConfigError(
            f"train.memory_budget_gib={train.memory_budget_gib:g} does nothing under train.activation_checkpointing="
            f"{train.activation_checkpointing}; set train.activation_checkpointing=budget, or leave the budget out"
        )
    if has_budget and config.stage == "autoencoder":
        raise ConfigError(
            "train.activation_checkpointing=budget is for stage=diffusion and stage=classifier: activations of stage 1 "
            "are not planned; set none, selective or full"
        )


def validate_architecture(config: Config) -> None:
    """Nothing, if the networks of `config` can be built and fit each other and the resolution.

    What `ldm-scale plan` and the export of untrained models need: no data, artifact or batch is looked at.

    Raises: ConfigError on the first rule that is broken.
    """
    check_ranges(config)
    _check_autoencoder(config)
    _check_budget(config)
    if config.stage == "autoencoder":
        _check_latents(config)
        _check_codebook_losses(config)
        _check_adversarial_loss(config)
    else:
        check_unet(config.unet)
        check_latent_resolution(config, config.autoencoder.downsampling_factor, "the autoencoder")
    if config.stage == "classifier":
        check_classifier(config)
        build_process(config.diffusion)
    if config.stage == "diffusion":
        check_attention(config)
        check_context(config)
        check_spatial(config)
        _check_diffusion(config)


def _check_autoencoder(config: Config) -> None:
    autoencoder = config.autoencoder
    check_levels("autoencoder", autoencoder)
    check_attention_levels("autoencoder", autoencoder)
    check_kind(autoencoder)
    f, resolution = autoencoder.downsampling_factor, config.data.resolution
    if resolution % f:
        raise ConfigError(
            f"data.resolution={resolution} does not divide by the autoencoder's f={f} "
            f"({len(autoencoder.channel_multipliers)} levels); set data.resolution to a multiple of {f} "
            f"({neighbours(resolution, f)})"
        )


def _check_latents(config: Config) -> None:
    kind = config.autoencoder.kind
    if config.latents.statistics == "per_channel" and kind != "kl":
        reason = {
            "vq": "the codes would have to be moved with the latents, and the paper does not rescale VQ latents",
            "identity": "no quant_conv and post_quant_conv exist that an export could fold them into",
        }[kind]
        raise ConfigError(
            f"latents.statistics=per_channel: not for autoencoder.kind={kind} ({reason}); set latents.statistics=scalar"
        )


def _check_codebook_losses(config: Config) -> None:
    loss, kind = config.autoencoder_loss, config.autoencoder.kind
    if kind == "vq":
        return
    for name, value, off in (
        ("codebook_update", loss.codebook_update, "gradient"),
        ("dead_code_images", loss.dead_code_images, 0),
    ):
        if value != off:
            raise ConfigError(
                f"autoencoder_loss.{name}={value} does nothing: autoencoder.kind={kind} has no codebook; set "
                f"autoencoder_loss.{name}={off}, or autoencoder.kind=vq"
            )


def _check_adversarial_loss(config: Config) -> None:
    loss, resolution = config.autoencoder_loss, config.data.resolution
    if loss.adversarial_weight == 0:  # switches off all that concerns the discriminator, whatever it is set to
        return
    # Each of the strided layers halves the side, the two closing 4x4 convolutions take one pixel each.
    smallest = 3 * 2**loss.discriminator_layers
    if resolution < smallest:
        raise ConfigError(
            f"autoencoder_loss.discriminator_layers={loss.discriminator_layers} leaves nothing of data.resolution="
            f"{resolution}: it needs {smallest} pixels; set fewer layers, or autoencoder_loss.adversarial_weight=0"
        )
    if loss.discriminator_pretrain_images > loss.discriminator_start_images:
        raise ConfigError(
            f"autoencoder_loss.discriminator_pretrain_images={loss.discriminator_pretrain_images} exceeds "
            f"autoencoder_loss.discriminator_start_images={loss.discriminator_start_images}: it would have to begin "
            f"before the first image; set discriminator_pretrain_images to at most {loss.discriminator_start_images}"
        )


def _check_discriminator_norm(config: Config, plan: BatchPlan, world_size: int) -> None:
    loss = config.autoencoder_loss
    if loss.adversarial_weight > 0 and loss.discriminator_norm == "batch" and plan.micro_batch != plan.global_batch:
        raise ConfigError(
            f"autoencoder_loss.discriminator_norm=batch: batch statistics would be those of {plan.micro_batch} of the "
            f"{plan.global_batch} images of a step ({_count(world_size, 'rank')}, "
            f"{_count(plan.accumulation_steps, 'forward pass', 'forward passes')} each), so that results depended on "
            "ranks and micro-batch; set autoencoder_loss.discriminator_norm=group, or use one rank with "
            "train.micro_batch=null"
        )


def _check_diffusion(config: Config) -> None:
    process = build_process(config.diffusion)
    check_sampler(config.sampling.sampler, process, config.sampling.eta)
    process.levels(config.sampling.num_steps)
    check_interval(config.sampling.guidance_interval)


def _check_run(config: Config) -> None:
    if config.stage == "autoencoder" and config.autoencoder.kind == "identity":
        raise ConfigError(
            "autoencoder.kind=identity has nothing to train; write its artifact with `ldm-scale export "
            "experiment=identity_f1 --random-init --to safetensors --out DIR`, and give stage=diffusion artifact=DIR"
        )
    if not config.run_dir:
        raise ConfigError("run_dir='': a run needs a folder; choose experiment=NAME, or set run_dir=PATH")
    output_path(config.run_dir, "run_dir=")
    if not config.data.manifest:
        raise ConfigError(
            "data.manifest='': training needs a data set; set data.manifest=PATH to a manifest.json that "
            "`ldm-scale prepare` wrote"
        )
    _check_init(config)
    if config.stage != "autoencoder" and not config.artifact:
        if config.init:
            raise ConfigError(
                f"artifact='': init={config.init} holds no autoencoder in our own format; make an artifact of it with "
                f"`ldm-scale import {config.init} --out DIR` and give init=DIR, or set artifact=FOLDER of the "
                "autoencoder that it was trained on"
            )
        raise ConfigError(
            f"artifact='': stage={config.stage} works in the latent space of a trained autoencoder; set "
            "artifact=FOLDER, such as runs/kl_f8/artifact"
        )
    if config.spikes.action == "rollback" and not config.train.checkpoint_every_images:
        raise ConfigError(
            "spikes.action=rollback needs train.checkpoint_every_images above 0: the run goes back to checkpoints that "
            "fall due by images, since those of stops and of the clock lie elsewhere each time; set it, or "
            "spikes.action=skip"
        )
    _check_best(config)
    _check_evaluation(config)
    _check_ema(config)
    text = config.conditioning.text
    if text is not None and text.tokenizer == "wordpiece":
        build_tokenizer(text)  # a vocabulary that is missing or does not fit shows now, not at the first batch
    if config.optimizer.warmup_images >= config.train.total_images:
        raise ConfigError(
            f"optimizer.warmup_images={config.optimizer.warmup_images} is not below train.total_images="
            f"{config.train.total_images}: the learning rate would never reach its peak; shorten the warm-up"
        )


def _check_init(config: Config) -> None:
    if config.init and config.stage == "classifier":
        raise ConfigError(
            f"init={config.init}: stage=classifier begins with random weights alone; leave init out, or set "
            "stage=diffusion to train a diffusion model on"
        )
    if config.init_weights is not None and not config.init:
        raise ConfigError(
            f"init_weights={config.init_weights} chooses among the weights of init, and init='' names none; set "
            "init=FOLDER, or leave init_weights out"
        )


def _check_best(config: Config) -> None:
    train = config.train
    if train.patience_images and train.best_metric is None:
        raise ConfigError(
            f"train.patience_images={train.patience_images} without train.best_metric: nothing says what is better; "
            "set train.best_metric, such as validation/ema/mean, or train.patience_images=0"
        )
    if judges_evaluation(train):
        if not config.evaluation.every_images:
            raise ConfigError(
                f"train.best_metric={train.best_metric} is a figure of evaluations, and evaluation.every_images=0 asks "
                "for none; set evaluation.every_images, or a figure of validation"
            )
    elif train.best_metric is not None and not train.validate_every_images:
        raise ConfigError(
            f"train.best_metric={train.best_metric} with train.validate_every_images=0: a single validation at the end "
            "has nothing to be better than; set train.validate_every_images, or leave train.best_metric out"
        )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    if not evaluation.every_images:
        return
    if config.stage == "classifier":
        raise ConfigError(
            f"evaluation.every_images={evaluation.every_images}: stage=classifier has neither samples nor "
            "reconstructions; set evaluation.every_images=0"
        )


def _check_ema(config: Config) -> None:
    ema = config.ema
    if len(set(ema.power_stds)) < len(ema.power_stds):
        raise ConfigError(f"ema.power_stds={list(ema.power_stds)}: a profile occurs twice; name each once")
    if ema.snapshot_every_images and not ema.power_stds:
        raise ConfigError(
            f"ema.snapshot_every_images={ema.snapshot_every_images}: snapshots are of power-function profiles, and "
            "ema.power_stds=[] has none; set ema.power_stds=[0.05, 0.1], or ema.snapshot_every_images=0"
        )


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
