"""Times of models that take turns, and what each takes in memory."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.high_water import give_back_freed, set_back_high_water, status
from benchmarks.measured import step_clock
from benchmarks.pixel_latent.models import Model, Scale
from benchmarks.pixel_latent.steps import CACHED, DECODE, DENOISE, DOUBLE, ON_THE_FLY, TRAINING, Prepared
from ldm_scale.engine.env import Environment
from ldm_scale.errors import NumericsError

WARMUP_ROUNDS = 1
SAMPLING_EVERY = 3  # rounds: sampling's spread is small, and at twice the resolution it takes long
Seconds = dict[str, dict[str, list[float]]]  # of one image, by model and action, a value a round


def sampling_rounds(rounds: int) -> int:
    """In how many of so many timed rounds sampling is timed."""
    return math.ceil(rounds / SAMPLING_EVERY)


def groups(models: Sequence[Model], pairs: bool) -> list[list[Model]]:
    """Models that take turns with each other: a family, or LDM-1 and one other. LDM-1 is the first."""
    found: list[list[Model]] = []
    for family in dict.fromkeys(model.family for model in models):
        first, *others = [model for model in models if model.family == family]
        found += [[first, other] for other in others] if pairs else [[first, *others]]
    return found


def take_turns(models: Sequence[Model], scale: Scale, here: Environment, rounds: int) -> tuple[Seconds, dict[str, str]]:
    """Seconds an image, and why those models have none that gave what is not finite or do not fit.

    The order turns around in every round; sampling is timed in every third.
    """
    clock = step_clock(here.device, here.world_size)
    seconds: Seconds = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder, _released():
        prepared: list[Prepared] = []
        for index, model in enumerate(models):
            with _noted(model, failed):
                prepared.append(Prepared(model, scale, here, Path(folder) / str(index)))
        for turn in tqdm(range(WARMUP_ROUNDS + rounds), desc=models[0].family, unit="round", mininterval=1.0):
            for one in prepared if turn % 2 else prepared[::-1]:
                if one.model.key in failed:
                    continue
                with _noted(one.model, failed):
                    for action in one.actions:
                        if turn >= WARMUP_ROUNDS and action not in TRAINING and turn % SAMPLING_EVERY != WARMUP_ROUNDS:
                            continue
                        taken = one.run(action, clock) / one.images(action)
                        if turn >= WARMUP_ROUNDS:
                            seconds.setdefault(one.model.key, {}).setdefault(action, []).append(taken)
    for key in failed:
        seconds.pop(key, None)
    return seconds, failed


def peaks(model: Model, scale: Scale, here: Environment) -> dict[str, int]:
    """Bytes that the rank takes at most beyond what it had before the model, by what it does.

    The device's allocator on CUDA; resident memory of the process on a CPU.
    """
    if here.device.type == "cpu":
        give_back_freed()
    before, found = _set_back(here.device), {}
    with tempfile.TemporaryDirectory() as folder, _released():
        one = Prepared(model, scale, here, Path(folder))
        # The optimizer's states appear in the first step.
        one.run(ON_THE_FLY, _no_clock)
        parts = {name: (name,) for name in (CACHED, ON_THE_FLY) if name in one.actions}
        parts[f"sample{DOUBLE}"] = (DENOISE + DOUBLE, DECODE + DOUBLE)
        for name, actions in parts.items():
            _set_back(here.device)
            for action in actions:
                one.run(action, _no_clock)
            found[name] = _peak(here.device) - before
    return found


def per_image(one: dict[str, list[float]], num_steps: int, ddim_steps: int, ending: str) -> list[float]:
    """Seconds of a sample of `num_steps` DDIM steps, decoded, a value a round."""
    denoised, decoded = one[DENOISE + ending], one[DECODE + ending]
    return [num_steps * a / ddim_steps + b for a, b in zip(denoised, decoded, strict=True)]


@contextmanager
def _noted(model: Model, failed: dict[str, str]) -> Iterator[None]:
    """A block whose model is left out, with the reason, if it is not finite or does not fit."""
    try:
        yield
    except NumericsError as error:
        failed[model.key] = str(error)
    except torch.OutOfMemoryError:
        failed[model.key] = "does not fit into the device's memory"


@contextmanager
def _released() -> Iterator[None]:
    """A block after which networks are gone, engines with their cycles too."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _no_clock() -> float:
    return 0.0


def _set_back(device: torch.device) -> int:
    """Bytes in use now, from which peaks count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    set_back_high_water()
    return status("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else status("VmHWM")
