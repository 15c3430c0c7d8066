"""The training images from where a run stands on."""

from __future__ import annotations

from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Loader, build_loader
from ldm_scale.engine.env import Environment
from ldm_scale.training.state import TrainingState


def training_loader(config: Config, plan: BatchPlan, environment: Environment, state: TrainingState) -> Loader:
    """This rank's loader of micro-batches, from image `state.cur_images` on."""
    return build_loader(
        config.data,
        seed=config.train.seed,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        rank=environment.rank,
        world_size=environment.world_size,
        start_image=state.cur_images,
        accept_latents=config.stage != "autoencoder",
        annotations=config.conditioning.annotations if config.stage == "diffusion" else frozenset(),
        quarantined={int(number): begins for number, begins in state.losses.quarantined.items()},
    )
