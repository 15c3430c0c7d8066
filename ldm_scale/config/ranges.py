"""Bounds of single numbers in the configuration, as one table.

Rules across fields are `validate.py`'s; this table stands apart so that adding a field means adding one line here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

from ldm_scale.config.schema import Config
from ldm_scale.errors import ConfigError

# Of a power-function profile. The uniform average over the whole run has 1 / sqrt(12) = 0.2887.
MAX_POWER_STD = 0.28


def check_ranges(config: Config) -> None:
    """Nothing, if every number of the configuration lies within its bounds.

    Raises: ConfigError on the first that does not.
    """
    for rule in _RANGES:
        rule.check(config)


def bounds(key: str) -> str:
    """Where the number at a dotted key must lie, as "above 0 and at most 1"; "" where nothing is asked."""
    return " and ".join(rule.words() for rule in _RANGES if key in rule.keys)


@dataclass(frozen=True)
class _Range:
    """Where a number must lie; `above` and `below` are exclusive bounds, the other two inclusive. None passes."""

    keys: tuple[str, ...]
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None

    def check(self, config: Config) -> None:
        for key in self.keys:
            value = _value(config, key)
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and not self._contains(number):
                    raise ConfigError(f"{key}={_plain(value)}: must be {self.words()}; change {key}")

    def _contains(self, number: float) -> bool:
        return (
            (self.above is None or number > self.above)
            and (self.at_least is None or number >= self.at_least)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def words(self) -> str:
        """The bounds as a message has them."""
        bounds = (("above", self.above), ("at least", self.at_least), ("at most", self.at_most), ("below", self.below))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


_RANGES: tuple[_Range, ...] = (
    _Range(
        (
            "autoencoder.base_channels",
            "autoencoder.channel_multipliers",
            "autoencoder.num_res_blocks",
            "autoencoder.latent_channels",
            "autoencoder.norm_groups",
            "autoencoder.codebook_size",
            "autoencoder_loss.discriminator_base_channels",
            "autoencoder_loss.discriminator_layers",
            "latents.statistics_images",
            "unet.base_channels",
            "unet.channel_multipliers",
            "unet.num_res_blocks",
            "unet.transformer_depth",
            "unet.head_dim",
            "unet.num_heads",
            "unet.norm_groups",
            "conditioning.text.width",
            "conditioning.text.depth",
            "conditioning.text.num_heads",
            "conditioning.text.head_dim",
            "conditioning.text.vocab_size",
            "conditioning.frozen_text.max_tokens",
            "conditioning.frozen_text.width",
            "conditioning.classes.num_classes",
            "conditioning.classes.width",
            "conditioning.layout.num_classes",
            "conditioning.layout.max_objects",
            "conditioning.layout.width",
            "conditioning.layout.depth",
            "conditioning.layout.num_heads",
            "conditioning.layout.head_dim",
            "conditioning.semantic_map.channels",
            "classifier.num_classes",
            "classifier.pool_head_dim",
            "diffusion.num_timesteps",
            "data.resolution",
            "data.lanes",
            "data.fetch_threads",
            "data.chunk_samples",
            "data.block_chunks",
            "data.max_consecutive_bad",
            "zero.bucket_elements",
            "zero.live_elements",
            "train.total_images",
            "train.global_batch",
            "train.micro_batch",
            "train.log_every_images",
            "train.keep_checkpoints",
            "train.max_skipped_steps",
            "sampling.num_steps",
            "evaluation.num_images",
            "evaluation.batch",
        ),
        at_least=1,
    ),
    _Range(
        (
            "autoencoder_loss.reconstruction_weight",
            "autoencoder_loss.chroma_weight",
            "autoencoder_loss.perceptual_weight",
            "autoencoder_loss.kl_weight",
            "autoencoder_loss.codebook_weight",
            "autoencoder_loss.commitment_weight",
            "autoencoder_loss.dead_code_images",
            "autoencoder_loss.adversarial_weight",
            "autoencoder_loss.adversarial_ramp_images",
            "autoencoder_loss.adaptive_weight_max",
            "autoencoder_loss.discriminator_start_images",
            "autoencoder_loss.discriminator_pretrain_images",
            "autoencoder_loss.r1_weight",
            "autoencoder_loss.lecam_weight",
            "data.read_ahead_batches",
            "optimizer.weight_decay",
            "optimizer.warmup_images",
            "ema.half_life_images",
            "ema.warmup_ratio",
            "ema.snapshot_every_images",
            "train.seed",
            "train.validate_every_images",
            "train.sample_every_images",
            "train.checkpoint_every_images",
            "train.patience_images",
            "evaluation.every_images",
            "evaluation.seed",
            "train.checkpoint_every_s",
            "train.check_ranks_every_images",
            "watchdog.step_s",
            "watchdog.other_s",
            "sampling.guidance_scale",
            "sampling.guidance_interval",
            "diffusion.noise_offset",
            "diffusion.p2_gamma",
        ),
        at_least=0,
    ),
    _Range(
        (
            "data.cache_gib",
            "optimizer.lr",
            "optimizer.eps",
            "optimizer.gradient_clip",
            "autoencoder_loss.discriminator_lr",
            "train.memory_budget_gib",
            "watchdog.rendezvous_s",
        ),
        above=0,
    ),
    _Range(("spikes.factor",), at_least=3),  # below, ordinary steps stand out every few hundred steps
    _Range(("spikes.window_steps",), at_least=16, at_most=10_000),
    _Range(("ema.power_stds",), above=0, at_most=MAX_POWER_STD),
    _Range(("sampling.eta",), at_least=0, at_most=1),
    _Range(("conditioning.semantic_map.num_labels",), at_least=1, at_most=255),  # 255 itself means unknown
    _Range(("conditioning.low_resolution.factor",), at_least=2),
    _Range(
        (
            "conditioning.text.drop_probability",
            "conditioning.frozen_text.drop_probability",
            "conditioning.classes.drop_probability",
            "conditioning.layout.drop_probability",
            "conditioning.semantic_map.drop_probability",
            "conditioning.low_resolution.drop_probability",
            "conditioning.inpainting.drop_probability",
        ),
        at_least=0,
        at_most=1,
    ),
    _Range(("optimizer.betas", "unet.dropout", "autoencoder_loss.codebook_decay"), at_least=0, below=1),
    _Range(("autoencoder_loss.discriminator_hold_accuracy",), above=0.5, at_most=1),
    _Range(("diffusion.beta_start", "diffusion.beta_end"), above=0, below=1),
    _Range(
        (
            "diffusion.logit_std",
            "diffusion.snr_gamma",
            "diffusion.p2_k",
            "diffusion.sigma_log_std",
            "diffusion.sigma_data",
            "diffusion.sigma_min",
            "diffusion.sigma_max",
            "diffusion.rho",
        ),
        above=0,
    ),
    _Range(("diffusion.logit_mean", "diffusion.sigma_log_mean"), at_least=-20, at_most=20),
    _Range(("sampling.guidance_rescale",), at_least=0, at_most=1),
    # Together below the batches that pass before a quarantine begins (training/sample_losses.py).
    _Range(("data.num_workers",), at_least=0, at_most=128),
    _Range(("data.prefetch_batches",), at_least=1, at_most=64),
    _Range(("data.crop_scale_min", "data.max_bad_share", "data.max_bad_share_of_shard"), above=0, at_most=1),
    _Range(("zero.stage",), at_least=0, at_most=3),
    _Range(("zero.discriminator_stage",), at_least=0, at_most=1),
)


def _value(config: Config, key: str) -> Any:
    """The value at a dotted key, None (which passes every rule) where its section is absent."""
    return reduce(lambda section, name: None if section is None else getattr(section, name), key.split("."), config)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
