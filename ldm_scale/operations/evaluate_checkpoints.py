"""Evaluation of a run's checkpoints while it trains: `ldm-scale evaluate` on the folder that was just written.

There is no second implementation: the checkpoint is read back and measured as the command line would, on all ranks of
the run, and its result lies in `RUN/evaluations/IMAGES`, with the command that gives the same figures later. So the
networks in training, their precision and ZeRO stage do not matter; a copy of the measured weights in fp32 lies on each
device meanwhile. What was measured before an interruption, and whole results, are taken from there.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ldm_scale.config.fit import EVALUATION
from ldm_scale.config.schema import Config
from ldm_scale.data import open_unindexed
from ldm_scale.data.manifest import needs_manifest
from ldm_scale.engine import collectives
from ldm_scale.engine.agreement import agreed
from ldm_scale.engine.ema import RAW, average_names, canonical_name
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.evaluation.images import chosen_numbers, open_images, open_split
from ldm_scale.evaluation.results import RESULT_FILE
from ldm_scale.interchange.load import read_source
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
                chosen_numbers(images.source, images.split, images.num_images, arguments.num_images)
            else:
                dataset = open_split(arguments.data, arguments.split)
                chosen_numbers(str(dataset.manifest_path), dataset.split, dataset.num_samples, arguments.num_images)
                check_set_request(arguments)
                open_scorer(arguments, torch.device("cpu"))
            open_features(arguments, self._config.data.resolution, torch.device("cpu"))
        except (ConfigError, DataError) as error:
            message = str(error)  # in words of the command line
            for option, key in _OPTIONS.items():
                message = message.replace(f"{option} ", f"{key}=").replace(option, key)
            raise type(error)(message) from None

    def __call__(self, checkpoint: Path, between: Callable[[], object]) -> dict[str, float]:
        """The figures of a checkpoint by their names, the same on all ranks; `between` is that of `measure_blocks`.

        Raises: an LdmScaleError on all ranks if it cannot be measured. Collective: all ranks.
        """
        arguments = self.arguments(checkpoint)
        here = agreed(lambda: _written(arguments) if collectives.rank() == 0 else None)
        found = collectives.broadcast_object(here)
        if found is None:
            evaluate = evaluate_autoencoder if self._config.stage == "autoencoder" else evaluate_diffusion
            rounds_to_10_bits = torch.backends.cudnn.allow_tf32  # an evaluation does not; training may
            try:
                document = evaluate(arguments, between)
            finally:
                torch.backends.cudnn.allow_tf32 = rounds_to_10_bits
            found = collectives.broadcast_object(_values(document))
        return found  # type: ignore[no-any-return]

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


def _written(arguments: argparse.Namespace) -> dict[str, float] | None:
    """The figures of a result that the same command has left of the same weights, if there is one."""
    try:
        document = json.loads((arguments.out / RESULT_FILE).read_text(encoding="utf-8"))
        command, weights, values = document["command"], document["model"]["content_sha256"], _values(document)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is measured once more
    if command != arguments.command:
        return None
    # A run that was begun anew in its old folder passes the same numbers of images with other weights.
    return values if read_source(arguments.source, arguments.weights).content_hash == weights else None


def _values(document: dict[str, Any]) -> dict[str, float]:
    return {f"{EVALUATION}{record['figure']}": float(record["value"]) for record in document.get("records", ())}
