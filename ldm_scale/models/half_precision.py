"""Whether an autoencoder may run in float16: the largest value that it computes on real images, and where.

float16 ends at 65504, and decoders are known to train past it without anybody noticing, because float32 and bfloat16
hold such values (the published SDXL autoencoder does). The probe looks at every place where a float16 network would
round a value to float16; a value above half of that range, on any image, makes the network unsafe.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ldm_scale.models.attention import ImageSelfAttention
from ldm_scale.models.autoencoder import Autoencoder
from ldm_scale.models.blocks import ResidualBlock
from ldm_scale.models.fused import Attention, GroupNorm

FP16_MAX = 65504.0
MARGIN = 2.0  # other images than the probed ones reach further
TOLERANCE = 0.02  # of the norm, between what float16 and the weights' own type compute
NOT_FINITE = torch.finfo(torch.float32).max  # stands for infinity and NaN, which JSON does not have
SCORES_AT_ONCE = 2**24  # elements of the attention's scores that are held at a time


@dataclass(frozen=True)
class HalfPrecisionProbe:
    """What `probe_half_precision` found; artifacts store it."""

    fp16_safe: bool
    max_activation: float  # the largest absolute value; float32's largest if one was not finite
    module: str  # where it was
    num_images: int
    margin: float = MARGIN  # safe: max_activation < 65504 / margin
    fp16_difference: float | None = None  # of float16's output, as a share of the norm; None = float16 was not run


def probe_half_precision(network: Autoencoder, batches: Iterable[Tensor]) -> HalfPrecisionProbe:
    """The largest value anywhere in encoding and decoding the modes of real images, and whether float16 holds it.

    The network computes in its own type: float32, or bfloat16, which has the same range. On a CUDA device whose
    weights are whole (not ZeRO stage 3) a float16 copy must also give the same output; on the CPU, where float16
    convolutions are slow, only the range is probed.
    Collective: where forward is (ZeRO stage 3), with as many batches on every rank; `merge` makes one of the ranks'.
    Shapes: every batch (B, 3, H, W).
    """
    record = _Record()
    half = _half_copy(network)
    difference: Tensor | None = None
    num_images = 0
    parameter = next(network.parameters(), None)
    with torch.no_grad(), _recording(network, record):
        for images in batches:
            x = images if parameter is None else images.to(parameter.device, parameter.dtype)
            num_images += len(x)
            if not len(x):
                continue
            record.note("pixels", x)
            mean, logvar = network.encode_moments(x)
            pixels = network.decode_raw(mean)
            if half is not None:
                expected = [part for part in (mean, logvar, pixels) if part is not None]
                codes = mean if network.quantizer is None else network.quantizer(mean)[0]
                found = _worst_difference(half, x, codes, expected)
                difference = found if difference is None else torch.maximum(difference, found)
    largest, module = record.largest()
    return _judged(largest, module, num_images, None if difference is None else _finite(difference))


def merge(a: HalfPrecisionProbe, b: HalfPrecisionProbe) -> HalfPrecisionProbe:
    """The probe of both sets of images together."""
    larger = a if a.max_activation >= b.max_activation else b
    differences = [probe.fp16_difference for probe in (a, b) if probe.fp16_difference is not None]
    return _judged(
        larger.max_activation,
        larger.module,
        a.num_images + b.num_images,
        max(differences) if differences else None,
        max(a.margin, b.margin),
    )


@dataclass
class _Record:
    """Largest absolute value by place, kept as tensors so that a GPU is not waited for."""

    largest_by_place: dict[str, Tensor] = field(default_factory=dict)

    def note(self, place: str, values: Tensor) -> None:
        low, high = torch.aminmax(values.detach())
        found = torch.maximum(-low, high).float()  # NaN stays NaN
        before = self.largest_by_place.get(place)
        self.largest_by_place[place] = found if before is None else torch.maximum(before, found)

    def largest(self) -> tuple[float, str]:
        """Of places that are equal, the first that runs: where the trouble begins."""
        values = {place: _finite(value) for place, value in self.largest_by_place.items()}
        place = max(values, key=values.__getitem__, default="")
        return values.get(place, 0.0), place


@contextmanager
def _recording(network: Autoencoder, record: _Record) -> Iterator[None]:
    """Notes what the network's modules compute, and leaves no hook behind."""
    handles = []
    try:
        for name, module in network.named_modules():
            if isinstance(module, GroupNorm):
                # Before the module runs: ZeRO stage 3 has released its bias afterwards.
                handles.append(module.register_forward_pre_hook(functools.partial(_note_norm_input, record, name)))
            if isinstance(module, Attention):
                handles.append(module.register_forward_pre_hook(functools.partial(_note_scores, record, name)))
            if isinstance(module, nn.Conv2d | nn.Linear | GroupNorm | Attention | ResidualBlock | ImageSelfAttention):
                handles.append(module.register_forward_hook(functools.partial(_note_output, record, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_output(record: _Record, name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    record.note(name, output)


def _note_norm_input(record: _Record, name: str, module: GroupNorm, inputs: tuple[Tensor, ...]) -> None:
    """A norm may add the bias of the convolution in front before anything else."""
    if module.channel_bias is not None:
        record.note(f"{name} (input)", inputs[0] + module.channel_bias[:, None, None])


def _note_scores(record: _Record, name: str, module: Attention, inputs: tuple[Tensor, ...]) -> None:
    """q k^T / sqrt(head_dim): every implementation that may run here scales before it rounds."""
    q, k = inputs[:2]
    queries_at_once = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    for part in torch.split(q, queries_at_once, dim=2):
        record.note(f"{name} (scores)", (part * q.shape[-1] ** -0.5) @ k.transpose(-1, -2))


def _judged(
    largest: float, module: str, num_images: int, difference: float | None, margin: float = MARGIN
) -> HalfPrecisionProbe:
    safe = num_images > 0 and largest < FP16_MAX / margin and (difference is None or difference <= TOLERANCE)
    return HalfPrecisionProbe(safe, largest, module, num_images, margin, difference)


def _finite(value: Tensor) -> float:
    number = value.item()
    return number if number <= NOT_FINITE else NOT_FINITE  # NaN is not <= anything


def _half_copy(network: Autoencoder) -> Autoencoder | None:
    """The network in float16, where the device computes float16 fast and this process holds all weights."""
    parameter = next(network.parameters(), None)
    if parameter is None or parameter.device.type != "cuda":
        return None
    with torch.device("meta"):
        half = Autoencoder(network.config)
    expected, found = half.state_dict(), network.state_dict()
    if any(name not in found or found[name].shape != tensor.shape for name, tensor in expected.items()):
        return None
    half.load_state_dict({name: found[name].to(torch.float16) for name in expected}, assign=True)
    return half.requires_grad_(False).eval()


def _worst_difference(half: Autoencoder, x: Tensor, codes: Tensor, expected: list[Tensor]) -> Tensor:
    """Largest |float16 - expected| / |expected| of the moments and the pixels; latents of VQ are put on codes before.

    Codes stay themselves when they are rounded; latents halfway between two codes might change sides.
    Shapes: returns ().
    """
    found = [part for part in half.encode_moments(x.half()) if part is not None] + [half.decode_raw(codes.half())]
    ratios = [
        (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-12) for a, b in zip(found, expected, strict=True)
    ]
    return torch.stack(ratios).max()
