"""Typed configuration: one frozen dataclass per section, the unit or meaning beside each field.

The tree of `Config` is the tree of the YAML files under configs/. `compose.py` builds it from Hydra's output and
refuses unknown keys and wrong types; `validate.py` holds the rules that span several fields. This module sees
nothing but the standard library, so that every layer may import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["autoencoder", "diffusion"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of the first stage (arXiv:2112.10752, section 3.1 and Table 8; the VQGAN encoder and decoder)."""

    kind: Literal["kl", "vq", "identity"] = "kl"  # regularisation of the latents; identity: they are the pixels, f = 1
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # one per level; f = 2 ** (levels - 1)
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    latent_channels: int = 4  # c of the raw latents (B, c, H/f, W/f)
    norm_groups: int = 32  # groups of every GroupNorm; must divide every level's channels
    mid_attention: bool = True  # one single-head self-attention between the two middle blocks
    attention_levels: tuple[int, ...] = ()  # levels (0 = finest) with such an attention after every residual block
    codebook_size: int | None = None  # vq: |Z|, codes of latent_channels numbers each; null for the other kinds

    @property
    def downsampling_factor(self) -> int:
        """f: pixels per latent along each axis."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Objective of stage 1 (arXiv:2112.10752, eq. 25)."""

    reconstruction: Literal["l1", "l2"] = "l1"  # mean absolute or mean squared error
    reconstruction_weight: float = 1.0  # of that error
    chroma_weight: float = 0.0  # of the mean squared error of colour: channels minus their mean; the paper has none
    perceptual_weight: float = 1.0  # 0 switches the perceptual net off
    perceptual_net: Literal["efficientnet_lite0", "lpips_vgg"] = "efficientnet_lite0"
    perceptual_weights: str | None = None  # lpips_vgg: path of VGG16's weights; None = torch's usual cache
    learned_variance: bool = False  # one output variance for all pixels, learned with the weights; else it is 1
    kl_weight: float = 1.0e-6  # kl: times the KL divergence summed over a latent, averaged over images and pixels
    codebook_weight: float = 0.25  # vq: of the mean squared distance that pulls codes to latents
    commitment_weight: float = 1.0  # vq: of the same distance, pulling latents to codes
    codebook_update: Literal["gradient", "ema"] = "gradient"  # vq: ema = codes are averages of their latents
    codebook_decay: float = 0.99  # vq, ema: share of the old average that one step keeps
    dead_code_images: int = 0  # vq: codes that no latent of so many images chose are put on latents; 0 = never
    adversarial_loss: Literal["hinge", "non_saturating"] = "hinge"
    adversarial_weight: float = 0.5  # times the adaptive weight; 0 switches the discriminator off
    adversarial_ramp_images: int = 0  # images over which that weight rises from 0, from the discriminator's start
    adaptive_weight_max: float = 1.0e4  # clamp of |grad reconstruction| / |grad adversarial|
    discriminator_start_images: int = 0  # images seen before the discriminator is felt
    discriminator_pretrain_images: int = 0  # images before that start from which it trains unfelt
    discriminator_base_channels: int = 64
    discriminator_layers: int = 3  # stride-2 layers of the PatchGAN
    discriminator_norm: Literal["group", "batch"] = "group"  # batch: the published network; one rank, no accumulation
    discriminator_lr: float | None = None  # None = optimizer.lr
    discriminator_hold_accuracy: float | None = None  # smoothed accuracy above which it waits for the generator
    r1_weight: float = 0.0  # times half the squared gradient of its logits at real images (arXiv:1801.04406)
    lecam_weight: float = 0.0  # of LeCam's pull of its logits to their averages (arXiv:2104.03310)


@dataclass(frozen=True)
class LatentsConfig:
    """How raw latents become latents (arXiv:2112.10752, appendix G: one scalar, shift 0)."""

    statistics: Literal["scalar", "per_channel"] = "scalar"  # per_channel: mean and deviation of each; kl only
    statistics_images: int = 4096  # images over which the statistics are measured, over all ranks
    sample_posterior: bool = True  # statistics and stage 2 take samples of the posterior (False: its mode)


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of the denoiser (arXiv:2112.10752, section 3.3 and Tables 12 to 15)."""

    base_channels: int = 320
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2  # per level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (0, 1, 2)  # levels (0 = finest) with spatial transformers; the middle has one
    transformer_depth: int = 1  # blocks per spatial transformer
    head_dim: int | None = 64  # exactly one of head_dim and num_heads is set
    num_heads: int | None = None
    linear_projection: bool = (
        True  # projections around the transformer blocks: linear (SD-2) or 1x1 convolutions (SD-1)
    )
    norm_groups: int = 32
    dropout: float = 0.0


@dataclass(frozen=True)
class TextConditioningConfig:
    """tau_theta for captions: CLIP's text architecture (causal, pre-LN, final LN), trained jointly with the UNet."""

    vocab_size: int = 49408  # OpenCLIP's byte-pair vocabulary
    max_tokens: int = 77
    width: int = 768  # d_tau: the context's last dimension
    depth: int = 12
    num_heads: int = 12
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    drop_probability: float = 0.1  # captions replaced by the empty caption, for classifier-free guidance


@dataclass(frozen=True)
class DiffusionConfig:
    """Forward process and objective (arXiv:2112.10752, eq. 1 to 3 and appendix B)."""

    num_timesteps: int = 1000
    schedule: Literal["linear"] = "linear"  # the paper's: linear in sqrt(beta)
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Literal["eps"] = "eps"
    loss: Literal["l2", "l1"] = "l2"


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are prepared."""

    manifest: str = ""  # path of a manifest.json written by `ldm-scale prepare`
    split: str = "train"
    validation_split: str = "heldout"  # a split of the same manifest; "" = validate on the training split
    resolution: int = 256  # pixels along each side after cropping and resizing
    crop_scale_min: float = (
        1.0  # smallest side of the random square crop, as a share of the image's; 1 = no random crop
    )
    horizontal_flip: bool = False
    num_workers: int = 1  # loader processes per rank; 0 = in the training process
    prefetch_batches: int = 4  # batches held ready per worker
    max_consecutive_bad: int = 20  # more undecodable samples than this in a row stop the run


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the networks that are trained (the discriminator has the same with its own lr)."""

    lr: float = 1.0e-4  # peak; never scaled by batch or ranks behind the user's back
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1.0e-8
    weight_decay: float = 0.01
    warmup_images: int = 0  # linear from 0
    decay: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine reaches 0 at train.total_images
    gradient_clip: float | None = 1.0  # global norm; None = off


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving average of the trained weights, kept sharded like the optimizer's masters."""

    half_life_images: float = 500_000.0  # images after which a weight's share has halved; 0 switches EMA off
    warmup_ratio: float = 0.05  # the half-life is at most this share of the images seen so far; 0 = no such bound


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed ZeRO: what is divided among the ranks."""

    stage: int = 1  # 0 nothing, 1 optimizer states, 2 + gradients, 3 + parameters
    discriminator_stage: int = 0  # 0 or 1 (stage 3 cannot switch the discriminator's gradients off)
    bucket_elements: int = 50_000_000  # elements per all-reduce, reduce-scatter and all-gather bucket
    overlap_comm: bool = True  # CUDA only; on CPU it is off


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation the fused operations take (kernels/README.md).

    auto is Triton where it pays and plain torch elsewhere, CPUs included; every other name is taken, or refused with
    the reason.
    """

    group_norm_silu: Literal["auto", "triton", "reference"] = "auto"
    attention: Literal["auto", "triton", "sdpa", "xformers", "reference"] = "auto"
    geglu: Literal["auto", "triton", "reference"] = "auto"
    ema_update: Literal["auto", "triton", "reference"] = "auto"
    vector_quantize: Literal["auto", "triton", "reference"] = "auto"


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch arithmetic, cadence. Everything counts images, over all ranks."""

    total_images: int = 1_000_000
    global_batch: int = 64  # images per optimizer step over all ranks
    micro_batch: int | None = None  # images per rank and forward pass; None = global_batch / ranks
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    activation_checkpointing: bool = False  # stage 1: blocks are computed again in backward, for memory
    log_every_images: int = 1_000
    validate_every_images: int = 50_000  # 0 = only at the end, as for the next one
    sample_every_images: int = 50_000  # picture grids in TensorBoard
    checkpoint_every_images: int = 50_000  # 0 = only by the clock and at the end
    checkpoint_every_s: float = 1_800.0  # and at least this often; 0 = off
    keep_checkpoints: int = 2


@dataclass(frozen=True)
class BatchPlan:
    """The global batch divided among this run's ranks: global_batch = micro_batch x accumulation_steps x ranks."""

    micro_batch: int  # images per rank and forward pass
    accumulation_steps: int  # forward passes per optimizer step
    global_batch: int  # images per optimizer step over all ranks


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of sampling, in the training loop and of `ldm-scale sample`."""

    sampler: Literal["ddim", "ddpm"] = "ddim"
    num_steps: int = 50
    eta: float = 0.0  # DDIM's stochasticity (arXiv:2010.02502, eq. 16); 1 = DDPM-like
    guidance_scale: float = 3.0  # 1 = no guidance (arXiv:2207.12598)
    prompts: tuple[str, ...] = ()  # fixed captions of the training loop's grid; () = the first ones of the data


@dataclass(frozen=True)
class Config:
    """One run: everything that determines it."""

    experiment: str = ""
    stage: Stage = "autoencoder"
    run_dir: str = ""  # checkpoints, TensorBoard, artifact; default runs/<experiment>
    artifact: str = ""  # stage 2: folder of the autoencoder artifact that defines its latent space
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    autoencoder_loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    conditioning: TextConditioningConfig = field(default_factory=TextConditioningConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
