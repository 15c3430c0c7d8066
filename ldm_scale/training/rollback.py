"""Going back to an earlier checkpoint's weights, without going back in the data.

Which checkpoint that is follows from the configuration and the images seen, and from nothing else: the newest that fell
due by train.checkpoint_every_images. Checkpoints of stops, of the clock and of saves that were tried again do not
count, so that a run which was stopped and resumed goes back to where the unbroken one does. The newest that counts
stays on the disk, however many others there are (`is_target`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ldm_scale.config.schema import Config
from ldm_scale.engine import phases
from ldm_scale.engine.checkpoint import Trained, load_checkpoint
from ldm_scale.engine.rank_files import folder_of, images_of
from ldm_scale.engine.verification import newest_whole
from ldm_scale.errors import NumericsError
from ldm_scale.telemetry.log import get_logger
from ldm_scale.training.state import TrainingState


def target_images(config: Config, images: int) -> int:
    """Images of the last step, up to so many, after which a checkpoint fell due by images; 0 if there was none."""
    every, batch = config.train.checkpoint_every_images, config.train.global_batch
    return -(-(images // every * every) // batch) * batch if every else 0


def is_target(config: Config, images: int) -> bool:
    """Whether a run may have to go back to its checkpoint of so many images."""
    return config.spikes.action == "rollback" and images > 0 and target_images(config, images) == images


def roll_back(root: Path, state: TrainingState, trained: Mapping[str, Trained], config: Config) -> None:
    """Nothing; weights, optimizers, averages and the history of losses are those of the checkpoint to go back to.

    The position stays: the images since then are passed over, those of the running step too. All ranks have looked at
    all files before a weight is touched; where that checkpoint is not there or damaged, the one before that counts
    serves, and without any the step is skipped and no more.
    Raises: NumericsError if it came back to this checkpoint train.max_skipped_steps times; CheckpointError on all ranks
    if files cannot be read at all. Collective: all ranks.
    """
    phases.enter("save")  # as long as the files take, and not as a step
    rank, log = next(iter(trained.values())).model.environment.rank, get_logger()
    wanted = target_images(config, state.cur_images)
    if not wanted:
        log.info(f"no checkpoint has fallen due by images yet to go back to; the step is skipped ({root})")
        return
    found, _ = newest_whole(root, rank, lambda images: images <= state.cur_images and is_target(config, images))
    if rank == 0 and (found is None or images_of(found.path) != wanted):
        instead = "the step is skipped" if found is None else f"the run goes back to {found.path}"
        log.error(
            f"ROLLBACK WITHOUT ITS CHECKPOINT: {folder_of(root, wanted)} could not be written, was removed or is "
            f"damaged; {instead} instead, as a run that had it would not"
        )
    if found is None:
        return
    saved = TrainingState.from_dict(load_checkpoint(found.path, trained, verified=True))
    state.spikes = saved.spikes
    state.passed_over.append([saved.cur_images, state.cur_images + config.train.global_batch])
    log.info(
        f"went back to the weights of {found.path}; images {saved.cur_images} to {state.passed_over[-1][1] - 1}"
        " are passed over"
    )
    times, limit = sum(begin == saved.cur_images for begin, _ in state.passed_over), config.train.max_skipped_steps
    if times >= limit:
        raise NumericsError(
            f"the run went back to {found.path} {times} times (train.max_skipped_steps={limit}) without reaching its "
            f"next checkpoint; look at the images with `ldm-scale replay {config.run_dir}`, save more often "
            "(train.checkpoint_every_images), or set a smaller optimizer.lr"
        )
