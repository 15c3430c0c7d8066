"""Steps that must not be made: judged before any optimizer moves, on all ranks alike, and written down.

A loss or a gradient that is not finite on one rank makes the step's means over the ranks so, which all of them have.
The step's images count as seen, and nothing else of it stays; `run_dir/skipped_steps.jsonl` keeps what it was made of,
for `ldm-scale replay`. A loss that only stands out (engine/spikes.py) is treated as the configuration says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_scale.config.schema import Config
from ldm_scale.data import Batch
from ldm_scale.engine import collectives
from ldm_scale.engine.spikes import NUM_LEVELS, judge
from ldm_scale.errors import NumericsError
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.side_files import RowFile, read_rows
from ldm_scale.training.diagnosis import gradient_history
from ldm_scale.training.state import TrainingState

SKIPPED_STEPS = "skipped_steps.jsonl"
GRADIENT, LEVEL = "gradient of ", "losses by level "  # of what a task observes beside its metrics
LOSSES = ("loss", "loss/reconstruction")  # the first that a task has is the one that is watched for spikes
LARGEST_SQUARE = 1e38  # of a gradient's norm; DeepSpeed sums the squares in float32
NAMED_KEYS = 8  # in the log


@dataclass(frozen=True)
class Trouble:
    """Why a step is not as it should be, the same on all ranks."""

    reason: str  # "not finite" or "spike"
    action: str  # "skip", "rollback", or "log": the step is made
    values: Mapping[str, float]  # the metrics that say so
    words: str
    norms: str  # what the gradients were like before, in words; may be empty

    @property
    def skips(self) -> bool:
        """Whether the step is not made."""
        return self.action != "log"


class StepGuard:
    """Judges the steps of a run and keeps the records of those in trouble."""

    def __init__(self, config: Config, state: TrainingState, rank: int) -> None:
        self._config, self._state, self._rank = config, state, rank
        self._file = RowFile(Path(config.run_dir) / SKIPPED_STEPS)
        if rank == 0:  # what an earlier attempt wrote beyond this point comes again
            self._file.cut(lambda record: bool(record["images"][0] < state.cur_images))

    def judge(self, means: dict[str, float], recent: Sequence[Mapping[str, float]]) -> Trouble | None:
        """What is wrong with a step of these means over the ranks; None if nothing is, and it is to be made.

        What only serves the judgement is taken out of `means`. `recent` are the means of the steps before.
        """
        squares = {name: means.pop(name) for name in list(means) if name.startswith(GRADIENT)}
        norms = {name: math.sqrt(x) if x < LARGEST_SQUARE else abs(x) * math.inf for name, x in squares.items()}
        ranks = collectives.world_size()
        levels = range(2 * NUM_LEVELS if f"{LEVEL}00" in means else 0)
        totals = [ranks * means.pop(f"{LEVEL}{i:02d}") for i in levels]
        trouble = self._trouble(means, norms, totals, [step["grad_norm"] for step in recent if "grad_norm" in step])
        if trouble is None or not trouble.skips:
            self._state.skipped_in_a_row = 0
        else:
            self._state.skipped += 1
            self._state.skipped_in_a_row += 1
        return trouble

    def record(
        self,
        trouble: Trouble,
        batches: Sequence[Batch],
        metrics: Mapping[str, Tensor],
        losses: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        """Nothing; the step that is about to end is in the log and in the file, with its images and who had what.

        `metrics` and `losses` (of the images, where the task has them) are this rank's.
        Raises: NumericsError on all ranks if this was one skipped step too many. Collective: all ranks.
        """
        own = [name for name, value in metrics.items() if not math.isfinite(float(value))]
        values = [loss for part, _ in losses for loss in part.tolist()]
        samples = _samples(batches, self._rank, values)
        names, samples_of_ranks = zip(*collectives.gather_objects((own, samples)), strict=True)
        ranks = {name: [rank for rank, found in enumerate(names) if name in found] for name in trouble.values}
        # A gradient has been averaged, and which rank keeps its part says nothing. Of metrics, some are averages too:
        # that on the fewest ranks tells whose images it was.
        telling = [found for name, found in ranks.items() if found and not name.startswith(GRADIENT)]
        guilty = min(telling, key=len, default=range(len(names)))
        involved = [sample for rank in guilty for sample in samples_of_ranks[rank]]
        involved.sort(key=lambda sample: sample["image"])
        state, batch = self._state, self._config.train.global_batch
        record = {
            "images": [state.cur_images, state.cur_images + batch],
            "step": state.step,
            "reason": trouble.reason,
            "action": trouble.action,
            "values": {name: _plain(value) for name, value in trouble.values.items()},
            "ranks": ranks,
            "samples": involved,
        }
        if self._rank == 0:
            self._file.append(record, durable=True)
        told = self._told(trouble, ranks, involved)
        if self._rank == 0:
            get_logger().warning(told)
        limit = self._config.train.max_skipped_steps
        if trouble.skips and state.skipped_in_a_row >= limit:
            raise NumericsError(
                f"{limit} steps in a row could not be made (train.max_skipped_steps={limit}), so it does not pass by "
                f"itself; the last: {told}. The weights are still those of before. Look at the images with `ldm-scale "
                f"replay {self._config.run_dir}`; if they are sound, continue from the last checkpoint with a smaller "
                "optimizer.lr or optimizer.gradient_clip, or train.precision=fp32; if the loss has only changed its "
                "level, with spikes.action=log"
            )

    def _trouble(
        self, means: Mapping[str, float], norms: Mapping[str, float], totals: Sequence[float], before: Sequence[float]
    ) -> Trouble | None:
        history = gradient_history(before)
        bad = {name: value for name, value in {**means, **norms}.items() if not math.isfinite(value)}
        if bad:
            words = "not finite: " + ", ".join(f"{name}={value}" for name, value in bad.items())
            return Trouble("not finite", "skip", bad, words, history)
        watched = next((name for name in LOSSES if name in means), None)
        spike = judge(self._config.spikes, self._state.spikes, means[watched], totals) if watched else None
        if watched is None or spike is None:
            return None
        return Trouble("spike", self._config.spikes.action, {watched: means[watched], **norms}, str(spike), history)

    def _told(self, trouble: Trouble, ranks: Mapping[str, Sequence[int]], samples: Sequence[dict[str, Any]]) -> str:
        """One line for people."""
        state, batch = self._state, self._config.train.global_batch
        where = f"step {state.step} (images {state.cur_images} to {state.cur_images + batch - 1})"
        done = {"log": "was made all the same", "skip": "is skipped", "rollback": "leads back to an earlier checkpoint"}
        found = [f"{name} on rank {', '.join(map(str, given))}" for name, given in ranks.items() if given]
        bad = [s for s in samples if isinstance(s["loss"], str)] or samples
        named = ", ".join(f"{s['key']} (image {s['image']})" for s in bad[:NAMED_KEYS])
        more = f" and {len(bad) - NAMED_KEYS} more" if len(bad) > NAMED_KEYS else ""
        details = "; ".join(part for part in (*found, trouble.norms) if part)
        said = f"{trouble.words} ({details})" if details else trouble.words
        return f"{where} {done[trouble.action]}: {said}; samples {named}{more}"


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The recorded steps of a run, oldest first; lines that are damaged or cut short are left out."""
    return read_rows(run_dir / SKIPPED_STEPS, lambda record: record["images"][0] < record["images"][1])


def _samples(batches: Sequence[Batch], rank: int, losses: Sequence[float]) -> list[dict[str, Any]]:
    numbers = [number for batch in batches for number in batch.image_numbers.tolist()]
    keys = [key for batch in batches for key in batch.keys]
    known = losses if len(losses) == len(keys) else [None] * len(keys)
    return [
        {"image": number, "key": key, "rank": rank, "loss": None if loss is None else _plain(loss)}
        for number, key, loss in zip(numbers, keys, known, strict=True)
    ]


def _plain(value: float) -> float | str:
    """The number, or the name of what JSON has no number for."""
    return value if math.isfinite(value) else str(value)
