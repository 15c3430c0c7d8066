"""A configuration as the work of one rank: its recorded step, what runs frozen before it, and what is read for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from dataclasses import dataclass, field

import torch

from ldm_scale.conditioning.open_clip_models import text_tower_size
from ldm_scale.config.schema import BatchPlan, Config, Recomputation
from ldm_scale.errors import ConfigError
from ldm_scale.models.build import build_autoencoder
from ldm_scale.planning.activations import takes_fused
from ldm_scale.planning.cluster import Cluster
from ldm_scale.planning.memory import (
    FP32,
    STAGE_0_BUCKET,
    MemoryPlan,
    NetworkSizes,
    blocks_to_recompute,
    network_sizes,
    plan_memory,
)
from ldm_scale.planning.stage_1 import has_adversary
from ldm_scale.planning.step_time import Job, Precision, Rival
from ldm_scale.planning.trace import Amount, Operation, Trace, trace_forward, trace_step

# benchmarks/README.md, "loader": one core of an Intel Xeon makes 280 images/s of 512 px JPEGs of 90 kB ready, and
# 22,241 cached latents/s of 8x32x32.
DECODED_PER_S = 280.0 * 512**2  # pixels
LATENTS_PER_S = 22_241.0 * 8 * 32 * 32 * 2  # bytes
JPEG_BYTES = 90_000 / 512**2  # of a pixel


@dataclass
class Workload:
    """A configuration, recorded once for every micro-batch, number of ranks and ZeRO stage that is asked about."""

    config: Config
    latent_shape: tuple[int, int, int]
    precision: Precision
    cached: bool  # latents, and contexts of a frozen text encoder, come from a cache
    fused: bool = True  # Triton's kernels, where the configuration does not forbid them
    sizes: NetworkSizes = field(default_factory=list)
    _traces: dict[Recomputation | Set[str], Trace] = field(default_factory=dict)
    _frozen: tuple[tuple[str, Trace], ...] | None = None

    def __post_init__(self) -> None:
        if self.config.stage == "autoencoder" and self.config.autoencoder.kind == "identity":
            raise ConfigError(
                "autoencoder.kind=identity with --gpu: pixels are taken as they are, and no stage 1 is trained; leave "
                "--gpu out, or name an experiment of stage 2"
            )
        if self.config.stage == "autoencoder" and self.cached:
            raise ConfigError(
                "--cached with stage=autoencoder: a cache holds latents, and stage 1 trains on images; leave it out"
            )
        self.fused = self.fused and takes_fused(self.config.kernels)
        self.sizes = network_sizes(self.config, self.latent_shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def parameters(self) -> int:
        """That are trained, without a discriminator's."""
        return sum(self.sizes[0][1])

    @property
    def rival(self) -> Rival | None:
        """Stage 1's discriminator, if the run comes to feel it."""
        if self.config.stage != "autoencoder" or not has_adversary(self.config):
            return None
        stage, sizes, _ = self.sizes[1]
        return Rival(sum(sizes), stage)

    @property
    def averages(self) -> int:
        """Of the weights."""
        return len(self.config.ema.power_stds) + (self.config.ema.half_life_images > 0)

    def configured(self, plan: BatchPlan, ranks: int) -> Recomputation | Set[str]:
        """What the configuration recomputes; a budget's blocks are those that a run on such GPUs takes.

        Raises: ConfigError if the budget is too small.
        """
        return blocks_to_recompute(self._on_gpus(self.config.zero.stage), plan, ranks, self.latent_shape)

    def _on_gpus(self, stage: int) -> Config:
        """The configuration, whatever it says of the device, with that stage of ZeRO and precision."""
        train = dataclasses.replace(self.config.train, precision=self.precision)
        if train.device == "cpu":
            train = dataclasses.replace(train, device="auto")
        return dataclasses.replace(self.config, zero=dataclasses.replace(self.config.zero, stage=stage), train=train)

    def trace(self, recomputed: Recomputation | Set[str]) -> Trace:
        """The recorded step."""
        if recomputed not in self._traces:
            self._traces[recomputed] = trace_step(self.config, self.latent_shape, self.dtype, self.fused, recomputed)
        return self._traces[recomputed]

    def frozen(self) -> tuple[tuple[str, Trace], ...]:
        """What runs before each micro-batch because it is not cached."""
        if self._frozen is None:
            traces = []
            if self.config.stage != "autoencoder" and not self.cached and self.config.autoencoder.kind != "identity":
                traces.append(("first stage", _encoder(self.config, self.dtype, self.fused)))
            text = self.config.conditioning.frozen_text
            if not self.cached and text is not None and self.config.stage == "diffusion":
                layers, width = text_tower_size(text.model)
                compute_bytes = 2 if self.precision == "bf16" else 4
                layers -= text.layer == "penultimate"
                traces.append(("text encoder", transformer_trace(layers, width, text.max_tokens, compute_bytes)))
            self._frozen = tuple(traces)
        return self._frozen

    def memory(self, plan: BatchPlan, ranks: int, stage: int, recomputed: Recomputation | Set[str]) -> MemoryPlan:
        """What a rank holds. `stage` is not the discriminator's, which keeps its own."""
        compute = 2 if self.precision == "bf16" else FP32
        peak = self.trace(recomputed).peak(plan.micro_batch, compute, bucket_elements(self.config, stage))
        encoding = [trace.peak(plan.micro_batch, compute, 0) for _, trace in self.frozen() if trace.moments]
        peak = max([peak, *encoding])  # images are encoded before anything is kept for a backward pass
        (_, sizes, is_averaged), *rest = self.sizes
        networks: NetworkSizes = [(stage, sizes, is_averaged), *rest]
        found = plan_memory(self._on_gpus(stage), plan, ranks, self.latent_shape, peak, networks)
        found.recomputed = recomputed
        return found

    def job(self, plan: BatchPlan, stage: int, recomputed: Recomputation | Set[str]) -> Job:
        """The work of a rank in a step."""
        workers = max(self.config.data.num_workers, 1)
        read_bytes, loading_s = self._reading()
        return Job(
            trace=self.trace(recomputed),
            precision=self.precision,
            parameters=self.parameters,
            stage=stage,
            micro_batch=plan.micro_batch,
            accumulation_steps=plan.accumulation_steps,
            frozen=self.frozen(),
            averages=self.averages,
            bucket_elements=bucket_elements(self.config, stage),
            live_elements=self.config.zero.live_elements,
            overlaps=self.config.zero.overlap_comm and stage > 0,
            loading_s=loading_s / workers,
            read_bytes=read_bytes,
            rival=self.rival,
        )

    def _reading(self) -> tuple[float, float]:
        """Bytes that an image takes from the storage, and seconds of a core until it is ready."""
        if not self.cached:
            pixels = self.config.data.resolution**2
            return JPEG_BYTES * pixels, pixels / DECODED_PER_S
        channels, height, width = self.latent_shape
        moments = 2 if self.config.autoencoder.kind == "kl" else 1
        num_bytes = 2.0 * moments * channels * height * width  # float16
        text = self.config.conditioning.frozen_text
        if text is not None:
            num_bytes += 2.0 * text.max_tokens * text.width
        return num_bytes, num_bytes / LATENTS_PER_S


def bucket_elements(config: Config, stage: int) -> int:
    """Elements of a reduction."""
    return STAGE_0_BUCKET if stage == 0 else config.zero.bucket_elements


def ranks_of(cluster: Cluster, config: Config) -> int:
    """The ranks of a run that takes the whole cluster, one a GPU.

    Raises: ConfigError if the global batch does not divide by them.
    """
    ranks = cluster.num_gpus
    if config.train.global_batch % ranks:
        per_rank = max(config.train.global_batch // ranks, 1)
        raise ConfigError(
            f"train.global_batch={config.train.global_batch} does not divide by the {ranks} GPUs of --nodes "
            f"{cluster.num_nodes} x --gpus-per-node {cluster.gpus_per_node}; set train.global_batch="
            f"{per_rank * ranks}, or take another number of GPUs"
        )
    return ranks


def transformer_trace(layers: int, width: int, tokens: int, compute_bytes: int) -> Trace:
    """The forward pass of a text tower, from its sizes: matrix products of every layer, attention, and four passes over
    the tokens that norms, sums and the activation take.
    """
    token_bytes = compute_bytes * tokens * width
    products = ((3, 1), (1, 1), (4, 1), (1, 4))  # outputs and inputs in widths: q, k and v; out; up; down
    events: list[Operation] = []
    for _ in range(layers):
        for out, into in products:
            weights = compute_bytes * out * into * width**2
            flops = 2.0 * tokens * out * into * width**2
            moved = Amount(weights, float((out + into) * token_bytes))
            events.append(Operation("product", "forward", Amount(0, flops), moved))
        attention = Amount(0, 4.0 * tokens**2 * width)
        events.append(Operation("attention", "forward", attention, Amount(0, 4.0 * token_bytes)))
        events += [
            Operation("other", "forward", Amount(0, 0), Amount(0, factor * token_bytes)) for factor in (2, 3, 8, 5)
        ]
    return Trace(tuple(events))


def _encoder(config: Config, dtype: torch.dtype, fused: bool) -> Trace:
    with torch.device("meta"):
        autoencoder = build_autoencoder(config.autoencoder).to(dtype)
    resolution = config.data.resolution

    def encode(images: int) -> object:
        return autoencoder.encode_moments(torch.empty(images, 3, resolution, resolution, dtype=dtype, device="meta"))

    return trace_forward(encode, fused)
