"""Evaluation of a run's checkpoints while it trains: `ldm-scale evaluate` on the folder that was just written.

There is no second implementation: the checkpoint is read back and measured as the command line would, on all ranks of
the run, and its result lies in `RUN/evaluations/IMAGES`, with the command that gives the same figures later. So the
networks in training, their precision and ZeRO stage do not matter; a copy of the measured weights in fp32 lies on each
device meanwhile. What was measured before an interruption, and whole results, are taken from there.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm_scale.config.fit import EVALUATION
from ldm_scale.config.schema import Config
from ldm_scale.data import Dataset, open_manifest, open_unindexed
from ldm_scale.data.manifest import needs_manifest
from ldm_scale.engine import collectives
from ldm_scale.engine.agreement import EXPECTED
from ldm_scale.engine.ema import RAW, average_names, canonical_name
from ldm_scale.engine.preemption import StopAsked
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.images import chosen_numbers, open_images, open_split
from ldm_scale.evaluation.results import RESULT_FILE
from ldm_scale.operations.diffusion_protocol import check_captions, check_names
from ldm_scale.operations.evaluate import evaluate_autoencoder
from ldm_scale.operations.evaluate_diffusion import evaluate_diffusion
from ldm_scale.operations.evaluation_reference import check_set_request, open_scorer
from ldm_scale.operations.evaluation_setup import open_features

FOLDER = "evaluations"
_OPTIONS = {  # of the command line -> what the configuration calls them, in messages
    "--num-images": "evaluation.num_images",
    "--data": "evaluation.manifest",
    "--split": "evaluation.split",
    "--features-weights": "evaluation.features_weights",
    "--features": "evaluation.features",
    "--clip-weights": "evaluation.clip_weights",
    "--clip-model": "evaluation.clip_model",
    "--perceptual-weights": "autoencoder_loss.perceptual_weights",
    "--batch": "evaluation.batch",
}


_ABSENT = (  # the model's own sampling; beside the images whose y the samples are given
    *("sampler", "steps", "eta", "guidance", "guidance_rescale", "guidance_interval"),
    *("reference", "reference_split", "num_reference", "cache"),
)


class CheckpointEvaluator:
    """Figures of checkpoints of the configured run."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def check(self) -> None:
        """Nothing, if what the evaluations need is there.

        Raises: ConfigError or DataError, in the configuration's words.
        """
        evaluation, arguments = self._config.evaluation, self.arguments(Path("CHECKPOINT"))
        if not evaluation.manifest and open_unindexed(self._config.data.manifest) is not None:
            raise needs_manifest(self._config.data.manifest, "evaluation.every_images")
        held = (RAW, *average_names(self._config.ema))
        if evaluation.weights is not None and canonical_name(evaluation.weights) not in held:
            raise ConfigError(
                f"evaluation.weights={evaluation.weights}: this run keeps {', '.join(held)}; set one of these, or the "
                "average in ema"
            )
        try:
            if self._config.stage == "autoencoder":
                images = open_images(arguments.data, arguments.split)
                numbers = chosen_numbers(images.source, images.split, images.num_images, arguments.num_images)
            else:
                dataset = open_split(arguments.data, arguments.split)
                source = str(dataset.manifest_path)
                numbers = chosen_numbers(source, dataset.split, dataset.num_samples, arguments.num_images)
                check_set_request(arguments)
                self._check_conditioning(dataset)
                open_scorer(arguments, torch.device("cpu"))
            space = open_features(arguments, self._config.data.resolution, torch.device("cpu"))
            self._check_number(len(numbers), 2 if space.num_components is None else space.num_components + 1)
        except (ConfigError, DataError) as error:
            raise type(error)(_in_keys(error)) from None

    def _check_conditioning(self, dataset: Dataset) -> None:
        """Nothing, if names and captions mean to the model what they mean in the data that are measured."""
        config = self._config
        kinds = [name for name, section in vars(config.conditioning).items() if section is not None]
        trained_on = config.data.manifest
        if config.evaluation.manifest and open_unindexed(trained_on) is None:
            labels = open_manifest(trained_on, config.data.split, False).labels
            check_names(labels, dataset, kinds)
        check_captions(config.evaluation.clip_weights, kinds, "the model")

    def _check_number(self, number: int, least: int) -> None:
        metric = self._config.train.best_metric
        if metric == f"{EVALUATION}frechet" and number < least:
            raise ConfigError(
                f"train.best_metric={metric}: a Frechet distance in these features takes {least} images, and {number} "
                "are measured; set evaluation.num_images, or another figure"
            )

    def __call__(self, checkpoint: Path, between: Callable[[], object]) -> dict[str, float]:
        """The figures of a checkpoint by their names, the same on all ranks; `between` is that of `measure_blocks`.

        Raises: an LdmScaleError on all ranks if it cannot be measured. Collective: all ranks.
        """
        evaluate = evaluate_autoencoder if self._config.stage == "autoencoder" else evaluate_diffusion
        rounds_to_10_bits = torch.backends.cudnn.allow_tf32  # an evaluation does not; training may
        try:
            document = evaluate(self.arguments(checkpoint), between, reuse=True)
        except (ConfigError, DataError) as error:
            raise type(error)(_in_keys(error)) from None
        finally:
            torch.backends.cudnn.allow_tf32 = rounds_to_10_bits
        return collectives.broadcast_object(_values(document))  # type: ignore[no-any-return]

    def known(self, checkpoint: Path) -> dict[str, float]:
        """The figures of a checkpoint that was measured before, of the same weights in the same way; {} if it was not.

        Collective: all ranks.
        """
        is_there = (self.arguments(checkpoint).out / RESULT_FILE).is_file()
        if not collectives.broadcast_object(is_there):
            return {}

        def end() -> None:
            raise StopAsked("it has to be measured")

        try:
            return self(checkpoint, end)
        except EXPECTED:
            return {}

    def arguments(self, checkpoint: Path) -> argparse.Namespace:
        """What `ldm-scale evaluate` makes of the command line that measures the checkpoint, and that line."""
        config, evaluation = self._config, self._config.evaluation
        action = "autoencoder" if config.stage == "autoencoder" else "diffusion"
        given: dict[str, Any] = {
            "data": Path(evaluation.manifest or config.data.manifest),
            "split": evaluation.split or config.data.validation_split or config.data.split,
            "num_images": evaluation.num_images,
            "batch": evaluation.batch,
            "weights": evaluation.weights,
            "features": evaluation.features,
            "features_weights": None if evaluation.features_weights is None else Path(evaluation.features_weights),
            "device": config.train.device,
        }
        if given["data"].is_dir() and not (given["data"] / "manifest.json").is_file():
            given["split"] = evaluation.split or None  # a folder of images has none
        if action == "autoencoder":
            weights = config.autoencoder_loss.perceptual_weights
            given |= {
                "perceptual": config.autoencoder_loss.perceptual_net,
                "perceptual_weights": None if weights is None else Path(weights),
            }
            defaults: dict[str, Any] = {"resolution": None}
        else:
            given |= {
                "seed": evaluation.seed,
                "clip_model": evaluation.clip_model,
                "clip_weights": evaluation.clip_weights,
            }
            defaults = {"resamples": 20, "no_cache": False} | dict.fromkeys(_ABSENT)
        words = ["ldm-scale", "evaluate", action, str(checkpoint)]
        for name, value in given.items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        out = Path(config.run_dir) / FOLDER / checkpoint.name
        return argparse.Namespace(
            action=action,
            source=checkpoint,
            command=shlex.join(words),
            json=False,
            out=out,
            overwrite=True,
            **given,
            **defaults,
        )


def _in_keys(error: Exception) -> str:
    """The error's message in words of the configuration, in place of the command line's."""
    message = str(error)
    for option, key in _OPTIONS.items():
        message = message.replace(f"{option} ", f"{key}=").replace(option, key)
    return message


def _values(document: dict[str, Any]) -> dict[str, float]:
    return {f"{EVALUATION}{record['figure']}": float(record["value"]) for record in document.get("records", ())}
