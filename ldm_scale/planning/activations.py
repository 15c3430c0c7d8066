"""Bytes of a backward pass, by running it on the meta device: activations, gradients, and the bucket that is reduced.

Nothing is computed and nothing allocated, so a change of a network, or recomputation, changes the count by itself.
Gradients are let go as ZeRO does, when a bucket is full, after a moment in which the bucket lies side by side for the
reduction. Operations are the plain ones unless fused kernels are asked for, which keep less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_kernels.common import tuning
from ldm_scale.conditioning.base import Inputs
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import Config, KernelsConfig, Recomputation
from ldm_scale.models.classifier import LatentClassifier
from ldm_scale.planning.live_bytes import LiveBytes
from ldm_scale.planning.meta_step import MetaStep, Phase
from ldm_scale.planning.stage_1 import autoencoder_step

Arguments = tuple[Tensor | Inputs, ...]  # of a forward pass


def backward_peak(
    config: Config,
    micro_batch: int,
    latent_shape: tuple[int, int, int],
    dtype: torch.dtype,
    bucket_elements: int,
    fused: bool = False,
) -> int:
    """Most bytes beside weights and optimizer at once, of a micro-batch of either stage or of a classifier."""
    step = make_step(config, micro_batch, latent_shape, dtype, config.train.activation_checkpointing)
    return peak_of(step, bucket_elements, fused)


def peak_of(step: MetaStep, bucket_elements: int, fused: bool = False) -> int:
    """`backward_peak` of a micro-batch as it is; may be asked again."""
    live, bucket = LiveBytes("meta"), _Bucket(bucket_elements)
    run_step(step, fused, live, bucket.add, on_end=bucket.reduce)
    return int(live.peak)


def run_step(
    step: MetaStep,
    fused: bool,
    watcher: TorchDispatchMode,
    on_gradient: Callable[[nn.Parameter], None],
    on_phase: Callable[[Phase], None] = lambda phase: None,
    on_end: Callable[[], None] = lambda: None,
) -> None:
    """Nothing, after a micro-batch on the meta device that `watcher` saw.

    `fused`: what Triton's kernels do and keep, in place of plain operations. `on_gradient` hears of each parameter once
    its gradient is whole, `on_phase` of every phase but the first when it begins.
    """
    hooks = [
        parameter.register_post_accumulate_grad_hook(on_gradient)  # type: ignore[no-untyped-call]
        for parameter in step.network.parameters()
    ]
    with as_on_a_gpu(fused), watcher:
        step.run(on_phase)
        on_end()
    for hook in hooks:
        hook.remove()


def make_step(
    config: Config,
    micro_batch: int,
    latent_shape: tuple[int, int, int],
    dtype: torch.dtype,
    recomputed: Recomputation | Set[str],
) -> MetaStep:
    """What is trained, and a micro-batch through it, on the meta device; recomputed: see `UNet`."""
    if config.stage == "autoencoder":
        assert isinstance(recomputed, str), "validated: a budget chooses blocks of a UNet"
        return autoencoder_step(config, micro_batch, dtype, recomputed)
    network, arguments = make_network(config, micro_batch, latent_shape, dtype, recomputed)
    return step_of(network, arguments)


def step_of(network: nn.Module, arguments: Arguments) -> MetaStep:
    """A loss of what the network returns, and its backward pass."""

    def run(begins: Callable[[Phase], None]) -> None:
        loss = network(*arguments).float().square().mean()
        begins("backward")
        torch.autograd.backward(loss)

    return MetaStep(network, run)


def make_network(
    config: Config,
    micro_batch: int,
    latent_shape: tuple[int, int, int],
    dtype: torch.dtype,
    recomputed: Recomputation | Set[str],
) -> tuple[nn.Module, Arguments]:
    """What stage 2 or the classifier trains, and its inputs, on the meta device."""
    with torch.device("meta"):
        z = torch.empty(micro_batch, *latent_shape, dtype=dtype)
        t = torch.zeros(micro_batch, dtype=torch.int64)
        if config.stage == "classifier":
            classifier = LatentClassifier(config.unet, config.classifier, latent_shape[0])
            classifier.body.checkpoint_activations = recomputed
            return classifier.to(dtype), (z, t)
        model = LatentDiffusion(config.unet, config.conditioning, latent_shape[0])
        model.unet.checkpoint_activations = recomputed
        parts = model.conditioner.conditions.items()
        inputs = {name: part.example(micro_batch, latent_shape[1:]) for name, part in parts}
        whole = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        return model.to(dtype), (z, t, whole)


def takes_fused(kernels: KernelsConfig) -> bool:
    """Whether a GPU computes GroupNorm and GEGLU, which keep most beside attention, by Triton's kernels."""
    return "reference" not in (kernels.group_norm_silu, kernels.geglu)


@contextmanager
def as_on_a_gpu(fused: bool) -> Iterator[None]:
    """Operations of meta tensors take the path that a GPU takes; `fused`: with Triton's kernels.

    On the meta device torch would write attention out, with a matrix of tokens by tokens that no device keeps.
    """
    with (
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(tuning, "require_kernels"),
    ):
        if not fused:
            yield
            return
        with mock.patch.object(tuning, "serves", lambda tensor: tensor.is_meta):
            yield


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """What every device's own attention keeps for backward: inputs, output and a number a row."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
        q, k, v, scale=options.get("scale")
    )[0]


class _Bucket:
    """Gradients until they are reduced."""

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._held: list[nn.Parameter] = []
        self._count = 0

    def add(self, parameter: nn.Parameter) -> None:
        if self._count + parameter.numel() > self._elements:
            self.reduce()
        self._held.append(parameter)
        self._count += parameter.numel()

    def reduce(self) -> None:
        if self._held:
            torch.cat([parameter.grad.flatten() for parameter in self._held if parameter.grad is not None])
        for parameter in self._held:
            parameter.grad = None
        self._held.clear()
        self._count = 0
