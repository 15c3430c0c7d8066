"""Typed configuration: one frozen dataclass per section, the unit or meaning beside each field.

The tree of `Config` is the tree of the YAML files under configs/. `compose.py` builds it from Hydra's output and
refuses unknown keys and wrong types; `validate.py` holds the rules that span several fields. This module sees
nothing but the standard library, so that every layer may import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Stage = Literal["autoencoder", "diffusion", "classifier"]
Recomputation = Literal["none", "selective", "full", "budget"]  # of what lies inside blocks, in backward


@dataclass(frozen=True)
class AutoencoderConfig:
    """Architecture of the first stage (arXiv:2112.10752, section 3.1 and Table 8; the VQGAN encoder and decoder)."""

    kind: Literal["kl", "vq", "identity"] = "kl"  # regularisation of the latents; identity: they are the pixels, f = 1
    base_channels: int = 128  # channels of the finest level; the others have them times their multiplier
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # one per level; f = 2 ** (levels - 1)
    num_res_blocks: int = 2  # per level in the encoder; the decoder has one more
    latent_channels: int = 4  # c of the raw latents (B, c, H/f, W/f)
    norm_groups: int = 32  # groups of every GroupNorm; must divide every level's channels
    mid_attention: bool = True  # one single-head self-attention between the two middle blocks
    attention_levels: tuple[int, ...] = ()  # levels (0 = finest) with a self-attention after every residual block
    codebook_size: int | None = None  # vq: |Z|, codes of latent_channels numbers each; null for the other kinds

    @property
    def downsampling_factor(self) -> int:
        """f: pixels per latent along each axis."""
        return int(2 ** (len(self.channel_multipliers) - 1))


@dataclass(frozen=True)
class AutoencoderLossConfig:
    """Objective of stage 1 (arXiv:2112.10752, eq. 25)."""

    reconstruction: Literal["l1", "l2"] = "l1"  # mean absolute or mean squared error of the pixels
    reconstruction_weight: float = 1.0  # of the error of the pixels
    chroma_weight: float = 0.0  # of the mean squared error of colour: channels minus their mean; the paper has none
    perceptual_weight: float = 1.0  # of the perceptual distance; 0 switches its net off
    perceptual_net: Literal["efficientnet_lite0", "lpips_vgg"] = "efficientnet_lite0"  # whose features are compared
    perceptual_weights: str | None = None  # lpips_vgg: path of VGG16's weights; null = torch's usual cache
    learned_variance: bool = False  # one output variance for all pixels, learned with the weights; else it is 1
    kl_weight: float = 1.0e-6  # kl: times the KL divergence summed over a latent, averaged over images and pixels
    codebook_weight: float = 0.25  # vq: of the mean squared distance that pulls codes to latents
    commitment_weight: float = 1.0  # vq: of the mean squared distance that pulls latents to codes
    codebook_update: Literal["gradient", "ema"] = "gradient"  # vq: ema = codes are averages of their latents
    codebook_decay: float = 0.99  # vq, ema: share of the old average that one step keeps
    dead_code_images: int = 0  # vq: codes that no latent of so many images chose are put on latents; 0 = never
    adversarial_loss: Literal["hinge", "non_saturating"] = "hinge"  # of both networks (arXiv:1705.02894)
    adversarial_weight: float = 0.5  # of what the discriminator says, times the adaptive weight; 0 switches it off
    adversarial_ramp_images: int = 0  # images over which adversarial_weight rises from 0, from the start on
    adaptive_weight_max: float = 1.0e4  # clamp of |grad reconstruction| / |grad adversarial|
    discriminator_start_images: int = 0  # images seen before the discriminator is felt
    discriminator_pretrain_images: int = 0  # images before its start from which it trains unfelt
    discriminator_base_channels: int = 64  # channels after its first layer; each layer doubles them, up to 8 times
    discriminator_layers: int = 3  # stride-2 layers of the PatchGAN
    discriminator_norm: Literal["group", "batch"] = "group"  # batch: the published network; one rank, no accumulation
    discriminator_lr: float | None = None  # peak learning rate of the discriminator; null = optimizer.lr
    discriminator_hold_accuracy: float | None = None  # smoothed accuracy above which it waits; null = it never does
    r1_weight: float = 0.0  # times half the squared gradient of the logits at real images (arXiv:1801.04406)
    lecam_weight: float = 0.0  # of LeCam's pull of the logits to their averages (arXiv:2104.03310)


@dataclass(frozen=True)
class LatentsConfig:
    """How raw latents become latents (arXiv:2112.10752, appendix G: one scalar, shift 0)."""

    statistics: Literal["scalar", "per_channel"] = "scalar"  # one deviation; or mean and deviation of each channel, kl
    statistics_images: int = 4096  # images over which the statistics are measured, over all ranks
    sample_posterior: bool = True  # statistics and stage 2 take samples of the posterior (False: its mode)


@dataclass(frozen=True)
class UNetConfig:
    """Architecture of the denoiser (arXiv:2112.10752, section 3.3 and Tables 12 to 15)."""

    base_channels: int = 320  # channels of the finest level; the others have them times their multiplier
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)  # one per level, each of half the resolution
    num_res_blocks: int = 2  # per level on the way down; one more on the way up
    attention_levels: tuple[int, ...] = (0, 1, 2)  # levels (0 = finest) with attention; the middle always has it
    attention: Literal["transformer", "self"] = "transformer"  # to pixels and context; self: to the pixels alone
    transformer_depth: int = 1  # blocks per spatial transformer
    head_dim: int | None = 64  # width of a head; exactly one of head_dim and num_heads is set
    num_heads: int | None = None  # heads of every attention, in place of head_dim
    linear_projection: bool = (
        True  # projections around the transformer blocks: linear (SD-2) or 1x1 convolutions (SD-1)
    )
    norm_groups: int = 32  # groups of every GroupNorm; must divide every level's channels
    scale_shift_norm: bool = False  # the timestep scales and shifts after the second norm (arXiv:2105.05233)
    residual_resampling: bool = False  # residual blocks halve and double the resolution, not single convolutions
    dropout: float = 0.0  # share of activations dropped inside residual blocks and feed-forward layers


@dataclass(frozen=True)
class TextConditioningConfig:
    """tau_theta for captions, trained jointly with the UNet."""

    encoder: Literal["clip", "bert"] = "clip"  # clip: causal, as CLIP's text tower; bert: bidirectional, as the paper's
    tokenizer: Literal["clip", "wordpiece"] = "clip"  # byte pairs of OpenCLIP; WordPiece of BERT
    vocabulary: str | None = None  # wordpiece: path of BERT's vocab.txt
    vocab_size: int = 49408  # OpenCLIP's byte-pair vocabulary; bert-base-uncased has 30522
    padding: Literal["end", "zero"] = "end"  # clip: tokens behind a caption, the end token (SD-1) or number 0 (SD-2)
    max_tokens: int = 77  # captions are cut to and filled up to so many
    width: int = 768  # d_tau: the context's last dimension
    depth: int = 12  # transformer blocks
    num_heads: int = 12  # heads of every block
    head_dim: int | None = None  # bert: width of a head, null = width / num_heads; the paper has 8 heads of 64 at 1280
    activation: Literal["gelu", "quick_gelu"] = "gelu"  # of the feed-forward layers; quick_gelu: as OpenAI's CLIP
    drop_probability: float = 0.1  # captions replaced by the empty caption, for classifier-free guidance


@dataclass(frozen=True)
class FrozenTextConditioningConfig:
    """tau_theta for captions: the text tower of a trained OpenCLIP model, which stays as it is."""

    model: str = "ViT-H-14"  # OpenCLIP's name of the architecture
    weights: str = "laion2b_s32b_b79k"  # OpenCLIP's name of the weights (usual cache), or a path
    layer: Literal["last", "penultimate"] = "penultimate"  # whose output is the context; the final norm follows both
    max_tokens: int = 77  # tokens that the tower reads: its own number
    width: int = 1024  # d_tau: the tower's own width
    drop_probability: float = 0.1  # captions replaced by the empty caption, as of `text`


@dataclass(frozen=True)
class ClassConditioningConfig:
    """tau_theta for classes: one learned embedding, a context of one token (arXiv:2112.10752, appendix E.2.1)."""

    num_classes: int = 1000  # classes of the data; one more row stands for no class
    width: int = 512  # d_tau: the context's last dimension
    drop_probability: float = 0.1  # share of images that are shown without their class


@dataclass(frozen=True)
class LayoutConditioningConfig:
    """tau_theta for bounding boxes: their tokens through a transformer (arXiv:2112.10752, appendix E.2.1, Table 17)."""

    num_classes: int = 183  # classes of objects; their tokens are the first ones
    num_tokens: int = 8192  # positions are tokens on the largest square grid below it; the last one says "none"
    max_objects: int = 30  # objects of a picture; each is three tokens, the crop two
    width: int = 512  # d_tau: the context's last dimension
    depth: int = 16  # transformer blocks
    num_heads: int = 8  # heads of every block
    head_dim: int | None = 64  # width of a head; null = width / num_heads
    drop_probability: float = 0.1  # share of images that are shown without their boxes


@dataclass(frozen=True)
class SemanticMapConditioningConfig:
    """Semantic maps: one-hot, reduced to the latents' size, projected, concatenated (arXiv:2112.10752, 4.3.2)."""

    num_labels: int = 182  # labels of the data; the value 255 of a map stands for unknown
    channels: int = 3  # channels of the map after its projection
    drop_probability: float = 0.0  # share of images that are shown without their map


@dataclass(frozen=True)
class LowResolutionConditioningConfig:
    """Super-resolution: the low-resolution image itself is concatenated (arXiv:2112.10752, section 4.4)."""

    factor: int = 4  # of the enlargement; at f = factor the small image has the latents' size
    degradation: Literal["bicubic", "bsr"] = "bicubic"  # how the small image is made; bsr: random blurs, noise, JPEG
    drop_probability: float = 0.0  # share of images that are shown without their small image


@dataclass(frozen=True)
class InpaintingConditioningConfig:
    """Inpainting: the latents of the masked image and the mask are concatenated (arXiv:2112.10752, section 4.5)."""

    masks: Literal["thin", "medium", "thick", "mixed"] = "mixed"  # irregular strokes and boxes, of LaMa's sizes
    drop_probability: float = 0.0  # share of images that are shown without picture and mask


@dataclass(frozen=True)
class ConditioningConfig:
    """What the model is conditioned on: any of these together; a section that is null is absent."""

    text: TextConditioningConfig | None = None
    frozen_text: FrozenTextConditioningConfig | None = None
    classes: ClassConditioningConfig | None = None
    layout: LayoutConditioningConfig | None = None
    semantic_map: SemanticMapConditioningConfig | None = None
    low_resolution: LowResolutionConditioningConfig | None = None
    inpainting: InpaintingConditioningConfig | None = None

    @property
    def annotations(self) -> frozenset[str]:
        """What is read beside picture, caption and class: "layout", "map"; "text": contexts that a cache may hold."""
        wanted = {"layout": self.layout, "map": self.semantic_map, "text": self.frozen_text}
        return frozenset(name for name, section in wanted.items() if section is not None)

    @property
    def needs_pictures(self) -> bool:
        """Whether something is made of the pictures themselves, which a latent cache does not hold."""
        return self.low_resolution is not None or self.inpainting is not None


@dataclass(frozen=True)
class ClassifierConfig:
    """Classifier of noised latents whose gradient guides sampling (arXiv:2105.05233, section 4).

    Its body is the way down and the middle of a UNet of the section `unet`, with attention `self`.
    """

    num_classes: int = 1000  # classes of the data
    pool_head_dim: int = 64  # width of a head of the attention that pools the last features


@dataclass(frozen=True)
class DiffusionConfig:
    """Forward process and objective (arXiv:2112.10752, eq. 1 to 3 and appendix B)."""

    # What the network's output means: the noise, v, the clean latents (each over discrete timesteps), EDM's
    # preconditioned residual (arXiv:2206.00364) or the velocity of a rectified flow (arXiv:2209.03003).
    prediction: Literal["eps", "v", "x0", "edm", "flow"] = "eps"
    num_timesteps: int = 1000  # eps, v, x0: T; flow: the network is told num_timesteps * t
    schedule: Literal["linear", "cosine"] = "linear"  # of eps, v and x0; linear: the paper's, in sqrt(beta)
    beta_start: float = 0.00085  # linear: beta of the first timestep
    beta_end: float = 0.012  # linear: beta of the last timestep
    zero_terminal_snr: bool = False  # v, x0: the last timestep is noise alone (arXiv:2305.08891)
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"  # of training times; edm: log-normal sigma
    logit_mean: float = 0.0  # logit_normal: mean of logit(t / T) (arXiv:2403.03206); positive = noisier
    logit_std: float = 1.0  # logit_normal: deviation of logit(t / T)
    stratified_times: bool = False  # times of one global batch spread evenly (arXiv:2107.00630, appendix I)
    noise_offset: float = 0.0  # standard deviation of a constant per image and channel that is added to the noise
    loss: Literal["l2", "l1"] = "l2"  # squared or absolute error of the network's output
    # Of images by noise level; all but none give noise without signal the weight 0.
    weighting: Literal["none", "min_snr", "soft_min_snr", "p2"] = "none"
    snr_gamma: float = 5.0  # min_snr (arXiv:2303.09556), soft_min_snr (arXiv:2401.11605): where the SNR is capped
    p2_gamma: float = 1.0  # p2 (arXiv:2204.00227): exponent; 0 = no weighting
    p2_k: float = 1.0  # p2: added to the SNR
    # edm: P_mean, the mean of ln(sigma) in training, in units of the latents' deviation, which is 1. The paper's -1.2
    # is for data of deviation 0.5: plus ln 2.
    sigma_log_mean: float = -0.5
    sigma_log_std: float = 1.2  # edm: P_std, the deviation of ln(sigma) in training
    sigma_data: float = 1.0  # edm: deviation of the latents that the preconditioning assumes
    sigma_min: float = 0.002  # edm: sampling ends here before its last step, to 0
    sigma_max: float = 80.0  # edm: sampling begins here
    rho: float = 7.0  # edm: sampling's steps are shorter near sigma_min the larger it is


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are prepared."""

    # Path of a manifest.json written by `ldm-scale prepare`; or shards without one, a name or pattern that ends in .tar
    manifest: str = ""
    split: str = "train"  # split of the manifest to train on
    validation_split: str = "heldout"  # a split of the same manifest; "" = validate on the training split
    resolution: int = 256  # pixels along each side after cropping and resizing
    crop_scale_min: float = (
        1.0  # smallest side of the random square crop, as a share of the image's; 1 = no random crop
    )
    horizontal_flip: bool = False  # mirror half of the images, drawn anew in every epoch
    num_workers: int = 1  # loader processes per rank; 0 = a thread of the training process
    prefetch_batches: int = 4  # micro-batches that are made ahead
    # Places of the epoch that are read side by side (data/order.py). A rank holds about lanes / ranks * block_chunks *
    # chunk_samples samples.
    lanes: int = 64
    chunk_samples: int = 32  # neighbours in a shard that are read together; fewer for small data sets
    block_chunks: int = 32  # chunks among which a lane permutes the samples
    read_ahead_batches: int = 4  # remote shards: micro-batches that are fetched before they are needed
    fetch_threads: int = 8  # remote shards: requests at a time of a loader process
    cache_dir: str = ""  # remote shards: folder on a local disk of the node that keeps what was read; "" = none
    cache_gib: float = 64.0  # at most so much of cache_dir
    max_consecutive_bad: int = 20  # more unusable samples than this in a row stop the run
    max_bad_share_of_shard: float = 0.2  # more unusable samples of a shard than this take it out of the run
    max_bad_share: float = 0.05  # more unusable ones among the images seen stop the run


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of the networks that are trained (the discriminator has the same with its own lr)."""

    lr: float = 1.0e-4  # peak rate; never scaled by batch or ranks behind the user's back
    betas: tuple[float, float] = (0.9, 0.999)  # decay per step of the averages of gradient and squared gradient
    eps: float = 1.0e-8  # added to the root of the averaged squared gradient
    weight_decay: float = 0.01  # decoupled, times lr (arXiv:1711.05101)
    warmup_images: int = 0  # images over which the rate rises linearly from 0
    decay: Literal["constant", "cosine"] = "constant"  # after the warm-up; cosine reaches 0 at train.total_images
    gradient_clip: float | None = 1.0  # largest global norm of the gradient; null = not clipped


@dataclass(frozen=True)
class EmaConfig:
    """Moving averages of the trained weights, kept sharded like the optimizer's masters: 4 bytes a parameter each.

    The first (the exponential one, or else the first profile) is what validation, pictures and products show.
    """

    half_life_images: float = 500_000.0  # images after which a weight's share has halved; 0: no exponential average
    warmup_ratio: float = 0.05  # the half-life is at most this share of the images seen so far; 0 = no such bound
    # Power-function profiles (arXiv:2312.02696) by their widths, relative standard deviations such as [0.05, 0.1]. Each
    # weighs the whole run, so none can be added later; two or more, snapshot now and then, stand for all others.
    power_stds: tuple[float, ...] = ()
    snapshot_every_images: int = 0  # images between snapshots of the profiles, all of them kept; 0 = none
    snapshot_dtype: Literal["fp32", "fp16"] = "fp16"  # of the files in run_dir/snapshots


@dataclass(frozen=True)
class ZeroConfig:
    """DeepSpeed ZeRO: what is divided among the ranks."""

    stage: int = 1  # 0 nothing, 1 optimizer states, 2 + gradients, 3 + parameters
    discriminator_stage: int = 0  # 0 or 1 (stage 3 cannot switch the discriminator's gradients off)
    bucket_elements: int = 50_000_000  # elements per all-reduce, reduce-scatter and all-gather bucket
    overlap_comm: bool = True  # communicate while gradients are still computed; CUDA only, on CPU it is off
    # Stage 3: parameters beyond these are given back right after their use and gathered again for the backward pass.
    # DeepSpeed's default keeps networks of up to a billion parameters whole on every rank from use to use.
    live_elements: int = 1_000_000_000
    # For networks that do not fit otherwise, at the price of copies between GPU and CPU in every step.
    offload_optimizer: bool = False  # stages 1 to 3: masters and Adam's moments lie, and step, in the CPU's memory
    offload_parameters: bool = False  # stage 3: so do the parameters that are not being computed with


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation the fused operations take (kernels/README.md).

    auto is Triton where it pays and plain torch elsewhere, CPUs included; every other name is taken, or refused with
    the reason.
    """

    group_norm_silu: Literal["auto", "triton", "reference"] = "auto"  # GroupNorm and SiLU of residual blocks
    attention: Literal["auto", "triton", "sdpa", "xformers", "reference"] = "auto"  # sdpa: torch's own fused attention
    geglu: Literal["auto", "triton", "reference"] = "auto"  # gate of the transformer's feed-forward layers
    ema_update: Literal["auto", "triton", "reference"] = "auto"  # the averages of the weights
    vector_quantize: Literal["auto", "triton", "reference"] = "auto"  # search of the nearest code


@dataclass(frozen=True)
class TrainConfig:
    """Length, batch arithmetic, cadence. Everything counts images, over all ranks."""

    total_images: int = 1_000_000  # images seen when the run ends
    global_batch: int = 64  # images per optimizer step over all ranks
    micro_batch: int | None = None  # images per rank and forward pass; null = global_batch / ranks
    seed: int = 0  # of everything that is drawn: initial weights, order of the data, noise, times
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where there is any
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 on CPU
    # What is computed again in backward instead of being kept, for memory; no loss changes. selective: blocks with
    # attention and those of the finest level, which keep the most; full: all blocks; budget: the blocks that free the
    # most bytes per FLOP, until the planned peak is below memory_budget_gib (stage 2 and classifiers).
    activation_checkpointing: Recomputation = "none"
    # GiB that `ldm-scale plan` may count for a rank's device under activation_checkpointing=budget; the framework's own
    # half to one comes on top. null = no budget.
    memory_budget_gib: float | None = None
    # blocks: residual and attention blocks of the UNet through torch.compile, one graph a kind and shape, made in the
    # first step (seconds each); stage 2 and classifiers. Needs a C++ compiler.
    compile: Literal["none", "blocks"] = "none"
    # The UNet's forward and backward pass recorded once and replayed: CUDA, one rank, zero.stage=0, one resolution.
    cuda_graphs: bool = False
    log_every_images: int = 1_000  # between two lines of metrics.jsonl and points in TensorBoard
    validate_every_images: int = 50_000  # between two validations; 0 = only at the end
    sample_every_images: int = 50_000  # between two picture grids in TensorBoard; 0 = only at the end
    checkpoint_every_images: int = 50_000  # between two checkpoints; 0 = only by the clock and at the end
    checkpoint_every_s: float = 1_800.0  # longest training between two checkpoints; 0 = off
    keep_checkpoints: int = 2  # newest checkpoints that stay; older ones go once a new one was read back
    # Figure that tells the best checkpoint: of validation, such as validation/ema/mean, or of an evaluation, such as
    # evaluation/frechet. The best one stays beside the newest until a better one is written; null = none is told.
    best_metric: str | None = None
    best_is: Literal["lowest", "highest"] = "lowest"  # which values of best_metric are better
    patience_images: int = 0  # images after the best figure at which the run ends early; 0 = it does not
    async_checkpoints: bool = True  # checkpoints are written beside training, from a copy in host memory
    # Images between comparisons of the ranks' weights, averages, buffers and batches; 0 = only before the first step.
    check_ranks_every_images: int = 50_000
    max_skipped_steps: int = 10  # so many skipped steps in a row stop the run: what is wrong does not pass


@dataclass(frozen=True)
class SpikesConfig:
    """Steps whose loss stands out from the accepted steps before, by median and MAD of the loss's logarithm.

    Stage 2 compares each image's loss with what its level of noise usually gives.
    """

    # log: the step is made all the same. skip: it is not. rollback: the run goes back to the weights of the last
    # checkpoint that fell due by train.checkpoint_every_images, of which the newest is kept for it, and passes over the
    # images between. A step that is not finite is skipped in any case.
    action: Literal["log", "skip", "rollback"] = "log"
    factor: float = 8.0  # robust standard deviations above the median from which a step is a spike
    window_steps: int = 128  # accepted steps that are compared with; nothing is judged before half of them


@dataclass(frozen=True)
class WatchdogConfig:
    """How long ranks may take. A rank that takes longer ends the run, named, with the status that asks for a restart.

    A step that follows something else has both times together: its kernels are compiled, or other ranks are still at
    what was before.
    """

    step_s: float = 300.0  # longest step, the wait for its data included; 0 = steps are not watched
    other_s: float = 1_500.0  # longest of anything else: start, validation, save, product; 0 = not watched
    rendezvous_s: float = 120.0  # longest wait at the start until the last of the ranks has come


@dataclass(frozen=True)
class BatchPlan:
    """The global batch divided among this run's ranks: global_batch = micro_batch x accumulation_steps x ranks."""

    micro_batch: int  # images per rank and forward pass
    accumulation_steps: int  # forward passes per optimizer step
    global_batch: int  # images per optimizer step over all ranks


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of sampling, in the training loop and of `ldm-scale sample`."""

    # ddim, ddpm, plms: eps, v and x0. euler, heun: edm and flow. dpmpp_2m (DPM-Solver++), dpmpp_2m_sde: all.
    sampler: Literal["ddim", "ddpm", "plms", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun"] = "ddim"
    num_steps: int = 50  # evaluations of the network; heun: twice as many less one, plms: one more
    eta: float = 0.0  # DDIM's stochasticity (arXiv:2010.02502, eq. 16); 1 = DDPM-like
    guidance_scale: float = 3.0  # 1 = no guidance (arXiv:2207.12598)
    guidance_rescale: float = 0.0  # phi: share of the guided output's deviation that is set back (arXiv:2305.08891)
    # Noise levels sigma / alpha, above the first and up to the second, that are guided (arXiv:2404.07724); null = all.
    guidance_interval: tuple[float, float] | None = None
    prompts: tuple[str, ...] = ()  # fixed captions of the training loop's grid; [] = the first ones of the data


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation of checkpoints while training goes on: what `ldm-scale evaluate` measures of them, in its files.

    Samples are made as `sampling` says; reconstructions are judged by autoencoder_loss's perceptual network.
    """

    # Images between two evaluations, for each of which a checkpoint is written; one more is at the end; 0 = none.
    every_images: int = 0
    manifest: str = ""  # of the images that are measured; "" = data.manifest
    split: str = ""  # of it; "" = data.validation_split
    num_images: int | None = None  # the first so many of its order; null = all
    batch: int = 16  # images at once on each rank; changes no figure
    weights: str | None = None  # which are measured: raw, ema or ema=STD; null = the first average, or raw
    features: Literal["efficientnet_lite0", "inception_v3"] = "efficientnet_lite0"  # of Frechet and other distances
    features_weights: str | None = None  # file of FID's Inception, for inception_v3; null = in the usual cache
    clip_model: str | None = None  # OpenCLIP's name of the judge of captions; null = ViT-B-32
    clip_weights: str | None = None  # for the CLIP score: a file, or OpenCLIP's name of cached weights; null = none
    seed: int = 0  # of the first sample, and of masks and small images


@dataclass(frozen=True)
class Config:
    """One run: everything that determines it."""

    experiment: str = ""  # its name, filled in by experiment=NAME
    stage: Stage = "autoencoder"  # what is trained: the first stage, the second, or a classifier that guides it
    run_dir: str = ""  # where checkpoints, TensorBoard and artifact go; default runs/<experiment>
    artifact: str = ""  # stage 2: folder of the autoencoder artifact that defines its latent space
    # Folder of a trained model whose weights the run begins with: artifact, run, checkpoint or export; "" = random
    # ones. It also gives the networks, unless single keys say otherwise. A run that has a checkpoint ignores it.
    init: str = ""
    init_weights: str | None = None  # of init, where it has several: raw, ema or ema=STD; null = its first average
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    autoencoder_loss: AutoencoderLossConfig = field(default_factory=AutoencoderLossConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
