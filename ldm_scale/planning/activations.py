"""Bytes of a backward pass, by running it on the meta device: activations, gradients, and the bucket that is reduced.

Nothing is computed and nothing allocated, so a change of a network, or recomputation, changes the count by itself.
Gradients are let go as ZeRO does, when a bucket is full, after a moment in which the bucket lies side by side for the
reduction. Operations are the plain ones; fused kernels keep less.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ldm_scale.conditioning.base import Inputs
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import Config
from ldm_scale.models.classifier import LatentClassifier
from ldm_scale.planning.live_bytes import LiveBytes


def backward_peak(
    config: Config, micro_batch: int, latent_shape: tuple[int, int, int], dtype: torch.dtype, bucket_elements: int
) -> int:
    """Most bytes beside weights and optimizer at once, of a forward and backward pass of stage 2 or the classifier."""
    recomputed = config.train.activation_checkpointing
    with torch.device("meta"):
        z = torch.empty(micro_batch, *latent_shape, dtype=dtype)
        t = torch.zeros(micro_batch, dtype=torch.int64)
        if config.stage == "classifier":
            classifier = LatentClassifier(config.unet, config.classifier, latent_shape[0])
            classifier.body.checkpoint_activations = recomputed
            network: nn.Module = classifier.to(dtype)
            arguments: tuple[Tensor | Inputs, ...] = (z, t)
        else:
            model = LatentDiffusion(config.unet, config.conditioning, latent_shape[0])
            model.unet.checkpoint_activations = recomputed
            network = model.to(dtype)
            parts = model.conditioner.conditions.items()
            inputs = {name: part.example(micro_batch, latent_shape[1:]) for name, part in parts}
            arguments = (z, t, {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()})
    bucket = _Bucket(bucket_elements)
    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(bucket.add)  # type: ignore[no-untyped-call]
    # On the meta device torch would write attention out, with a matrix of tokens by tokens that no device keeps.
    with mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention), LiveBytes("meta") as live:
        network(*arguments).float().square().mean().backward()
        bucket.reduce()
    return int(live.peak)


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """What every device's own attention keeps for backward: inputs, output and a number a row."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
        q, k, v, scale=options.get("scale")
    )[0]


class _Bucket:
    """Gradients until they are reduced."""

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._held: list[Tensor] = []
        self._count = 0

    def add(self, parameter: Tensor) -> None:
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
