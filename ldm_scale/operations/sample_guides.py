"""The models that guide `ldm-scale sample` from outside, from its options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from torch import Tensor

from ldm_scale.conditioning.pixel_guidance import (
    CLIP_MODEL,
    CLIP_WEIGHTS,
    ClipLogProb,
    ImageNetLogProb,
    PixelLogProb,
    decoded,
)
from ldm_scale.diffusion.gradient_guidance import prediction_guided
from ldm_scale.diffusion.guidance import Denoiser
from ldm_scale.errors import ConfigError
from ldm_scale.interchange.classifier import LoadedClassifier, load_classifier
from ldm_scale.interchange.load import LoadedDiffusion

Guide = Callable[[Denoiser], Denoiser]


def open_classifier(arguments: argparse.Namespace, model: LoadedDiffusion) -> LoadedClassifier | None:
    """The classifier of --classifier beside the model.

    Raises: ConfigError if it does not fit the model; CheckpointError if there is none.
    """
    if arguments.classifier is None:
        if arguments.classifier_weights is not None:
            raise ConfigError("--classifier-weights belongs to --classifier RUN: give it, or leave it out")
        return None
    classifier = load_classifier(arguments.classifier, arguments.classifier_weights)
    classifier.check_fits(model)
    return classifier


def build_guides(
    arguments: argparse.Namespace, model: LoadedDiffusion, classifier: LoadedClassifier | None, classes: Tensor | None
) -> Callable[[slice], Guide] | None:
    """The guides of some rows, one around the other; None without any. `classes` (N,) are the classifier's.

    Raises: ConfigError if an option belongs to a guide that is not asked for, or a guide cannot be opened.
    """
    log_probs: list[PixelLogProb] = []
    if arguments.clip_guidance is not None:
        names = (arguments.clip_model or CLIP_MODEL, arguments.clip_weights or CLIP_WEIGHTS)
        log_probs.append(ClipLogProb(arguments.clip_guidance, *names).to(model.device))
    elif arguments.clip_model is not None or arguments.clip_weights is not None:
        raise ConfigError("--clip-model and --clip-weights belong to --clip-guidance TEXT: give it, or leave them out")
    if arguments.imagenet_guidance is not None:
        log_probs.append(ImageNetLogProb(arguments.imagenet_guidance).to(model.device))
    scale = 1.0 if arguments.guide_scale is None else arguments.guide_scale
    if not 0.0 <= scale < math.inf:
        raise ConfigError(f"--guide-scale {scale:g}: must be a number from 0 (no guidance) upwards")
    if classifier is None and not log_probs:
        if arguments.guide_scale is not None:
            raise ConfigError(
                "--guide-scale belongs to --clip-guidance, --imagenet-guidance or --classifier: give one, or leave it "
                "out"
            )
        return None

    def guide_of(rows: slice) -> Guide:
        def guide(denoiser: Denoiser) -> Denoiser:
            for log_prob in log_probs:
                of_latents = decoded(model.autoencoder.network, log_prob)
                denoiser = prediction_guided(denoiser, model.process, of_latents, scale)
            if classifier is None:
                return denoiser
            assert classes is not None, "read with the classifier"
            return classifier.guide(model, classes[rows], scale)(denoiser)

        return guide

    return guide_of
