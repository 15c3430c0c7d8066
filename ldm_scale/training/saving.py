"""When a run writes its checkpoints, and what it does when one cannot be written.

A checkpoint falls due by images and by the clock, and again soon after one that failed, with growing pauses: a full
disk or a folder that is read-only for a while does not end a run, and does not leave it without a checkpoint until the
next interval either. With train.async_checkpoints a thread writes it while training goes on (`background_save`). What
the ranks' clocks and threads say differs, so it rides on the trainer's per-step reduction (`flags`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config
from ldm_scale.engine import collectives, phases
from ldm_scale.engine.background_save import BackgroundSave, HostMemory
from ldm_scale.engine.checkpoint import Spares, Trained, remove_older, save_checkpoint, start_save
from ldm_scale.engine.snapshots import remove_snapshots_beyond, save_snapshot
from ldm_scale.engine.weights import SNAPSHOTS
from ldm_scale.errors import CheckpointError, LdmScaleError
from ldm_scale.planning.checkpoint_interval import best_interval_s, mean_time_between_failures_s
from ldm_scale.telemetry.log import get_logger
from ldm_scale.training.rollback import is_target
from ldm_scale.training.state import TrainingState

FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 600.0  # after a save that failed; each is twice the one before
LAST_PAUSES_S = (1.0, 5.0)  # where the run can only wait: at its end, or asked to stop


class Saving:
    """The checkpoints of a run. Collective: all ranks call the methods that say so, after the same steps."""

    def __init__(self, config: Config, root: Path, rank: int) -> None:
        self._config, self._root, self._rank = config, root, rank
        self._snapshots = Path(config.run_dir) / SNAPSHOTS
        self._log = get_logger(rank)
        self._pending: BackgroundSave | None = None
        self._memory = HostMemory()
        self._saved_images = -1
        self._last_s = time.monotonic()
        self._retry_s: float | None = None
        self._pause_s = FIRST_PAUSE_S
        self._is_overdue = self._is_at_rest = False  # as the ranks agreed
        self._still_s = 0.0  # that training stood still for the save begun last
        self._has_advised = False

    def resumed_at(self, state: TrainingState) -> None:
        """Nothing; the run stands where its checkpoint of this state was written, which has been read whole.

        Only now may older ones go that earlier attempts left: a hurried save removes none.
        """
        self._saved_images = state.cur_images
        if self._rank == 0:
            keep = self._config.train.keep_checkpoints
            remove_older(self._root, state.cur_images, keep, self._spares(state))

    def flags(self) -> tuple[float, float]:
        """What this rank has to say: whether the clock asks for a save, whether its thread is at work."""
        now_s, every_s = time.monotonic(), self._config.train.checkpoint_every_s
        overdue = every_s > 0 and now_s - self._last_s > every_s
        overdue |= self._retry_s is not None and now_s >= self._retry_s
        return float(overdue), float(self._pending is not None and self._pending.is_working)

    def agree(self, overdue: float, working: float) -> None:
        """Nothing; takes the flags as averaged over the ranks."""
        self._is_overdue, self._is_at_rest = overdue > 0, working == 0

    def is_due(self, by_images: bool) -> bool:
        """Whether a checkpoint is to be written now; the same on all ranks."""
        return by_images or self._is_overdue

    def settle(self) -> None:
        """Nothing; takes a save further whose threads have all done their part. Collective: all ranks."""
        if self._pending is not None and self._is_at_rest:
            phases.enter("save")
            begun_s = time.monotonic()
            self._advance_pending()
            self._still_s += time.monotonic() - begun_s
            self._advise()

    def save(self, trained: Mapping[str, Trained], state: TrainingState) -> None:
        """Nothing; writes a checkpoint, or begins to. A run that cannot goes on. Collective: all ranks."""
        phases.enter("save")
        self.complete()  # two saves never overlap
        images = state.cur_images
        if self._saved_images == images:
            return
        self._last_s, self._retry_s = time.monotonic(), None
        begun_s = time.monotonic()
        try:
            if self._config.train.async_checkpoints:
                values = state.to_dict(), config_to_dict(self._config)
                keep = self._config.train.keep_checkpoints
                self._pending = start_save(
                    self._root, images, trained, *values, keep, self._memory, self._spares(state)
                )
            else:
                self._write(trained, state)
        except CheckpointError as error:
            self._failed(error)
        self._still_s = time.monotonic() - begun_s
        self._advise()

    @contextmanager
    def completing(self) -> Iterator[None]:
        """Inside, all ranks raise the same errors, which end the run only after a save that was begun is complete.

        A rank that fails alone must not come here: the others would not answer it.
        """
        try:
            yield
        except LdmScaleError:
            self.complete()
            raise

    def complete(self) -> None:
        """Nothing; no save is pending: the newest checkpoint is the one that was begun last. Collective: all ranks."""
        if self._pending is not None:
            phases.enter("save")
        while self._pending is not None:
            self._advance_pending()

    def save_last(self, trained: Mapping[str, Trained], state: TrainingState, hurried: bool) -> None:
        """Nothing; a checkpoint of this very step is on the disk. Hurried: whoever stops the run may not wait long.

        Raises: CheckpointError on all ranks if it cannot be written, after a few attempts.
        Collective: all ranks.
        """
        phases.enter("save")
        self.complete()
        for pause_s in (*LAST_PAUSES_S, None):
            if self._saved_images == state.cur_images:
                return
            try:
                self._write(trained, state, hurried)
            except CheckpointError as error:
                if pause_s is None:
                    newest = f"of {self._saved_images} images" if self._saved_images >= 0 else "not there"
                    raise CheckpointError(
                        f"the run ends at {state.cur_images} images without a checkpoint of them: {error}; the newest "
                        f"is {newest}, the same command continues from it"
                    ) from error
                self._log.error(f"{error}; once more in {pause_s:g} s")
                time.sleep(pause_s)

    def save_stopped(self, trained: Mapping[str, Trained], state: TrainingState, comes_back: bool) -> bool:
        """Whether a checkpoint of this very step is on the disk; if not, a run that comes back has an older one.

        Raises: CheckpointError on all ranks if neither is so. Collective: all ranks.
        """
        try:
            self.save_last(trained, state, hurried=True)
        except CheckpointError as error:
            if not comes_back or self._saved_images < 0:
                raise
            self._log.error(f"{error}; images {self._saved_images} to {state.cur_images - 1} have to be seen again")
            return False
        return True

    def snapshot(self, trained: Mapping[str, Trained], state: TrainingState) -> None:
        """Writes the averages of power-function profiles; a run without one of its snapshots goes on.

        Collective: all ranks.
        """
        phases.enter("save")
        try:
            save_snapshot(self._snapshots, state.cur_images, trained, self._config.ema, config_to_dict(self._config))
        except CheckpointError as error:
            self._log.error(f"{error}; training goes on")

    def forget_later_snapshots(self, state: TrainingState) -> None:
        """Removes snapshots that a killed run took beyond its last checkpoint: the run passes there once more."""
        if self._rank == 0 and (removed := remove_snapshots_beyond(self._snapshots, state.cur_images)):
            self._log.info(f"removed {removed} snapshots of more than {state.cur_images} images")

    def _write(self, trained: Mapping[str, Trained], state: TrainingState, hurried: bool = False) -> None:
        values = state.to_dict(), config_to_dict(self._config)
        keep = None if hurried else self._config.train.keep_checkpoints
        save_checkpoint(self._root, state.cur_images, trained, *values, keep, self._spares(state))
        self._succeeded(state.cur_images)
        self._last_s = time.monotonic()

    def _spares(self, state: TrainingState) -> Spares:
        """What stays beside the newest: where a rollback leads, and the best one that is there."""
        best = frozenset(images for images, _ in state.best)
        return partial(is_target, self._config), best.__contains__

    def _advance_pending(self) -> None:
        pending = self._pending
        assert pending is not None, "nothing is pending"
        try:
            if pending.advance() is None:
                return
        except CheckpointError as error:
            self._failed(error)
        else:
            self._succeeded(pending.images)
        self._pending = None

    def _succeeded(self, images: int) -> None:
        self._saved_images = images
        self._retry_s, self._pause_s = None, FIRST_PAUSE_S

    def _advise(self) -> None:
        """Nothing; says once, after the first save, what saves cost and how often they are worth it."""
        if self._has_advised or self._pending is not None or self._retry_s is not None:
            return
        self._has_advised = True
        ranks = collectives.world_size()
        mtbf_s = mean_time_between_failures_s(ranks)
        self._log.info(
            f"a checkpoint holds training up for {self._still_s:.2g} s; if devices fail as Llama 3's did, {ranks} of "
            f"them run {mtbf_s / 3600:,.0f} h between failures, and train.checkpoint_every_s="
            f"{best_interval_s(self._still_s, mtbf_s):.0f} loses the least time (given: "
            f"{self._config.train.checkpoint_every_s:.0f})"
        )

    def _failed(self, error: CheckpointError) -> None:
        self._log.error(f"{error}; training goes on, the next attempt is in at most {self._pause_s:.0f} s")
        self._retry_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
