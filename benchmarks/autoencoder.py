"""Speed of encoding and decoding: our autoencoder against diffusers' AutoencoderKL with the same weights.

Ours is a `LoadedAutoencoder`, as every command uses it. diffusers' model is measured as it comes and in channels_last,
and the faster of the two in a case is the baseline. All compute in fp32 without gradients, in one process.

Calls take turns (ours, plain, channels_last, channels_last, plain, ours, ...), and the result is the median over rounds
of the times' ratio, so that other work on the machine hits all of a round. On one CPU thread the clock is that of the
process's own time, which leaves out what the machine gave to others meanwhile. Before anything is timed, outputs are
compared: networks that are not the same function get no figure.

    python -m benchmarks.autoencoder [--device cuda] [--case kl_f8_128] [--rounds 15]
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.both import give_both
from benchmarks.harness import Turns, Way, are_same, take_turns
from benchmarks.measured import command_line, is_trial, parse, set_threads, spread, step_clock, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.interchange.artifact import make_artifact
from ldm_scale.interchange.comparison import relative_difference
from ldm_scale.interchange.diffusers_autoencoder import empty_autoencoder
from ldm_scale.interchange.load import LoadedAutoencoder
from ldm_scale.interchange.name_maps import autoencoder_names
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded

TOLERANCE = 1e-4  # of the norm, for latents and for pixels
WARMUP_ROUNDS = 2

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One autoencoder and the images that it encodes and decodes."""

    autoencoder: AutoencoderConfig
    resolution: int
    batch: int


def cases() -> dict[str, Case]:
    """The autoencoders and sizes that are measured, by name."""
    openmoji = load_config(["experiment=openmoji_autoencoder"])
    kl_f8 = load_config(["experiment=kl_f8"]).autoencoder
    return {
        "openmoji_f4": Case(openmoji.autoencoder, openmoji.data.resolution, 4),
        "kl_f8_128": Case(kl_f8, 128, 1),
        "kl_f8_128_b4": Case(kl_f8, 128, 4),
        "kl_f8_256": Case(kl_f8, 256, 1),
    }


def main(argv: Sequence[str]) -> int:
    """0; 1 if two autoencoders of a case do not compute the same."""
    description = "Encoding and decoding by our autoencoder against diffusers'."
    arguments = parse(command_line(description, cases(), "rounds", 15), argv)
    device = torch.device(arguments.device)
    set_threads(device)
    results: dict[str, Any] = {}
    for name in arguments.case or cases():
        case = cases()[name]
        result = measure(case, device, arguments.rounds, name)
        if result is None:
            return 1
        results[name] = {"case": asdict(case)} | result
    print(table(results))
    if not is_trial(arguments.rounds, "rounds"):
        write_results(arguments.out, "autoencoder", device, results)
    return 0


@torch.no_grad()
def measure(case: Case, device: torch.device, num_rounds: int, name: str) -> dict[str, Any] | None:
    """Times and ratios of a case; None, with the reason on stderr, if the autoencoders are not the same function."""
    ours, theirs = both_autoencoders(case, device)
    channels_last: Any = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    x = torch.rand(case.batch, 3, case.resolution, case.resolution, generator=torch.Generator().manual_seed(1))
    x = (x * 2 - 1).to(device)
    z = ours.encode(x)
    x_last, z_last = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, z))
    calls: dict[str, dict[str, Call]] = {
        "encode": {
            "ours": lambda: ours.encode(x_last),
            "plain": lambda: theirs.encode(x).latent_dist.mode(),
            "channels_last": lambda: channels_last.encode(x_last).latent_dist.mode(),
        },
        "decode": {
            "ours": lambda: ours.decode(z_last),
            "plain": lambda: theirs.decode(z).sample,
            "channels_last": lambda: channels_last.decode(z_last).sample,
        },
    }
    differences = {
        direction: max(relative_difference(by[layout](), by["ours"]()) for layout in ("plain", "channels_last"))
        for direction, by in calls.items()
    }
    if not are_same(name, {f"outputs of {direction}": d for direction, d in differences.items()}, TOLERANCE):
        return None
    clock = step_clock(device, ranks=1)
    result: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in ours.network.parameters()),
        "dtype": "float32",
        "clock": "process time" if clock is time.process_time else "wall",
        "rounds": num_rounds,
    }
    for direction, by in calls.items():
        ways = {layout: Way(call) for layout, call in by.items()}
        turns = take_turns(ways, num_rounds, warmup=WARMUP_ROUNDS, clock=clock, name=f"{name} {direction}")
        result[direction] = {"output_difference": differences[direction]} | compared(turns, case.batch)
    return result


def both_autoencoders(case: Case, device: torch.device) -> tuple[LoadedAutoencoder, Any]:
    """Ours and theirs in fp32 with the same weights, none of them zero throughout."""
    config = case.autoencoder
    network = build_seeded(lambda: build_autoencoder(config), seed=0)
    theirs: nn.Module = empty_autoencoder(config, LatentStatistics(), case.resolution).to_empty(device="cpu")
    give_both(network, theirs, autoencoder_names(config))
    artifact = make_artifact(network.state_dict(), config, LatentStatistics(), {"resolution": case.resolution})
    return LoadedAutoencoder(artifact).to(device), theirs.to(device).eval()


def compared(turns: Turns, batch: int) -> dict[str, Any]:
    """Images/s of ours, and as a multiple of the faster of diffusers' two layouts."""
    seconds = turns.spreads()
    baseline = min(("plain", "channels_last"), key=lambda layout: seconds[layout]["median"])
    ratios = {layout: spread(turns.ratios(layout, "ours")) for layout in ("plain", "channels_last")}
    return {
        "baseline": baseline,
        "ratio_images_per_s": ratios[baseline],
        "ratio_images_per_s_by_layout": ratios,
        "images_per_s": {call: batch / times["median"] for call, times in seconds.items()},
        "ours_s": seconds["ours"],
        "theirs_s": seconds[baseline],
    }


def table(results: dict[str, Any]) -> str:
    """Images/s of ours as a multiple of theirs, two lines per case."""
    lines = [f"{'images/s, ours / diffusers':<30}{'median':>8}{'quartiles':>18}{'min .. max':>18}{'baseline':>16}"]
    for name, result in results.items():
        for direction in ("encode", "decode"):
            ratio = result[direction]["ratio_images_per_s"]
            quartiles = f"{ratio['lower_quartile']:.3f} .. {ratio['upper_quartile']:.3f}"
            extremes = f"{ratio['min']:.3f} .. {ratio['max']:.3f}"
            label, baseline = f"{name} {direction}", result[direction]["baseline"]
            lines.append(f"{label:<30}{ratio['median']:>8.3f}{quartiles:>18}{extremes:>18}{baseline:>16}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
