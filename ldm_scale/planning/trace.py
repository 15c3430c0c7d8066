"""A training step as a list of what it does, in order, recorded on the meta device: operations and finished gradients.

Two passes with different numbers of images give each operation's FLOPs and bytes as a fixed part and one per image, so
that one recording tells the step of any micro-batch. The same recording knows what lives at each moment: its peak is
the memory of activations and gradients of any micro-batch.

Bytes are those of an operation's inputs and outputs, each once; views move nothing. Operations are those that torch is
called with, so that what only a compiler would fuse is several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ldm_scale.config.schema import Config, Recomputation
from ldm_scale.planning.activations import as_on_a_gpu, make_step, run_step
from ldm_scale.planning.live_bytes import LiveBytes
from ldm_scale.planning.meta_step import Phase

Kind = Literal["convolution", "product", "attention", "other"]

IMAGES = (2, 4)  # of the two passes; with 1, torch would see other strides
# Attention's backward pass makes the scores again: five matrix products for the forward pass's two (arXiv:2307.08691).
_ATTENTION_BACKWARD = 2.5
# Our group norm reads its inputs twice, for the statistics and for the result: three passes for two, five for three.
_NORM_PASSES = {"group_norm_silu_fwd": 3 / 2, "group_norm_silu_bwd": 5 / 3}
_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "detach", "lift_fresh")


@dataclass(frozen=True)
class Amount:
    """A number that grows with the images of a micro-batch: fixed + per_image * images."""

    fixed: float
    per_image: float

    def of(self, images: int) -> float:
        """The number for so many images."""
        return self.fixed + self.per_image * images


@dataclass(frozen=True)
class Operation:
    """One kernel's work. Units: FLOPs, and bytes read and written."""

    kind: Kind
    phase: Phase
    flops: Amount
    bytes: Amount
    wide: bool = False  # in fp32 whatever the network computes in


@dataclass(frozen=True)
class Gradient:
    """The gradient of a parameter of so many elements is whole."""

    elements: int


@dataclass(frozen=True)
class Moment:
    """Bytes that live beside weights, states and finished gradients; and the gradient that has just become whole."""

    live: Amount
    elements: int = 0
    copied: int = 0  # of the elements, those that are not contiguous, which are copied before a bucket is put together


@dataclass(frozen=True)
class Trace:
    """What a micro-batch does, in order."""

    events: tuple[Operation | Gradient, ...]
    moments: tuple[Moment, ...] = ()

    @property
    def operations(self) -> list[Operation]:
        """Without the gradients' events."""
        return [event for event in self.events if isinstance(event, Operation)]

    def flops(self, images: int) -> float:
        """FLOPs of all operations, recomputed ones twice."""
        return sum(operation.flops.of(images) for operation in self.operations)

    def peak(self, images: int, compute_bytes: int, bucket_elements: int) -> int:
        """Most bytes that live at once, beside weights and states; gradients stay until their bucket is reduced.

        The same as `activations.backward_peak`, for any number of images.
        """
        held, copied, peak = 0, 0, 0.0
        for moment in self.moments:
            live = moment.live.of(images)
            if moment.elements:
                if held + moment.elements > bucket_elements:
                    peak = max(peak, live + compute_bytes * (2 * held + copied + moment.elements))
                    held, copied = 0, 0
                held, copied = held + moment.elements, copied + moment.copied
            peak = max(peak, live + compute_bytes * held)
        return math.ceil(max(peak, self.moments[-1].live.of(images) + compute_bytes * (2 * held + copied)))


def trace_step(
    config: Config,
    latent_shape: tuple[int, int, int],
    dtype: torch.dtype,
    fused: bool,
    recomputed: Recomputation | Set[str] | None = None,
) -> Trace:
    """A micro-batch of what is trained; `recomputed` in place of train.activation_checkpointing."""
    recomputed = config.train.activation_checkpointing if recomputed is None else recomputed
    recorders = []
    for images in IMAGES:
        recorder = _Recorder()
        step = make_step(config, images, latent_shape, dtype, recomputed)
        run_step(step, fused, recorder, recorder.gradient_is_whole, recorder.begins, recorder.ends)
        recorders.append(recorder)
    return _joined(*recorders)


def trace_forward(run: Callable[[int], object], fused: bool) -> Trace:
    """The operations of `run(images)`, which computes on the meta device and needs no gradients."""
    recorders = []
    for images in IMAGES:
        recorder = _Recorder()
        with torch.no_grad(), as_on_a_gpu(fused), recorder:
            run(images)
        recorders.append(recorder)
    return _joined(*recorders)


@dataclass
class _Seen:
    """What was seen of an operation with one number of images."""

    kind: Kind
    phase: Phase
    flops: float
    bytes: float
    wide: bool


class _Recorder(LiveBytes):  # type: ignore[no-untyped-call]
    """Writes down every operation that passes, beside counting what lives."""

    def __init__(self) -> None:
        super().__init__("meta")
        self.phase: Phase = "forward"
        self.events: list[_Seen | Gradient] = []
        self.moments: list[tuple[int, int, int]] = []  # bytes that live; elements of a gradient, and copied ones

    def begins(self, phase: Phase) -> None:
        """Nothing; what follows belongs to that phase."""
        self.phase = phase

    def ends(self) -> None:
        """Nothing; what lives now lies beside the last bucket."""
        self.moments.append((self.now, 0, 0))

    def gradient_is_whole(self, parameter: nn.Parameter) -> None:
        """Nothing; the gradient is counted by whoever holds it until it is reduced, and no longer here."""
        assert parameter.grad is not None
        elements, live = parameter.numel(), self.now - parameter.grad.untyped_storage().nbytes()
        self.events.append(Gradient(elements))
        self.moments.append((live, elements, 0 if parameter.grad.is_contiguous() else elements))
        parameter.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reset_peak()
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.moments.append((self.peak, 0, 0))
        name = func._schema.name.split("::")[-1]
        if not func.is_view and name not in _FREE:
            self.events.append(self._seen(func, name, args, kwargs or {}, result))
        return result

    def _seen(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> _Seen:
        kind, flops = _flops(func, name, args, kwargs, result)
        leaves = tree_leaves((args, kwargs, result))
        tensors = {id(x): x for x in leaves if isinstance(x, torch.Tensor) and x.is_meta}
        moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors.values())
        results = [x.dtype for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        wide = bool(results) and results[0] == torch.float32
        return _Seen(kind, self.phase, flops, moved * _NORM_PASSES.get(name, 1.0), wide)


def _flops(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> tuple[Kind, float]:
    """What an operation is, and its FLOPs."""
    if "attention" in name:
        backward = "backward" in name or name.endswith("_bwd")
        query, key, value = args[1:4] if backward else args[:3]
        images, heads, queries, width = query.shape
        flops = 2 * images * heads * queries * key.shape[2] * (width + value.shape[3])
        return "attention", flops * (_ATTENTION_BACKWARD if backward else 1.0)
    count = flop_registry.get(func.overloadpacket)
    if count is None:
        return "other", 0.0
    return "convolution" if "conv" in name else "product", float(count(*args, **kwargs, out_val=result))


def _joined(few: _Recorder, many: _Recorder) -> Trace:
    """Fixed and per-image parts, from the same operations of both passes."""
    assert len(few.events) == len(many.events), "the operations of a step do not depend on the number of images"
    difference = IMAGES[1] - IMAGES[0]

    def amount(a: float, b: float) -> Amount:
        per_image = (b - a) / difference
        return Amount(a - per_image * IMAGES[0], per_image)

    events: list[Operation | Gradient] = []
    for a, b in zip(few.events, many.events, strict=True):
        if isinstance(a, Gradient):
            events.append(a)
        else:
            assert isinstance(b, _Seen), "the same order of operations and gradients"
            events.append(Operation(a.kind, a.phase, amount(a.flops, b.flops), amount(a.bytes, b.bytes), a.wide))
    moments = [Moment(amount(a, b), *n) for (a, *n), (b, *_) in zip(few.moments, many.moments, strict=True)]
    return Trace(tuple(events), tuple(moments))
