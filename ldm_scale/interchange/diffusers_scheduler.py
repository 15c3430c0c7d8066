"""Our forward process and sampler as schedulers of diffusers, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import diffusers
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler

from ldm_scale.config.schema import DiffusionConfig, SamplingConfig
from ldm_scale.diffusion.process import build_process
from ldm_scale.diffusion.sampler import Sampler
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.foreign_config import Plain, checked, filled, read_class_config
from ldm_scale.telemetry.log import get_logger

# diffusers ships no types for its constructors.
_DDIMScheduler: Any = DDIMScheduler
_EDMEulerScheduler: Any = EDMEulerScheduler

SCHEDULER_CONFIG = "scheduler_config.json"
ChoiceT = TypeVar("ChoiceT")
Prediction = Literal["eps", "v", "x0"]
_PREDICTIONS: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_SCHEDULES: Mapping[str, Literal["linear", "cosine"]] = {"scaled_linear": "linear", "squaredcos_cap_v2": "cosine"}
# Schedulers of a process with timesteps, and our sampler that follows it as they do; where there is none, ddim.
_SAMPLERS: dict[str, Sampler] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "ddim",
    "EulerAncestralDiscreteScheduler": "ddim",
    "EulerDiscreteScheduler": "ddim",
    "HeunDiscreteScheduler": "ddim",
    "LMSDiscreteScheduler": "ddim",
    "PNDMScheduler": "plms",
    "UniPCMultistepScheduler": "ddim",
}
# What our samplers always do, where a scheduler can do otherwise. Sampling alone: the model is the same.
_FIXED_SAMPLING = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": False, "steps_offset": 1}
_EDM_SAMPLING = {"sigma_schedule": "karras", "prediction_type": "epsilon", "final_sigmas_type": "zero"}
# Pipelines, and the caller's own loop, that scale noise and input as EDMEulerScheduler asks.
_SCALING_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LDMPipeline", None)
_CHECKED_STEPS = 20  # enough for "leading" steps, few enough for every table


def make_scheduler(config: DiffusionConfig, pipeline: str | None = "StableDiffusionPipeline") -> Any:
    """The scheduler with which a pipeline takes the steps of `diffusion.sampler`: with sampler ddim, or euler for edm.

    None is the caller's own loop.

    `DDIMScheduler` steps from t to t - T // num_steps, which with zero_terminal_snr is the next visited timestep only
    where num_steps divides T.
    Raises: CheckpointError if the pipeline has none.
    """
    if config.prediction == "flow":
        raise CheckpointError(
            "diffusion.prediction=flow: FlowMatchEulerDiscreteScheduler has no init_noise_sigma, for which "
            "StableDiffusionPipeline asks, and visits other times by itself; export with --to safetensors"
        )
    if config.prediction == "edm":
        if pipeline not in _SCALING_PIPELINES:
            raise CheckpointError(
                f"diffusion.prediction=edm: {pipeline} scales neither its noise nor the UNet's input, as "
                "EDMEulerScheduler needs; export with --to safetensors"
            )
        return _EDMEulerScheduler(
            sigma_min=config.sigma_min,
            sigma_max=config.sigma_max,
            sigma_data=config.sigma_data,
            sigma_schedule="karras",
            num_train_timesteps=config.num_timesteps,
            prediction_type="epsilon",
            rho=config.rho,
            final_sigmas_type="zero",
        )
    return _DDIMScheduler(
        num_train_timesteps=config.num_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="squaredcos_cap_v2" if config.schedule == "cosine" else "scaled_linear",
        prediction_type=_PREDICTIONS[config.prediction],
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing="trailing" if config.zero_terminal_snr else "leading",
    )


def read_scheduler(folder: Path) -> tuple[DiffusionConfig, SamplingConfig]:
    """The forward process that a scheduler of diffusers follows, and defaults of sampling nearest to it.

    Raises: CheckpointError if no process here is the same, with the key of its configuration.
    """
    path = folder / SCHEDULER_CONFIG
    given = read_class_config(path)
    name = given["_class_name"]
    known = [*_SAMPLERS, "EDMEulerScheduler"]
    if name not in known:
        raise CheckpointError(
            f"{path}: _class_name={name!r}: its forward process is unknown here; put the model's scheduler of another "
            f"class there, of {', '.join(known)}"
        )
    try:
        theirs = filled(getattr(diffusers, name).from_config(given), given, path)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: diffusers cannot build this {name} ({error}); correct the file") from error
    if name == "EDMEulerScheduler":
        return _edm(path, theirs)
    if theirs.get("trained_betas") is not None:
        raise CheckpointError(f"{path}: trained_betas: a table of betas; schedules here are {', '.join(_SCHEDULES)}")
    config = DiffusionConfig(
        prediction=_choice(path, theirs, "prediction_type", {their: ours for ours, their in _PREDICTIONS.items()}),
        num_timesteps=theirs["num_train_timesteps"],
        schedule=_choice(path, theirs, "beta_schedule", _SCHEDULES),
        beta_start=float(theirs["beta_start"]),
        beta_end=float(theirs["beta_end"]),
        zero_terminal_snr=bool(theirs.get("rescale_betas_zero_snr")),
    )
    checked(path, lambda: build_process(config))
    spacing = "trailing" if config.zero_terminal_snr else "leading"
    _say_what_differs(path, theirs, _FIXED_SAMPLING | {"timestep_spacing": spacing})
    return config, SamplingConfig(sampler=_SAMPLERS[name])


def require_our_schedule(folder: Path, config: DiffusionConfig) -> None:
    """Nothing, if the scheduler in `folder`, as diffusers reads it, visits our sampler's noise levels.

    Raises: CheckpointError if it does not.
    """
    name = read_class_config(folder / SCHEDULER_CONFIG)["_class_name"]
    scheduler = getattr(diffusers, name).from_pretrained(folder)
    process = build_process(config)
    num_steps = min(_CHECKED_STEPS, config.num_timesteps)
    levels = process.levels(num_steps)[:-1]
    scheduler.set_timesteps(num_steps)
    if config.prediction == "edm":
        theirs = scheduler.sigmas[:-1].double()
        ours = torch.tensor([level.sigma for level in levels], dtype=torch.float64)
    else:
        timesteps = scheduler.timesteps
        if num_steps == config.num_timesteps:  # all of them, which leaves no room for the offset
            timesteps = timesteps - int(timesteps.min())
        if timesteps.tolist() != [level.t for level in levels]:
            raise CheckpointError(
                f"the exported {name} visits the timesteps {timesteps.tolist()} where ours visits "
                f"{[level.t for level in levels]}, so nothing was written; this is a defect of ldm-scale: please "
                "report the configuration"
            )
        theirs = scheduler.alphas_cumprod[timesteps].double()
        ours = torch.tensor([level.alpha**2 for level in levels], dtype=torch.float64)
    if not torch.allclose(theirs, ours, rtol=1e-4, atol=1e-6):
        raise CheckpointError(
            f"the exported {name} has other noise levels than ours (by up to "
            f"{float((theirs - ours).abs().max()):.1e}), so nothing was written; this is a defect of ldm-scale: please "
            "report the configuration"
        )


def _edm(path: Path, theirs: Plain) -> tuple[DiffusionConfig, SamplingConfig]:
    _say_what_differs(path, theirs, _EDM_SAMPLING)
    config = DiffusionConfig(
        prediction="edm",
        num_timesteps=theirs["num_train_timesteps"],
        sigma_min=float(theirs["sigma_min"]),
        sigma_max=float(theirs["sigma_max"]),
        sigma_data=float(theirs["sigma_data"]),
        rho=float(theirs["rho"]),
    )
    checked(path, lambda: build_process(config))
    return config, SamplingConfig(sampler="euler")


def _choice(path: Path, theirs: Plain, key: str, choices: Mapping[str, ChoiceT]) -> ChoiceT:
    value = theirs.get(key)
    if not isinstance(value, str) or value not in choices:
        raise CheckpointError(
            f"{path}: {key}={value!r}: the processes here have {' and '.join(choices)}; this model cannot be imported"
        )
    return choices[value]


def _say_what_differs(path: Path, theirs: Plain, ours: Mapping[str, object]) -> None:
    """Says which options of sampling are others than ours: the same model, drawn along slightly other timesteps."""
    differing = {key: value for key, value in ours.items() if theirs.get(key, value) != value}
    others = [f"{key}={theirs[key]!r} (here {value!r})" for key, value in differing.items()]
    if others:
        get_logger().warning(f"{path}: samples will differ from its own pipeline's by {', '.join(others)}")
