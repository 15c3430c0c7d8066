"""A trained classifier of latents, for guidance: read from the run or the checkpoint that trained it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_scale.conditioning.pixel_guidance import named_number
from ldm_scale.config.convert import config_from_dict
from ldm_scale.config.schema import Config
from ldm_scale.diffusion.gradient_guidance import classifier_guided
from ldm_scale.diffusion.guidance import Denoiser
from ldm_scale.diffusion.process import Process, build_process
from ldm_scale.engine.checkpoint import latest_checkpoint
from ldm_scale.engine.rank_files import MANIFEST, read_manifest
from ldm_scale.engine.weights import default_weights, read_full_tensors
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.load import LoadedDiffusion
from ldm_scale.models.classifier import LatentClassifier

STAGE = "classifier"  # and the model's name in its checkpoints


class LoadedClassifier:
    """p(class | z_t, t), differentiable in z_t."""

    def __init__(
        self, config: Config, state: Mapping[str, Tensor], autoencoder_hash: str, names: Sequence[str], source: str
    ) -> None:
        """`names` are the data's classes, the first ones that the network knows; `source` is where it was read."""
        with torch.device("meta"):
            self.network = LatentClassifier(config.unet, config.classifier, config.autoencoder.latent_channels)
        self.network.load_state_dict(state, assign=True)
        self.network.to(memory_format=torch.channels_last)  # as its activations are
        self.network.eval().requires_grad_(False)
        self.config = config
        self.process = build_process(config.diffusion)
        self.autoencoder_hash = autoencoder_hash
        self.names = [*names, *map(str, range(len(names), config.classifier.num_classes))]
        self.source = source

    def to(self, device: torch.device | str) -> Self:
        """This object, its weights moved."""
        self.network.to(device)
        self.process = self.process.to(device)
        return self

    def log_probability(self, z_t: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """ln p(class | z_t, t) of each image's class. Shapes: z_t (B, c, h, w), t (B,), classes (B,); returns (B,)."""
        logits = self.network(self.process.network_input(z_t, t), self.process.network_time(t))
        return -F.cross_entropy(logits.float(), classes, reduction="none")

    def class_numbers(self, classes: Sequence[str | int], what: str = "class") -> Tensor:
        """Numbers of classes that are given as such, or as text: a name or a number. Shapes: returns (len(classes),).

        Raises: ConfigError, which calls them `what`, if there is no such class.
        """
        numbers = [named_number(given, self.names, what) if isinstance(given, str) else given for given in classes]
        for number in numbers:
            if not 0 <= number < len(self.names):
                raise ConfigError(f"{what} {number}: the classifier {self.source} has 0 to {len(self.names) - 1}")
        return torch.tensor(numbers, dtype=torch.int64)

    def guide(
        self, model: LoadedDiffusion, classes: Sequence[str | int] | Tensor, scale: float = 1.0
    ) -> Callable[[Denoiser], Denoiser]:
        """The `guide` of `model.sample` towards a class per image; the classifier goes to the model's device.

        Raises: ConfigError if there is no such class, or the classifier does not fit the model.
        """
        self.check_fits(model)
        numbers = self.class_numbers(classes.tolist() if isinstance(classes, Tensor) else classes)
        wanted = numbers.to(model.device)
        self.to(model.device)

        def log_probability(z_t: Tensor, t: Tensor) -> Tensor:
            if len(wanted) != len(z_t):
                raise ConfigError(f"{len(wanted)} classes to guide towards and {len(z_t)} images: give one per image")
            return self.log_probability(z_t, t, wanted)

        return lambda denoiser: classifier_guided(denoiser, model.process, log_probability, scale)

    def check_fits(self, model: LoadedDiffusion) -> None:
        """Nothing, if the classifier knows what `model` shows it.

        Raises: ConfigError if it was trained on other latents or another forward process.
        """
        if self.autoencoder_hash != model.autoencoder.content_hash:
            raise ConfigError(
                f"the classifier {self.source} knows latents of the autoencoder {self.autoencoder_hash[:12]}, the "
                f"model's is {model.autoencoder.content_hash[:12]}; train one with stage=classifier on the model's "
                "artifact"
            )
        if not _same_noise(self.process, model.process):
            raise ConfigError(
                f"the classifier {self.source} was trained with another forward process than the model; train one with "
                "the model's diffusion.* (diffusion.prediction alone may differ among eps, v and x0)"
            )


def _same_noise(first: Process, second: Process) -> bool:
    """Whether z_t at the same t is the same to both, whatever their networks predict."""
    if type(first) is not type(second):
        return False
    if first.time_dtype != torch.int64:
        return True  # alpha and sigma are functions of t alone, without a parameter
    if first.num_timesteps != second.num_timesteps:
        return False
    t = torch.arange(first.num_timesteps)
    levels = (process.to("cpu").coefficients(t) for process in (first, second))
    return all(torch.equal(a, b) for a, b in zip(*levels, strict=True))


def load_classifier(path: str | Path, weights: str | None = None) -> LoadedClassifier:
    """The classifier of a run or a checkpoint, on the CPU; `weights` as of `load_diffusion`.

    Raises: CheckpointError if there is none, or it is incomplete; ConfigError if `weights` names none.
    """
    folder = Path(path)
    checkpoint = folder if (folder / MANIFEST).is_file() else latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{path} holds no complete checkpoint: give the run_dir of a run with stage=classifier")
    manifest = read_manifest(checkpoint)
    config = config_from_dict(manifest["config"])
    if config.stage != STAGE:
        raise CheckpointError(
            f"{checkpoint} is of stage={config.stage}: give the run_dir of a run with stage=classifier"
        )
    state = read_full_tensors(checkpoint, STAGE, weights or default_weights(manifest, STAGE))
    saved = manifest["state"]
    return LoadedClassifier(
        config, state, saved["autoencoder_hash"], saved["labels"].get("classes", []), str(checkpoint)
    )
