"""The classifier that guides sampling: classes of latents at every noise level (arXiv:2105.05233, section 4.1).

Same latents, times and noise as stage 2 has, so that it knows what the sampler will show it. Names of the figures of
`validate`, each a mean over the noise range (or its part, `bin0` the least noisy):
    validation/accuracy/raw, /ema     share of images whose class comes first; the trained weights, their first average
    validation/loss/raw, /ema         cross-entropy in nats; ln(num_classes) is guessing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_scale import faults
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.data import Batch
from ldm_scale.engine import seeding
from ldm_scale.engine.collectives import sum_over_ranks
from ldm_scale.engine.env import Environment
from ldm_scale.errors import DataError
from ldm_scale.evaluation.noise_levels import NUM_BINS, log_snr_ranges
from ldm_scale.models.classifier import LatentClassifier
from ldm_scale.telemetry.tensorboard import Curves
from ldm_scale.training.latent_task import LatentTask
from ldm_scale.training.task import Pictures

VALIDATION_IMAGES = 256
MODEL = "classifier"  # its name in checkpoints
NOISE_PURPOSE = "classifier validation"
FIGURES = ("accuracy", "loss")


class ClassifierTask(LatentTask):
    """Trains a noise-conditional classifier of latents."""

    headline = ("loss", "validation/accuracy/raw/mean", "validation/accuracy/ema/mean")

    def __init__(self, config: Config, plan: BatchPlan, environment: Environment) -> None:
        super().__init__(config, plan, environment)
        self.network, self.model = self.shard(
            MODEL, lambda: LatentClassifier(config.unet, config.classifier, self.latent_shape[0])
        )
        self.speed_up(self.network.body, self.network)

    def accumulate(self, batches: Sequence[Batch], images: int) -> dict[str, Tensor]:
        """See `Task.accumulate`."""
        loss, correct = (torch.zeros((), device=self.environment.device) for _ in range(2))
        self.sample_losses.clear()
        for batch in batches:
            faults.poison("step.input", batch.images)
            z, labels = faults.poison("step.latents", self.encode(batch)), self._labels(batch)
            t, noise, _ = self.draw(batch.image_numbers.tolist(), shape=z.shape[1:])
            z_t = self.process.add_noise(z, noise, t)
            logits = self.model(self.process.network_input(z_t, t), self.network_time(t)).float()
            errors = F.cross_entropy(logits, labels, reduction="none")
            self.note_losses(errors, t)
            error = faults.poison("step.loss", errors.mean())
            self.model.backward(error)
            # They stay there: reading them would wait for the device.
            loss += error.detach() / len(batches)
            correct += (logits.argmax(dim=1) == labels).float().mean() / len(batches)
        return {"loss": loss, "accuracy": correct}

    def update(self, images: int) -> dict[str, float]:
        """See `Task.update`."""
        return self.update_trained(MODEL, images)

    @torch.no_grad()
    def validate(self, images: int) -> dict[str, float]:
        """Accuracy and loss per part of the noise range, least noisy first, on fixed noise, raw and averaged.

        Collective: all ranks.
        """
        batches, count = self.validation_batches(VALIDATION_IMAGES)
        ema = self.trained[MODEL].ema
        figures = self._figures("raw", batches, count)
        if ema is not None:
            with ema.active():
                figures |= self._figures("ema", batches, count)
        return figures

    def charts(self) -> dict[str, list[str]]:
        """Scalars that TensorBoard shows over one another."""
        weights = ["raw"] if self.trained[MODEL].ema is None else ["raw", "ema"]
        return {
            f"{kind}, {part}": [f"validation/{kind}/{name}/{tag}" for name in weights]
            for kind in FIGURES
            for part, tag in (
                ("mean over the noise range", "mean"),
                *((f"log-SNR {self._range(i)}", f"bin{i}") for i in range(NUM_BINS)),
            )
        }

    def curves(self, figures: Mapping[str, float]) -> dict[str, Curves]:
        """Accuracy over the noise range, and what guessing reaches."""
        names = {"raw": "trained weights", "ema": "averaged weights"}
        guessing = 1.0 / self.config.classifier.num_classes
        lines = {
            label: [figures[f"validation/accuracy/{name}/bin{i}"] for i in range(NUM_BINS)]
            for name, label in names.items()
            if f"validation/accuracy/{name}/bin0" in figures
        }
        return {
            "validation/noise_levels": Curves(
                title="Accuracy by level of noise",
                x_label="log-SNR, ln(alpha^2 / sigma^2): much noise to the right",
                y_label="share of images whose class comes first",
                places=[self._range(i) for i in range(NUM_BINS)],
                lines=lines | {"guessing": [guessing] * NUM_BINS},
                references=frozenset({"guessing"}),
            )
        }

    def pictures(self) -> dict[str, Pictures]:
        """Nothing to look at."""
        return {}

    def finish(self, checkpoint: Path, images: int) -> dict[str, Any]:
        """The last checkpoint is the product: `ldm-scale sample --classifier` reads it."""
        return {"checkpoint": str(checkpoint), "autoencoder_hash": self.autoencoder_hash}

    def _figures(self, name: str, batches: Sequence[Batch], count: int) -> dict[str, float]:
        """Figures of the weights as they are now, over the first `count` images of each rank's batches."""
        sums = torch.zeros(2 * NUM_BINS + 1, dtype=torch.float64)
        for batch in batches:
            z, labels = self.encode(batch, mode=True), self._labels(batch)
            counted = slice(max(0, count - int(sums[-1])))
            streams = [
                seeding.stream(self.config.train.seed, NOISE_PURPOSE, number) for number in batch.image_numbers.tolist()
            ]
            places = torch.tensor([stream.random() for stream in streams], dtype=torch.float64)
            noise = self.to_device(seeding.normal(streams, self.latent_shape))
            for i in range(NUM_BINS):
                t = self.to_device(self.process.evaluation_times((i + places) / NUM_BINS))
                x = self.process.network_input(self.process.add_noise(z, noise, t), t)
                logits = self.network(x.to(self.environment.dtype), self.network_time(t)).float()[counted]
                sums[i] += (logits.argmax(dim=1) == labels[counted]).sum().cpu()
                sums[NUM_BINS + i] += F.cross_entropy(logits, labels[counted], reduction="sum").cpu()
            sums[-1] += len(labels[counted])
        sums = sum_over_ranks(sums.to(self.environment.device)).cpu()
        figures: dict[str, float] = {}
        for kind, totals in zip(FIGURES, sums[:-1].chunk(2), strict=True):
            means = (totals / sums[-1].clamp(min=1)).tolist()
            figures |= {f"validation/{kind}/{name}/bin{i}": mean for i, mean in enumerate(means)}
            figures[f"validation/{kind}/{name}/mean"] = sum(means) / NUM_BINS
        return figures

    def _range(self, i: int) -> str:
        high, low = log_snr_ranges(self.process)[i]
        return f"{high:.1f} to {low:.1f}"

    def _labels(self, batch: Batch) -> Tensor:
        """Classes (b,) on the device.

        Raises: DataError, naming a sample, if one has no class or one beyond classifier.num_classes.
        """
        num_classes = self.config.classifier.num_classes
        for key, label in zip(batch.keys, batch.classes.tolist(), strict=True):
            if not 0 <= label < num_classes:
                given = "has no class" if label < 0 else f"has class {label}"
                raise DataError(
                    f"{key} {given}, classifier.num_classes={num_classes} asks for one from 0 to {num_classes - 1}; "
                    "give data with classes (.cls, or sub-folders for `ldm-scale prepare image-folder`), or set "
                    "classifier.num_classes"
                )
        return self.to_device(batch.classes)
