"""What the trainer asks of a stage. The stages are `AutoencoderTask`, `DiffusionTask` and `ClassifierTask`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Batch
from ldm_scale.engine import collectives
from ldm_scale.engine.checkpoint import Trained
from ldm_scale.engine.ema import ShardedEma, average_names
from ldm_scale.engine.env import Environment
from ldm_scale.engine.spikes import level_sums
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.evaluation.generation import draw_captioned_grid
from ldm_scale.evaluation.shown import grid_side
from ldm_scale.interchange import initial
from ldm_scale.models.compiled import CompileReport
from ldm_scale.telemetry.log import get_logger
from ldm_scale.telemetry.tensorboard import Curves
from ldm_scale.training.diagnosis import Finding
from ldm_scale.training.optimizer import learning_rate
from ldm_scale.training.skipping import GRADIENT, LEVEL

_MAX_COLUMNS, _MAX_WIDTH_PX = 8, 2048  # of a picture


@dataclass(frozen=True, eq=False)
class Pictures:
    """Images with their captions; several panels, by name, stand side by side.

    Shapes: each panel (N, 3, H, W) in [-1, 1], of a size of its own.
    """

    panels: Mapping[str, Tensor]
    captions: Sequence[str]

    def drawn(self) -> Tensor:
        """All of them as one picture, (3, H, W) in bytes."""
        side = grid_side(max(max(images.shape[-2:]) for images in self.panels.values()))
        columns = max(1, min(_MAX_COLUMNS, _MAX_WIDTH_PX // (side * len(self.panels))))
        grid = draw_captioned_grid(self.panels, self.captions, columns, side)
        return torch.from_numpy(np.asarray(grid).copy()).permute(2, 0, 1)


class Task(ABC):
    """One stage's networks, objective, validation and product."""

    headline: tuple[str, ...] = ()  # figures by which runs are compared
    compile_report: CompileReport | None = None  # where blocks are compiled

    def __init__(self, config: Config, plan: BatchPlan, environment: Environment) -> None:
        self.config, self.plan, self.environment = config, plan, environment
        self.trained: dict[str, Trained] = {}
        self.autoencoder_hash = ""  # of the artifact that defines a diffusion model's latents
        self.init: dict[str, Any] = {}  # where the first weights come from, if they are not random
        self.labels: dict[str, list[str]] = {}  # the data's names of classes, objects' classes and map labels
        self.sample_losses: list[tuple[Tensor, Tensor]] = []  # of the running step: losses and levels of noise, (b,)

    @abstractmethod
    def accumulate(self, batches: Sequence[Batch], images: int) -> dict[str, Tensor]:
        """Metrics of this rank, after the gradients of one optimizer step were accumulated.

        `batches` are this rank's micro-batches of the step, `images` the images seen before it.
        Collective: all ranks.
        """

    @abstractmethod
    def update(self, images: int) -> dict[str, float]:
        """Gradient norms and learning rates, after the optimizers and averages made their step.

        `images` are the images seen before the step. Collective: all ranks.
        """

    def observations(self) -> dict[str, Tensor]:
        """What is known of the gradients and losses after `accumulate`, by which a step is judged before `update`."""
        squares = {name: item.model.gradient_square() for name, item in self.trained.items()}
        found = {GRADIENT + name: square for name, square in squares.items() if square is not None}
        if self.sample_losses:
            losses, levels = (torch.cat(parts).tolist() for parts in zip(*self.sample_losses, strict=True))
            found |= {f"{LEVEL}{i:02d}": torch.tensor(x) for i, x in enumerate(level_sums(losses, levels))}
        return found

    def discard(self) -> None:
        """Forgets what `accumulate` left: weights, optimizers, averages and buffers are as before it, bit for bit.

        Collective: all ranks.
        """
        for item in self.trained.values():
            item.model.discard()

    @abstractmethod
    def validate(self, images: int) -> dict[str, float]:
        """Validation figures, equal on all ranks. Collective: all ranks."""

    @abstractmethod
    def pictures(self) -> dict[str, Pictures]:
        """What there is to look at, by name; filled on rank 0. Collective: all ranks."""

    @abstractmethod
    def finish(self, checkpoint: Path, images: int) -> dict[str, Any]:
        """What the stage leaves behind, once its last checkpoint is written. Collective: all ranks."""

    def charts(self) -> dict[str, list[str]]:
        """Figures of `validate` that belong over one another: their names, by the chart's title."""
        return {}

    def curves(self, figures: Mapping[str, float]) -> dict[str, Curves]:
        """Named pictures of what `validate` found."""
        return {}

    def findings(
        self, figures: Mapping[str, float], recent: Sequence[Mapping[str, float]], images: int
    ) -> list[Finding]:
        """What is wrong with the run, from `validate`'s figures and the metrics of the recent steps."""
        return []

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Networks without dropout inside the block."""
        networks = [item.model.module for item in self.trained.values()]
        for network in networks:
            network.eval()
        try:
            yield
        finally:
            for network in networks:
                network.train()

    def initial_weights(self) -> Mapping[str, Tensor] | None:
        """The weights that `init` gives a run that begins; None where they are random or a checkpoint's.

        Collective: all ranks.
        """
        if not self.config.init or collectives.broadcast_object(initial.has_begun(self.config)):
            return None
        source = initial.read_initial(self.config)
        self.init = initial.describe_initial(self.config, source)
        get_logger(self.environment.rank).info(
            f"beginning with the {self.init['weights'] or 'only'} weights of init={self.config.init} "
            f"({source.content_hash[:12]}); optimizer, averages, schedules and data start anew"
        )
        return source.state

    def average(self, model: ShardedModel) -> ShardedEma | None:
        """The moving averages of a model's weights; None where the configuration has none."""
        if not average_names(self.config.ema):
            return None
        return ShardedEma(model, self.config.ema, self.config.kernels.ema_update)

    @property
    def num_truncated(self) -> int:
        """Captions and layouts that this process had to cut so far."""
        return 0

    def lr(self, images: int, peak: float | None = None) -> float:
        """Learning rate of the step that starts after `images` images."""
        optimizer = self.config.optimizer
        return learning_rate(optimizer, peak or optimizer.lr, images, self.config.train.total_images)
