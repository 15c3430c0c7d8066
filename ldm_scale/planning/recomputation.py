"""Which blocks compute again in backward, so that a step fits a budget of memory at the least extra work.

Every block of a UNet gives some bytes back when what lies inside it is not kept, and costs its forward FLOPs once more.
Both are counted on the meta device. Blocks are taken by bytes per FLOP, the most first, until the peak of a whole
backward pass, counted again with just these blocks, is below what the budget leaves. The sums of the blocks alone would
not do: while a block is computed again, its inside is there in full.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm_scale.config.schema import Config, Recomputation
from ldm_scale.errors import ConfigError
from ldm_scale.models.unet import UNetEncoder
from ldm_scale.planning.activations import as_on_a_gpu, make_network, peak_of, step_of
from ldm_scale.planning.live_bytes import LiveBytes

GIB = 2**30


class MetaPass:
    """Forward and backward pass of what stage 2 or the classifier trains, on the meta device: run as often as asked."""

    def __init__(
        self,
        config: Config,
        micro_batch: int,
        latent_shape: tuple[int, int, int],
        dtype: torch.dtype,
        bucket_elements: int,
        fused: bool = False,
    ) -> None:
        self._network, self._arguments = make_network(config, micro_batch, latent_shape, dtype, "none")
        self._bucket_elements, self.fused = bucket_elements, fused
        (self.unet,) = (module for module in self._network.modules() if isinstance(module, UNetEncoder))

    def forward(self, recomputed: Recomputation | Set[str]) -> Tensor:
        """The output, with everything that its backward pass needs kept as `recomputed` says."""
        self.unet.checkpoint_activations = recomputed
        return self._network(*self._arguments)  # type: ignore[no-any-return]

    def backward_peak(self, recomputed: Recomputation | Set[str]) -> int:
        """Most bytes beside weights and optimizer at once."""
        self.unet.checkpoint_activations = recomputed
        return peak_of(step_of(self._network, self._arguments), self._bucket_elements, self.fused)


@dataclass(frozen=True)
class BlockCost:
    """What recomputing a block gives and takes."""

    name: str
    freed_bytes: int
    flops: int

    @property
    def worth(self) -> float:
        """Bytes per FLOP."""
        return self.freed_bytes / max(1, self.flops)


@dataclass(frozen=True)
class Choice:
    """Blocks that are recomputed, and the bytes of the backward pass with them."""

    blocks: frozenset[str]
    backward_peak: int


def within_budget(meta: MetaPass, budget_gib: float, others: int, updating: int) -> Choice:
    """The blocks to recompute. Units: bytes, except budget_gib.

    `others` is what the device holds in a backward pass beside activations and gradients, `updating` what it holds at
    the peak of the optimizer's step.

    Raises: ConfigError if the budget is too small for every choice.
    """
    budget = int(budget_gib * GIB)
    if updating > budget:
        raise ConfigError(
            f"train.memory_budget_gib={budget_gib:g}: the optimizer's step alone takes {updating / GIB:.2f} GiB, which "
            "recomputing activations does not change; set zero.stage higher, use more ranks, or raise the budget"
        )
    room = budget - others
    order = [cost.name for cost in sorted(block_costs(meta), key=lambda cost: cost.worth, reverse=True)]
    peaks: dict[int, int] = {}

    def fits(count: int) -> bool:
        peaks[count] = meta.backward_peak(frozenset(order[:count]))
        return peaks[count] <= room

    if not fits(0):
        if not fits(len(order)):
            raise ConfigError(
                f"train.memory_budget_gib={budget_gib:g}: with every block recomputed the plan still comes to "
                f"{(others + peaks[len(order)]) / GIB:.2f} GiB; set a smaller train.micro_batch, a higher zero.stage, "
                "or a larger budget"
            )
        # The peak falls with the number of blocks, nearly: whatever this ends at was counted and fits.
        too_few, enough = 0, len(order)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if fits(middle):
                enough = middle
            else:
                too_few = middle
    else:
        enough = 0
    return Choice(frozenset(order[:enough]), peaks[enough])


def recomputed_words(blocks: Recomputation | Set[str], budget_gib: float | None) -> str:
    """One line that says what a budget has chosen."""
    assert not isinstance(blocks, str), "chosen by a budget"
    assert budget_gib is not None, "chosen by a budget"
    listed = f"{len(blocks)} blocks are recomputed: {', '.join(sorted(blocks))}" if blocks else "nothing is recomputed"
    return f"train.memory_budget_gib={budget_gib:g}: {listed}"


def block_costs(meta: MetaPass) -> list[BlockCost]:
    """Every block of the UNet, in the order in which they run."""
    kept = _growth_by_block(meta, "none")
    left = _growth_by_block(meta, "full")
    flops: dict[str, int] = {}
    counter = FlopCounterMode(display=False)
    # Attention is written out here, so that its products are seen.
    with _around_blocks(meta, flops, counter.get_total_flops), counter, torch.no_grad():
        meta.forward("none")
    return [BlockCost(name, kept[name] - left[name], flops[name]) for name in kept]


def _growth_by_block(meta: MetaPass, recomputed: Recomputation) -> dict[str, int]:
    """Bytes that live after each block and did not before it."""
    growth: dict[str, int] = {}
    with as_on_a_gpu(meta.fused), LiveBytes("meta") as live, _around_blocks(meta, growth, lambda: live.now):
        meta.forward(recomputed)
    return growth


def _around_blocks(
    meta: MetaPass, found: dict[str, int], measure: Callable[[], int]
) -> mock._patch[Callable[..., Tensor]]:
    """A context in which every block's change of `measure` is put down under its name."""
    compute = meta.unet._compute

    def observed(name: str, run: Callable[..., Tensor], large: bool, *inputs: Tensor) -> Tensor:
        before = measure()
        output = compute(name, run, large, *inputs)
        found[name] = measure() - before
        return output

    return mock.patch.object(meta.unet, "_compute", observed)
