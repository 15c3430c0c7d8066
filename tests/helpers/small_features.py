"""Features of pictures smaller than EfficientNet-Lite0 asks for: tests of what surrounds the figures, fast."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ldm_scale.evaluation.features import EfficientNetFeatures
from ldm_scale.operations import evaluation_setup

_SIDE_PX = 32


@functools.cache
def small_features(device: torch.device, resolution: int) -> EfficientNetFeatures:
    """The network for pictures of 32 pixels, whatever `resolution` says, opened once."""
    return EfficientNetFeatures(device, resolution=_SIDE_PX)


@contextmanager
def taken_for_evaluation() -> Iterator[None]:
    """A block whose evaluations take these features; processes that are forked in it have them already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation_setup, "EfficientNetFeatures", small_features)
        small_features(torch.device("cpu"), _SIDE_PX)
        yield
