"""The ways to compute a training step that `step_ladder` and its sweeps time, and by how much their results differ."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Turns, Way
from benchmarks.unet_step import Batch, Case, inputs
from ldm_kernels.common.tuning import WINNERS
from ldm_scale.config.schema import KernelsConfig
from ldm_scale.errors import ConfigError
from ldm_scale.interchange.verify import filled
from ldm_scale.models.build import build_seeded, build_unet
from ldm_scale.models.compiled import check_compiler, compile_blocks
from ldm_scale.models.fused import set_kernels

TOLERANCE = 1e-4  # of the norm, in fp32
LEARNING_RATE = 1e-5
CHECKED_IMAGES = 2  # of the batch, in which results are compared: in fp32 and written out the whole may not fit
CHECKED_RATE = 1e-2  # of the update that is compared: far above the rounding of a weight
PLAIN = "plain"
TOO_LARGE = "does not fit into this device's memory"
REFERENCE = KernelsConfig("reference", "reference", "reference", "reference", "reference")


@dataclass(frozen=True)
class Setting:
    """How a step computes."""

    channels_last: bool = False
    kernels: KernelsConfig = REFERENCE
    fused_adamw: bool = False
    compiled: bool = False  # train.compile=blocks


@dataclass(frozen=True)
class Rung:
    """A setting with all switches of the rungs before it, or why it is not here."""

    name: str
    setting: Setting
    missing: str = ""


def rungs(device: torch.device) -> list[Rung]:
    """From the plainest step up; a switch that the device does not have is passed over."""
    no_compiler = ""
    try:
        check_compiler(device)
    except ConfigError as error:
        no_compiler = str(error)
    gpu_only = "" if device.type == "cuda" else "Triton kernels run on CUDA; the CPU has the reference alone"
    switches: list[tuple[str, dict[str, Any], dict[str, str], str]] = [
        ("channels_last", {"channels_last": True}, {}, ""),
        ("GroupNorm + SiLU in one kernel", {}, {"group_norm_silu": "auto"}, gpu_only),
        ("GEGLU in one kernel", {}, {"geglu": "auto"}, gpu_only),
        ("attention by SDPA", {}, {"attention": "sdpa"}, ""),
        ("attention by the measured winner", {}, {"attention": "auto"}, gpu_only or no_winners(device)),
        ("AdamW fused", {"fused_adamw": True}, {}, ""),
        ("blocks compiled", {"compiled": True}, {}, no_compiler),
    ]
    found = [Rung(PLAIN, Setting())]
    setting = Setting()
    for name, fields, kernels, missing in switches:
        if not missing:
            setting = replace(setting, kernels=replace(setting.kernels, **kernels), **fields)
        found.append(Rung(f"+ {name}", setting, missing))
    return found


def no_winners(device: torch.device) -> str:
    """Why this GPU takes no measured winner of attention; empty if it may."""
    gpu = torch.cuda.get_device_name(device)
    measured = {row["gpu"] for row in json.loads(WINNERS.read_text()).get("attention", ())}
    return "" if gpu in measured else f"no winners have been measured on {gpu}: it would be the rung before"


def network(case: Case, device: torch.device) -> nn.Module:
    """The case's UNet in fp32, none of its weights zero throughout."""
    channels = case.latent_channels
    module = build_seeded(lambda: build_unet(case.unet, channels, channels, case.context_width), seed=0)
    module.load_state_dict(dict(filled(module.state_dict())))
    return module.to(device).train()


def variants(module: nn.Module, ladder: Sequence[Rung]) -> dict[bool, nn.Module]:
    """The network and, if a rung asks for it, a copy whose blocks are compiled, by whether they are.

    A copy, because a block that is compiled stays so.
    """
    found = {False: module}
    if any(rung.setting.compiled for rung in ladder):
        found[True] = copy.deepcopy(module)
        compile_blocks(found[True])
    return found


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch in the type that computes; the noise, which the loss takes, stays fp32."""
    context = None if batch.context is None else batch.context.detach().to(dtype).requires_grad_()
    return replace(batch, z_t=batch.z_t.to(dtype), context=context)


def rows(batch: Batch, chosen: slice) -> Batch:
    """Some images of the batch."""
    context = None if batch.context is None else batch.context.detach()[chosen]
    return replace(batch, z_t=batch.z_t[chosen], t=batch.t[chosen], noise=batch.noise[chosen], context=context)


@contextmanager
def using(module: nn.Module, setting: Setting) -> Iterator[None]:
    """The network computes as the setting says inside the block."""
    set_kernels(module, setting.kernels)
    # Behind a first convolution in planes all features stay in planes: the other operations keep what they get.
    planes = module.get_submodule("conv_in").register_forward_pre_hook(_to_planes)
    if setting.channels_last:
        planes.remove()
    try:
        yield
    finally:
        planes.remove()


def _to_planes(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (inputs[0].contiguous(),)


def loss(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The eps loss, and the output. Shapes: output as z_t."""
    output = module(*inputs(batch))
    return F.mse_loss(output.float(), batch.noise), output


def train(module: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One optimizer step on the batch; the weights move, so no step repeats another's values."""
    optimizer.zero_grad(set_to_none=True)
    if batch.context is not None:
        batch.context.grad = None
    torch.autograd.backward(loss(module, batch)[0])
    optimizer.step()


def adamw(parameters: Sequence[Tensor], fused: bool, lr: float) -> torch.optim.Optimizer:
    """torch's AdamW as one kernel, or as a loop over lists of tensors."""
    return torch.optim.AdamW(parameters, lr=lr, fused=fused, foreach=not fused)


def fitting(ways: Mapping[str, Way]) -> dict[str, Way]:
    """Those that the device's memory suffices for, each of which has run once."""
    found = {}
    for name, way in ways.items():
        try:
            with way.around():
                way.run()
            found[name] = way
        except torch.OutOfMemoryError:
            pass
        if name not in found:
            torch.cuda.empty_cache()  # only now is the traceback gone, which held the activations
    return found


def timed(turns: Turns, way: str, images: int, peaks: Mapping[str, float]) -> dict[str, Any]:
    """Seconds, images/s and, where it was counted, peak memory of a way."""
    step_s = turns.spreads()[way]
    found: dict[str, Any] = {"step_s": step_s, "images_per_s": images / step_s["median"]}
    return found | ({"peak_mem_gib": peaks[way]} if way in peaks else {})


def differences(
    module: nn.Module, batch: Batch, ladder: Sequence[Rung], dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """|rung - plain in fp32| / |plain in fp32| of output, gradients and update, by rung."""
    batch = rows(batch, slice(CHECKED_IMAGES))
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        exact = _results(module, batch, Setting())
        computing = variants(module if dtype == torch.float32 else copy.deepcopy(module).to(dtype), ladder)
        found = {}
        for rung in ladder:
            results = _results(computing[rung.setting.compiled], cast(batch, dtype), rung.setting)
            relative = (_relative(a, b) for a, b in zip(results, exact, strict=True))
            found[rung.name] = dict(zip(("output", "gradients"), relative, strict=True))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    weights, gradients = [p.detach() for p in module.parameters()], exact[1]
    foreach, fused = (_update(weights, gradients, fused) for fused in (False, True))
    off = _relative(fused, foreach)
    return {rung.name: found[rung.name] | {"update": off if rung.setting.fused_adamw else 0.0} for rung in ladder}


def furthest_off(off: Mapping[str, float], plain: Mapping[str, float]) -> tuple[str, float, float]:
    """What of a rung is nearest to its allowance or the most beyond, by how much it is off, and its allowance.

    Each may be off by TOLERANCE, or by twice what the plainest step is: gradients allow the output nothing.
    """
    allowed = {what: max(TOLERANCE, 2 * plain[what]) for what in off}

    def share(what: str) -> float:
        return math.inf if math.isnan(off[what]) else off[what] / allowed[what]

    worst = max(off, key=share)
    return worst, off[worst], allowed[worst]


def _results(module: nn.Module, batch: Batch, setting: Setting) -> tuple[Tensor, Tensor]:
    """Output and gradients, each flat in fp32."""
    with using(module, setting):
        value, output = loss(module, batch)
        gradients = torch.autograd.grad(value, list(module.parameters()))
    return output.detach().float().flatten(), torch.cat([g.float().flatten() for g in gradients])


def _update(weights: Sequence[Tensor], gradients: Tensor, fused: bool) -> Tensor:
    """By how much AdamW's first step moves the weights, flat."""
    moved = [weight.clone().requires_grad_() for weight in weights]
    for weight, gradient in zip(moved, gradients.split([w.numel() for w in weights]), strict=True):
        weight.grad = gradient.view_as(weight).clone()
    adamw(moved, fused, CHECKED_RATE).step()
    return torch.cat([(new.detach() - old).flatten() for new, old in zip(moved, weights, strict=True)])


def _relative(actual: Tensor, exact: Tensor) -> float:
    """NaN where anything is."""
    return float((actual - exact).norm() / exact.norm())
