"""Steps whose loss stands out, by a rule that outliers cannot move.

What is judged is the logarithm of a step's loss against median and MAD (median absolute deviation) of the accepted
steps before it. A diffusion loss spreads over a factor of a hundred with the level of noise. So that a batch which drew
hard levels is no spike, each image's loss is first divided by what its level usually gives. All of it works on sums
over the ranks, so that all of them decide alike, and what it remembers is part of the run's state.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from ldm_scale.config.schema import SpikesConfig

NUM_LEVELS = 16  # of noise, equally often drawn
NORMAL_MAD = 1.4826  # standard deviations of a normal distribution in a MAD
LEAST_DEVIATION = 0.02  # of the logarithm: steps that are nearly alike would make any other step stand out


@dataclass
class SpikeHistory:
    """Accepted steps as later ones are compared with them."""

    logs: list[float] = field(default_factory=list)  # the window, oldest first
    sums: list[float] = field(default_factory=lambda: [0.0] * NUM_LEVELS)  # of losses by level of noise, fading
    counts: list[float] = field(default_factory=lambda: [0.0] * NUM_LEVELS)  # of images, fading alike
    in_a_row: int = 0  # spikes up to the last step


@dataclass(frozen=True)
class Spike:
    """How a step stands out."""

    times: float  # its loss over the median
    deviations: float  # of the logarithm, robust, above the median
    steps: int  # that it was compared with

    def __str__(self) -> str:
        return (
            f"a loss of {self.times:.3g} times the median of {self.steps} steps, {self.deviations:.1f} robust "
            "standard deviations above it"
        )


def level_sums(losses: Sequence[float], levels: Sequence[int]) -> list[float]:
    """Sums of images' losses by level of noise, then how many images those are; (2 NUM_LEVELS,)."""
    totals = [0.0] * (2 * NUM_LEVELS)
    for loss, level in zip(losses, levels, strict=True):
        totals[level] += loss
        totals[NUM_LEVELS + level] += 1.0
    return totals


def judge(config: SpikesConfig, history: SpikeHistory, loss: float, totals: Sequence[float]) -> Spike | None:
    """The spike that a step is, or None; the history takes in what is none.

    `loss` and `totals` (`level_sums` over all ranks, empty where there are no levels) are finite. Too many spikes in a
    row are the new course of the run and not spikes: after half a window of them the history begins anew.
    """
    log = _log(history, loss, totals)
    spike = None if log is None else _spike(config, history.logs, log)
    history.in_a_row = history.in_a_row + 1 if spike is not None else 0
    if spike is not None and history.in_a_row < config.window_steps // 2:
        return spike
    if spike is not None:
        history.logs.clear()
        history.in_a_row = 0
    if log is not None:
        history.logs.append(log)
        del history.logs[: -config.window_steps]
    keep = 1.0 - 1.0 / config.window_steps
    for level in range(len(totals) // 2):
        history.sums[level] = keep * history.sums[level] + totals[level]
        history.counts[level] = keep * history.counts[level] + totals[NUM_LEVELS + level]
    return spike


def _log(history: SpikeHistory, loss: float, totals: Sequence[float]) -> float | None:
    """Logarithm of the step's loss over what its levels of noise usually give; None where nothing is known of them."""
    if totals:
        known = [level for level in range(NUM_LEVELS) if history.sums[level] > 0.0 and totals[NUM_LEVELS + level] > 0.0]
        images = sum(totals[NUM_LEVELS + level] for level in known)
        usual = {level: history.sums[level] / history.counts[level] for level in known}
        loss = sum(totals[level] / usual[level] for level in known) / images if known else 0.0
    return math.log(loss) if loss > 0.0 else None


def _spike(config: SpikesConfig, logs: Sequence[float], log: float) -> Spike | None:
    if len(logs) < config.window_steps // 2:
        return None
    median = statistics.median(logs)
    spread = statistics.median(abs(other - median) for other in logs)
    deviations = (log - median) / max(NORMAL_MAD * spread, LEAST_DEVIATION)
    if deviations <= config.factor:
        return None
    return Spike(math.exp(min(log - median, 700.0)), deviations, len(logs))
