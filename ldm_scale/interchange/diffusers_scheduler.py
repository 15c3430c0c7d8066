"""Our forward process and sampler as schedulers of diffusers, and back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler

from ldm_scale.config.schema import DiffusionConfig, SamplingConfig
from ldm_scale.diffusion.process import build_process
from ldm_scale.diffusion.sampler import Sampler
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.foreign_config import Plain, checked, filled_in, read_class_config
from ldm_scale.interchange.foreign_section import Section
from ldm_scale.telemetry.log import get_logger

# diffusers ships no types for its constructors.
_DDIMScheduler: Any = DDIMScheduler
_EDMEulerScheduler: Any = EDMEulerScheduler

SCHEDULER_CONFIG = "scheduler_config.json"
Prediction = Literal["eps", "v", "x0"]
_PREDICTIONS: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
_SCHEDULES: Mapping[str, Literal["linear", "cosine"]] = {"scaled_linear": "linear", "squaredcos_cap_v2": "cosine"}
# Schedulers of a process with timesteps, and our sampler that follows it as they do; None where there is none, which
# is said, and ddim is taken.
_SAMPLERS: dict[str, Sampler | None] = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": None,
    "EulerAncestralDiscreteScheduler": None,
    "EulerDiscreteScheduler": "ddim",  # Euler steps in sigma are those of ddim
    "HeunDiscreteScheduler": None,
    "LMSDiscreteScheduler": None,
    "PNDMScheduler": "plms",
    "UniPCMultistepScheduler": None,
}
# Keys that say what the network was trained to do: they are read.
_BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas", "rescale_betas_zero_snr")
_PROCESS = frozenset({"num_train_timesteps", "prediction_type", *_BETAS})
_EDM_PROCESS = _PROCESS | {"sigma_min", "sigma_max", "sigma_data", "rho"}
# Keys that make another process or network of it where they say anything else.
_REQUIRED: dict[str, tuple[object, ...]] = {
    "trained_betas": (None,),
    "use_flow_sigmas": (False,),
    "timestep_type": ("discrete",),
    "predict_epsilon": (True,),  # of files from before prediction_type
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
# Every other key is of sampling alone. Ours does what the default says, except here.
_FIXED_SAMPLING = {
    "clip_sample": False,
    "thresholding": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
_EDM_SAMPLING = {"sigma_schedule": "karras", "final_sigmas_type": "zero"}
# Of no effect without clip_sample or thresholding, which are told themselves.
_IDLE = frozenset({"clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"})
# Pipelines, and the caller's own loop, that scale noise and input as EDMEulerScheduler asks.
_SCALING_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LDMPipeline", None)
_WHO = "the processes here have"
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
    theirs = filled_in(getattr(diffusers, name).__init__, given, path)
    section = Section.of_json(path, theirs)
    if name == "EDMEulerScheduler":
        return _edm(path, section)
    for key, held in _REQUIRED.items():
        if given.get(key, held[0]) not in held:
            raise CheckpointError(
                f"{path}: {key}={_shown(given[key])}: the processes here have {key}={held[0]!r}, anything else is a "
                "process, or a network's output, of another kind; this model cannot be imported"
            )
    config = DiffusionConfig(
        prediction=section.choice("prediction_type", {their: ours for ours, their in _PREDICTIONS.items()}, who=_WHO),
        num_timesteps=section.integer("num_train_timesteps", at_least=1),
        schedule=section.choice("beta_schedule", _SCHEDULES, who=_WHO),
        beta_start=section.number("beta_start", above=0, below=1),
        beta_end=section.number("beta_end", above=0, below=1),
        zero_terminal_snr=section.boolean("rescale_betas_zero_snr", False),
    )
    checked(path, lambda: build_process(config))
    spacing = "trailing" if config.zero_terminal_snr else "leading"
    _say_what_differs(path, name, theirs, _FIXED_SAMPLING | {"timestep_spacing": spacing})
    return config, SamplingConfig(sampler=_SAMPLERS[name] or "ddim")


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


def _edm(path: Path, section: Section) -> tuple[DiffusionConfig, SamplingConfig]:
    # v is the negative of what EDM's network gives, which no sampler could set right.
    section.choice("prediction_type", {"epsilon": "edm"}, who=_WHO)
    config = DiffusionConfig(
        prediction="edm",
        num_timesteps=section.integer("num_train_timesteps", at_least=1),
        sigma_min=section.number("sigma_min", above=0),
        sigma_max=section.number("sigma_max", above=0),
        sigma_data=section.number("sigma_data", above=0),
        rho=section.number("rho", above=0),
    )
    checked(path, lambda: build_process(config))
    _say_what_differs(path, "EDMEulerScheduler", dict(section.values), _EDM_SAMPLING)
    return config, SamplingConfig(sampler="euler")


def _say_what_differs(path: Path, name: str, theirs: Plain, ours: Mapping[str, object]) -> None:
    """Says which options of sampling are others than ours: the same model, drawn otherwise or along other timesteps."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    is_edm, others = name == "EDMEulerScheduler", []
    if not is_edm and _SAMPLERS[name] is None:
        others.append(f"_class_name={name!r} (here 'ddim', the nearest)")
    for key in sorted(theirs.keys() - (_EDM_PROCESS if is_edm else _PROCESS) - _IDLE):
        here = ours.get(key, parameters[key].default if key in parameters else None)
        if _plain(theirs[key]) != _plain(here):
            others.append(f"{key}={_shown(theirs[key])} (here {here!r})")
    if others:
        get_logger().warning(f"{path}: samples will differ from its own pipeline's by {', '.join(others)}")


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: object) -> str:
    return repr(value) if not isinstance(value, list | tuple) or len(value) < 8 else f"a list of {len(value)}"
