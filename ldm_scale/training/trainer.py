"""The training loop: one order of events for all stages.

Per step: gradients of one global batch, one reduction of metrics over the ranks (with the request to stop riding on
it), judgement of the step by what came of that, then the update or none. Everything that happens now and then
(validation, pictures, checkpoints, comparison of the ranks) happens between steps, at image counts, on all ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ldm_scale import faults
from ldm_scale.config.convert import config_to_dict, flat_config
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Batch, Loader, open_manifest, open_unindexed
from ldm_scale.engine import collectives, phases, seeding
from ldm_scale.engine.checkpoint import load_checkpoint
from ldm_scale.engine.env import Environment
from ldm_scale.engine.health import RankBatch, check_ranks
from ldm_scale.engine.preemption import Stop, StopRequest
from ldm_scale.engine.rank_files import folder_of
from ldm_scale.engine.run_lock import RunLock
from ldm_scale.engine.stragglers import Stragglers
from ldm_scale.engine.tensor_file import file_crc32, replace_file
from ldm_scale.engine.verification import newest_verified
from ldm_scale.errors import Restart
from ldm_scale.models.fused import describe_kernels
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.tensorboard import ScalarWriter
from ldm_scale.telemetry.throughput import TrainProgress
from ldm_scale.training import best, resumption
from ldm_scale.training.account import Account
from ldm_scale.training.diagnosis import Finding
from ldm_scale.training.measuring import Evaluator, Measuring
from ldm_scale.training.rollback import roll_back
from ldm_scale.training.sample_losses import SampleLosses
from ldm_scale.training.saving import Saving
from ldm_scale.training.skipping import StepGuard
from ldm_scale.training.state import TrainingState
from ldm_scale.training.streams import training_loader
from ldm_scale.training.task import Task

RESULT = "result.json"
RECENT_STEPS = 200  # whose metrics a diagnosis looks at
SHOWN_LOSSES = ("loss", "loss/l1", "loss/discriminator", "accuracy")  # beside the bar; all others: in TensorBoard


class Trainer:
    """Runs a task from where its run directory stands to `train.total_images`.

    `checksum_of` may know files of the checkpoint that it continues from already (EarlyChecksums); `evaluator` measures
    checkpoints where evaluation.every_images asks for it.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        environment: Environment,
        checksum_of: Callable[[Path], int] = file_crc32,
        evaluator: Evaluator | None = None,
    ) -> None:
        self.config, self.task, self.environment = config, task, environment
        self.plan: BatchPlan = batch_plan(config, environment.world_size)
        self.run_dir = Path(config.run_dir)
        self.checkpoints = self.run_dir / "checkpoints"
        self._checksum_of = checksum_of
        unindexed = open_unindexed(config.data.manifest)
        dataset = open_manifest(config.data.manifest, config.data.split, False) if unindexed is None else unindexed
        self._validates = unindexed is None  # what is looked at again and again takes images that stay the same
        self._dataset, self._data_digest, self._num_samples = dataset, dataset.digest, dataset.num_samples
        self.state = TrainingState(
            data_digest=self._data_digest, autoencoder_hash=task.autoencoder_hash, labels=dataset.labels, init=task.init
        )
        task.labels = dataset.labels
        self.log = get_logger(environment.rank)
        self._best = best.BestRecord(self.run_dir, config.train, environment.is_main)
        self.saving = Saving(config, self.checkpoints, environment.rank)
        self.measuring = Measuring(config, evaluator, self.saving, self.checkpoints, environment.rank)
        self.account = Account(config, self.plan, environment)
        self._kernels_described = False
        self._ranks_compared = False
        self._stop = Stop.NONE  # what the ranks have agreed on
        self._waited_s = 0.0  # for data, in all
        self._stragglers = Stragglers(environment, config.zero.stage)
        self._recent: deque[dict[str, float]] = deque(maxlen=RECENT_STEPS)
        self._findings: list[Finding] | None = None  # of the last validation; None before it

    def run(self) -> bool:
        """Whether the run reached its end (False: it was asked to stop and has saved).

        Raises: Restart if it has a checkpoint and is to be started again. Collective: all ranks.
        """
        with RunLock(self.run_dir, self.environment.rank):
            finished = self._run()
        if self._stop is Stop.RESTART and not finished:
            raise Restart(f"{self.run_dir} stopped at {self.state.cur_images} images; start it again to continue")
        return finished

    def _run(self) -> bool:
        self._resume()
        self.saving.forget_later_snapshots(self.state)
        self.guard = StepGuard(self.config, self.state, self.environment.rank)
        if resumption.was_finished(self.run_dir / RESULT, self.state, self.config.train, self.environment.is_main):
            self.log.info(f"finished before, nothing to do; remove {self.run_dir / RESULT} to make the product again")
            return True
        with self.account.attempt(self.state):
            return self._attempt()

    def _attempt(self) -> bool:
        writer = ScalarWriter(self.run_dir, self.environment.is_main, self.state.cur_images or None)
        progress = TrainProgress(
            self.config.train.total_images, self.state.cur_images, self.environment.is_main, self.config.stage
        )
        writer.add_configuration(flat_config(self.config), self.task.headline)
        writer.add_charts(self.task.charts(), "losses")
        try:
            with StopRequest() as stop:
                loader = training_loader(self.config, self.plan, self.environment, self.state)
                self.losses = SampleLosses(
                    self.state.losses, self.run_dir, self._dataset, self.config.data, self.environment.is_main
                )
                with progress.paused(), self.task.evaluating():
                    if resumption.owes_evaluation(self.state, self.config, self.environment.is_main):
                        self._evaluate(writer)
                    if self.state.cur_images and self._measure(writer, stop):
                        return self._stopped(writer, stop)
                for batches in self._steps(loader):
                    if self._step(batches, loader, writer, progress, stop):
                        return self._stopped(writer, stop)
        finally:
            progress.close()
            writer.close()
        self.saving.save_last(self.task.trained, self.state, hurried=False)
        self._finish()
        return True

    def _stopped(self, writer: ScalarWriter, stop: StopRequest) -> bool:
        """False, after the run has saved what it can."""
        writer.flush()
        if self.saving.save_stopped(self.task.trained, self.state, self._stop is Stop.RESTART):
            self.log.info(
                f"stopped by {stop.signal_name or 'another rank'} at {self.state.cur_images} images; the same command "
                "continues there"
            )
        return False

    def _steps(self, loader: Loader) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each remaining step."""
        if self._at_end():
            return
        micro_batches = iter(loader)
        while not self._at_end():
            phases.enter("data", self.state.step)
            faults.reach("data.batch")
            yield list(itertools.islice(micro_batches, self.plan.accumulation_steps))

    def _step(
        self, batches: list[Batch], loader: Loader, writer: ScalarWriter, progress: TrainProgress, stop: StopRequest
    ) -> bool:
        """Makes one step and what falls due after it; returns whether the run shall stop."""
        if not self._ranks_compared or self._due(self.config.train.check_ranks_every_images):
            self._compare_ranks(batches)
        started = time.perf_counter()
        images = self.state.cur_images
        # Dropout draws from torch's own generator: other masks in each step and on each rank, the same when resumed.
        masks = seeding.stream(self.config.train.seed, f"dropout on rank {self.environment.rank}", self.state.step)
        torch.manual_seed(int(masks.integers(2**63)))
        cut_before = self.task.num_truncated
        phases.enter("forward")
        faults.reach("step.forward")
        metrics = self.task.accumulate(batches, images) | self.task.observations()
        bad = self.losses.named(batches)
        counts = (len(bad), self.task.num_truncated - cut_before)
        means, num_bad = self._reduce(metrics, stop.kind, counts)
        with self.saving.completing():
            if num_bad:
                self.losses.settle(bad, images, self.plan.global_batch, loader)
            phases.enter("update")
            faults.reach("step.update")
            trouble = self.guard.judge(means, self._recent)
            if trouble is not None:
                self.guard.record(trouble, batches, metrics, self.task.sample_losses)
        if trouble is None or not trouble.skips:
            means |= self.task.update(images)
            self._recent.append(means)
        else:
            self.task.discard()
            if trouble.action == "rollback":
                self.saving.complete()
                roll_back(self.checkpoints, self.state, self.task.trained, self.config)
        self.state.cur_images += self.plan.global_batch
        self.state.step += 1
        seconds = time.perf_counter() - started
        self.state.training_s += seconds
        self.account.step()
        between_ranks = self._stragglers.step(self.state.step, seconds)
        if not self._kernels_described:
            self._kernels_described = True
            self.log.info(f"fused operations took, in the first step: {describe_kernels()}")
            if self.task.compile_report is not None:
                self.log.info(str(self.task.compile_report))
        waited_s, self._waited_s = loader.waited_s - self._waited_s, loader.waited_s
        waiting = waited_s / (waited_s + seconds)
        shown = {name: value for name, value in means.items() if name in SHOWN_LOSSES} | {"data wait": waiting}
        progress.update(self.plan.global_batch, shown)
        if self._due(self.config.train.log_every_images):
            counted = {"bad_samples": float(self.state.losses.total), "truncated": float(self.state.truncated)}
            counted["skipped_steps"] = float(self.state.skipped)
            rate = {"images_per_s": self.plan.global_batch / seconds, "data_wait_share": waiting}
            writer.add_scalars(means | rate | self.account.figures() | counted, self.state.cur_images)
        if between_ranks:
            writer.add_scalars(between_ranks, self.state.cur_images)
        if self._due(self.config.ema.snapshot_every_images):
            self.saving.snapshot(self.task.trained, self.state)
        if self._stop and not self._at_end():
            return True
        with progress.paused(), self.task.evaluating():
            return self._now_and_then(writer, stop)

    def _now_and_then(self, writer: ScalarWriter, stop: StopRequest) -> bool:
        """Whether the run shall stop, after validation, pictures, a checkpoint and its evaluation where due."""
        is_best = self._evaluate(writer)
        self.saving.settle()
        by_images = is_best or self._is_measured() or self._due(self.config.train.checkpoint_every_images)
        if self.saving.is_due(by_images):
            writer.flush()  # a checkpoint never knows more than the figures
            self.saving.save(self.task.trained, self.state)
        if self._measure(writer, stop):
            return True
        self._best.update(self.state)
        return False

    def _is_measured(self) -> bool:
        return self.measuring.owes(self.state, self._due(self.config.evaluation.every_images) or self._at_end())

    def _measure(self, writer: ScalarWriter, stop: StopRequest) -> bool:
        """Whether the run was asked to stop before the evaluation that falls due was made."""
        if not self._is_measured():
            return False
        self._stop = self.measuring.measure(writer, self.state, stop)
        return self._stop is not Stop.NONE

    def _evaluate(self, writer: ScalarWriter) -> bool:
        """Whether this step is the best so far, after validation and pictures where they fall due."""
        is_best = False
        if self._validates and (self._due(self.config.train.validate_every_images) or self._at_end()):
            is_best = self._validate(writer)
        if self._validates and (self._due(self.config.train.sample_every_images) or self._at_end()):
            phases.enter("evaluate")
            for name, shown in self.task.pictures().items():
                writer.add_picture(name, shown.drawn(), self.state.cur_images, shown.captions)
        self.state.evaluated_images = self.state.cur_images
        return is_best

    def _validate(self, writer: ScalarWriter) -> bool:
        """Whether the figures are the best so far; their pictures, and findings, of which the log has each once."""
        phases.enter("evaluate")
        images = self.state.cur_images
        figures = self.task.validate(images)
        writer.add_scalars(figures, images)
        for name, curves in self.task.curves(figures).items():
            writer.add_curves(name, curves, images)
        known = {finding.name for finding in self._findings or ()}
        self._findings = self.task.findings(figures, self._recent, images)
        writer.add_text("diagnosis", "\n\n".join(map(str, self._findings)) or "nothing found", images)
        for finding in self._findings:
            if self.environment.is_main and finding.name not in known:  # the figures are the same on all ranks
                self.log.warning(f"diagnosis: {finding}")
        return best.judge(figures, self.state, self.config)

    def _compare_ranks(self, batches: list[Batch]) -> None:
        """Stops all ranks where one is not a replica of the others, or trains on the same images as another."""
        self._ranks_compared = True
        batch = RankBatch(
            [number for batch in batches for number in batch.image_numbers.tolist()],
            [key for batch in batches for key in batch.keys],
            max(1, self._num_samples),  # not known without a manifest: ranks may meet a sample in different passes
        )
        check_ranks(self.task.trained, batch, self.state.cur_images)

    def _reduce(self, metrics: dict[str, Tensor], stop: Stop, counts: tuple[int, int]) -> tuple[dict[str, float], int]:
        """Metrics averaged over the ranks and how many samples were bad; counts cuts, keeps requests to stop.

        One all-reduce for all of it.
        """
        phases.enter("reduce")
        faults.reach("step.reduce")
        names = sorted(metrics)
        values = [metrics[name].double().cpu() for name in names]
        flags = (stop == Stop.END, stop == Stop.RESTART, *counts, *self.saving.flags())
        values += [torch.tensor(float(value)).double() for value in flags]
        *means, ends, restarts, bad, cut, overdue, working = collectives.mean_over_ranks(
            torch.stack(values).to(self.environment.device)
        ).tolist()
        self.saving.agree(overdue, working)
        self.state.truncated += round(cut * self.environment.world_size)
        self._stop = Stop.RESTART if restarts > 0 else Stop.END if ends > 0 else Stop.NONE
        return dict(zip(names, means, strict=True)), round(bad * self.environment.world_size)

    def _due(self, every_images: int) -> bool:
        """Whether the last step crossed a multiple of `every_images`; 0 is never."""
        if every_images <= 0:
            return False
        now = self.state.cur_images
        return now // every_images > (now - self.plan.global_batch) // every_images

    def _at_end(self) -> bool:
        return best.has_ended(self.state, self.config.train)

    def _resume(self) -> None:
        """Continues from the newest whole checkpoint of the run directory, which rank 0 chooses for all."""
        newest = newest_verified(self.checkpoints, self.environment.rank, self._checksum_of)
        if newest is None:
            origin = self.config.init if self.task.init else "scratch"
            self.log.info(f"starting from {origin} in {self.run_dir}")
            return
        path, manifest = newest
        resumption.require_same_run(path, manifest["config"], config_to_dict(self.config))
        saved = TrainingState.from_dict(manifest["state"])
        resumption.require_not_beyond_end(saved.cur_images, self.config.train, self.run_dir)
        resumption.require_same_artifact(path, saved.autoencoder_hash, self.task.autoencoder_hash, self.config.artifact)
        resumption.require_same_data(saved.data_digest, self._data_digest, self.config)
        self.state = TrainingState.from_dict(load_checkpoint(path, self.task.trained, verified=True))
        self.task.init = self.state.init
        best.forget_others(self.state, self.config)
        self.measuring.recall(self.state)
        self.saving.resumed_at(self.state)
        self._best.update(self.state)
        self.log.info(f"continuing at {self.state.cur_images} images from {path}")

    def _finish(self) -> None:
        phases.enter("finish")
        path = folder_of(self.checkpoints, self.state.cur_images)
        with self.task.evaluating():
            report = self.task.finish(path, self.state.cur_images)
        if self.state.truncated:
            report["truncated"] = self.state.truncated
        report |= {"images": self.state.cur_images, "steps": self.state.step, "training_s": self.state.training_s}
        self._best.update(self.state)
        report |= best.summary(self.state, self.config.train, self.checkpoints)
        diagnosis = {} if self._findings is None else {"findings": [dataclasses.asdict(f) for f in self._findings]}
        if self.environment.is_main:
            replace_file(self.run_dir / RESULT, json.dumps(report | diagnosis, indent=2) + "\n")
        self.log.info(f"finished: {', '.join(f'{key}={value}' for key, value in report.items())}")
