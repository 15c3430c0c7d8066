"""When a run's checkpoints are evaluated, and what becomes of the figures.

An evaluation may take long, so it is of a checkpoint that was written for it: what ends a run meanwhile costs nothing,
and the next start goes on with what was not measured. One that fails is told, and training goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from ldm_scale.config.fit import EVALUATION, judges_evaluation
from ldm_scale.config.schema import Config
from ldm_scale.engine import collectives, phases
from ldm_scale.engine.agreement import EXPECTED
from ldm_scale.engine.preemption import Stop, StopAsked, StopRequest
from ldm_scale.engine.rank_files import folder_of
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.tensorboard import ScalarWriter
from ldm_scale.training import best, resumption
from ldm_scale.training.saving import Saving
from ldm_scale.training.state import TrainingState


class Evaluator(Protocol):
    """What measures checkpoints. Collective: all ranks."""

    def __call__(self, checkpoint: Path, between: Callable[[], object]) -> dict[str, float]:
        """A checkpoint's figures by name, equal on all ranks; `between` is called between blocks of images, on all."""
        ...

    def known(self, checkpoint: Path) -> dict[str, float]:
        """Those that were measured before; {} if there are none."""
        ...


class Measuring:
    """The evaluations of a run; without an `evaluator` there are none."""

    def __init__(
        self, config: Config, evaluator: Evaluator | None, saving: Saving, checkpoints: Path, rank: int
    ) -> None:
        self._config, self._evaluator, self._saving = config, evaluator, saving
        self._checkpoints, self._is_main = checkpoints, rank == 0
        self._log = get_logger(rank)

    def owes(self, state: TrainingState, falls_due: bool) -> bool:
        """Whether the checkpoint of this very step is still to be measured."""
        return self._evaluator is not None and falls_due and state.measured_images != state.cur_images

    def recall(self, state: TrainingState) -> None:
        """Nothing; the state knows what was found of the checkpoint that it comes from, which was measured after it.

        Collective: all ranks.
        """
        if self._evaluator is not None and judges_evaluation(self._config.train) and state.cur_images:
            figures = self._evaluator.known(folder_of(self._checkpoints, state.cur_images))
            best.judge(figures, state, self._config, is_evaluation=True)

    def measure(self, writer: ScalarWriter, state: TrainingState, stop: StopRequest) -> Stop:
        """What any of the ranks was asked for meanwhile, which breaks the evaluation off; NONE once it is made.

        Raises: ConfigError if train.best_metric names no figure of it. Collective: all ranks.
        """
        assert self._evaluator is not None, "asked whether it owes one"
        images = state.cur_images
        path = folder_of(self._checkpoints, images)
        self._saving.complete()

        def between() -> None:
            phases.enter("evaluate")
            stop.check()

        figures: dict[str, float] = {}
        if collectives.broadcast_object(path.is_dir()):
            try:
                figures = self._evaluator(path, between)
            except StopAsked:
                return max(collectives.gather_objects(stop.kind))  # type: ignore[no-any-return]
            except EXPECTED as error:
                self._log.error(f"the evaluation at {images} images failed: {error}; training goes on without it")
        else:
            self._log.error(f"{path} could not be written and is not evaluated; training goes on")
        if not resumption.has_figures(self._config, images, EVALUATION, self._is_main):
            writer.add_scalars(figures, images)
        best.judge(figures, state, self._config, is_evaluation=True)
        state.measured_images = images
        return Stop.NONE
