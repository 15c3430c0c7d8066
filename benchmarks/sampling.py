"""Sampling latency by sampler, number of steps, batch and guidance; what of it is UNet, sampler and decoder.

A call is `LoadedDiffusion.sample`, from captions to pixels, as every command uses it, on the CPU demo's model with
random weights (untrained, none of them zero throughout): latency does not depend on what a model has learned. Settings
differ from one base in one thing each, and all of them take turns. The figure is the median over rounds of a call's
time.

Afterwards a few calls of each setting are taken apart: time inside tau_theta, inside the UNet (with the number of its
calls; guidance doubles the rows of a call, not the calls), inside the autoencoder's decoder, and the rest, which is the
sampler's arithmetic, its noise and guidance's own. On CUDA taking apart waits for the device at every call.

    python -m benchmarks.sampling [--device cuda] [--case sampler] [--rounds 10]

CUDA computes in bf16 (the autoencoder in fp32), the CPU in fp32. On one CPU thread the clock is the process's own time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from benchmarks.harness import Way, take_turns
from benchmarks.measured import command_line, is_trial, parse, set_threads, step_clock, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import Config
from ldm_scale.diffusion.sampler import Sampler
from ldm_scale.interchange.artifact import DiffusionArtifact
from ldm_scale.interchange.load import LoadedDiffusion
from ldm_scale.interchange.publish import untrained_artifact
from ldm_scale.interchange.verify import filled

WARMUP_ROUNDS = 1
APART_CALLS = 3  # of each setting that are taken apart
GUIDED = 2.0  # the demo's own scale
CONTINUOUS = ("euler", "heun")  # samplers that need a process in continuous time: flow
PARTS = ("tau_theta", "UNet", "decoder", "sampler")

Clock = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """One way to sample."""

    sampler: Sampler = "ddim"
    num_steps: int = 10
    batch: int = 4
    guided: bool = True

    @property
    def name(self) -> str:
        """All of it in words."""
        guidance = "guided" if self.guided else "not guided"
        return f"{self.sampler}, {self.num_steps} steps, batch {self.batch}, {guidance}"


BASE = Setting()


def cases() -> dict[str, list[Setting]]:
    """What is varied, and its settings; the base is in all of them."""
    samplers: tuple[Sampler, ...] = ("ddim", "ddpm", "plms", "dpmpp_2m", "dpmpp_2m_sde", "euler", "heun")
    return {
        "sampler": [replace(BASE, sampler=sampler) for sampler in samplers],
        "steps": [replace(BASE, num_steps=steps) for steps in (5, 10, 20)],
        "batch": [replace(BASE, batch=batch) for batch in (1, 4, 16)],
        "guidance": [replace(BASE, guided=guided) for guided in (False, True)],
    }


def main(argv: Sequence[str]) -> int:
    """0."""
    arguments = parse(command_line("Sampling latency.", cases(), "rounds", 10), argv)
    device = torch.device(arguments.device)
    set_threads(device)
    config = load_config(["experiment=demo_text"])
    chosen = {name: settings for name, settings in cases().items() if name in (arguments.case or cases())}
    results = {"experiment": "demo_text", "rounds": arguments.rounds}
    results |= measure(config, chosen, device, arguments.rounds)
    print(table(results))
    if not is_trial(arguments.rounds, "rounds"):
        path = write_results(arguments.out, "sampling", device, results)
        draw(results, path.with_suffix(".png"))
    return 0


def model_of(config: Config, device: torch.device) -> LoadedDiffusion:
    """The configuration's model with random weights, none of them zero throughout."""
    model = LoadedDiffusion(cast(DiffusionArtifact, untrained_artifact(config, seed=0)))
    model.network.load_state_dict(dict(filled(model.network.state_dict())))
    return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def measure(config: Config, chosen: dict[str, list[Setting]], device: torch.device, num_rounds: int) -> dict[str, Any]:
    """A row for each setting of each case; one that is in several was timed once."""
    settings = list(dict.fromkeys(setting for found in chosen.values() for setting in found))
    flow = replace(config, diffusion=replace(config.diffusion, prediction="flow"))
    models = {kind: model_of(flow if kind else config, device) for kind in {s.sampler in CONTINUOUS for s in settings}}
    calls = {s: partial(sample, models[s.sampler in CONTINUOUS], s) for s in settings}
    clock = step_clock(device, ranks=1)
    ways = {setting.name: Way(call) for setting, call in calls.items()}
    turns = take_turns(ways, num_rounds, warmup=WARMUP_ROUNDS, clock=clock, name="sampling")
    latency_s = turns.spreads()
    apart = {s: taken_apart(models[s.sampler in CONTINUOUS], call, clock) for s, call in calls.items()}
    rows = [
        {
            "case": case,
            "setting": asdict(setting),
            "latency_s": latency_s[setting.name],
            "images_per_s": setting.batch / latency_s[setting.name]["median"],
        }
        | apart[setting]
        for case, found in chosen.items()
        for setting in found
    ]
    model = next(iter(models.values()))
    return {
        "resolution": model.resolution,
        "parameters": sum(parameter.numel() for parameter in model.network.parameters()),
        "rows": rows,
    }


def sample(model: LoadedDiffusion, setting: Setting) -> torch.Tensor:
    """Pixels of one call. Shapes: (batch, 3, H, W)."""
    return model.sample(
        [f"picture {number}" for number in range(setting.batch)],
        list(range(setting.batch)),
        sampler=setting.sampler,
        num_steps=setting.num_steps,
        guidance_scale=GUIDED if setting.guided else 1.0,
    )


def taken_apart(model: LoadedDiffusion, call: Callable[[], Any], clock: Clock) -> dict[str, Any]:
    """Calls of the UNet, and median seconds of a call's parts, which add up to it."""
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    num_calls = 0
    for _ in range(APART_CALLS):
        with _watched(model, clock) as spent:
            begin_s = clock()
            call()
            whole_s = clock() - begin_s
        num_calls = len(spent["UNet"])
        inside = {part: sum(seconds) for part, seconds in spent.items()}
        for part, seconds in (inside | {"sampler": whole_s - sum(inside.values())}).items():
            found[part].append(seconds)
    return {"unet_calls": num_calls, "parts_s": {part: statistics.median(values) for part, values in found.items()}}


@contextmanager
def _watched(model: LoadedDiffusion, clock: Clock) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of the networks inside the block."""
    spent: dict[str, list[float]] = {"tau_theta": [], "UNet": [], "decoder": []}
    owners: list[tuple[str, Any, str]] = [
        ("tau_theta", model.network.conditioner, "forward"),
        ("UNet", model.network.unet, "forward"),
        ("decoder", model.autoencoder, "decode"),
    ]
    with ExitStack() as stack:
        for part, owner, method in owners:
            stack.enter_context(mock.patch.object(owner, method, _timed(getattr(owner, method), spent[part], clock)))
        yield spent


def _timed(function: Callable[..., Any], seconds: list[float], clock: Clock) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        begin_s = clock()
        result = function(*arguments, **options)
        seconds.append(clock() - begin_s)
        return result

    return timed


def table(results: dict[str, Any]) -> str:
    """A line for each setting, by case."""
    head = f"{'':<50}{'ms':>9}{'quartiles':>20}{'images/s':>10}{'UNet calls':>12}"
    lines = [head + "".join(f"{part:>11}" for part in PARTS)]
    for row in results["rows"]:
        ms = {key: 1e3 * value for key, value in row["latency_s"].items()}
        quartiles = f"{ms['lower_quartile']:.0f} .. {ms['upper_quartile']:.0f}"
        whole_s = sum(row["parts_s"].values())
        shares = "".join(f"{row['parts_s'][part] / whole_s:>11.1%}" for part in PARTS)
        label = f"{row['case']}: {Setting(**row['setting']).name}"
        lines.append(
            f"{label:<50}{ms['median']:>9.0f}{quartiles:>20}{row['images_per_s']:>10.2f}{row['unet_calls']:>12}{shares}"
        )
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Nothing; a bar for each setting, cut into the parts of a call."""
    names = list(dict.fromkeys(Setting(**row["setting"]).name for row in results["rows"]))[::-1]
    rows = {Setting(**row["setting"]).name: row for row in results["rows"]}
    figure, axis = plt.subplots(figsize=(10, 1.5 + 0.35 * len(names)))
    left = [0.0] * len(names)
    for part in PARTS:
        # Parts of calls that were taken apart, as shares of the median latency.
        scale = [rows[name]["latency_s"]["median"] / sum(rows[name]["parts_s"].values()) for name in names]
        seconds = [rows[name]["parts_s"][part] * s for name, s in zip(names, scale, strict=True)]
        axis.barh(names, seconds, left=left, label=part)
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    axis.set_xlabel("seconds of a call")
    axis.grid(alpha=0.3, axis="x")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
