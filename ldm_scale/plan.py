"""`ldm-scale plan experiment=NAME [key=value ...] [--json]`: what a configuration amounts to, before anything runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from ldm_scale.command_line import Parser
from ldm_scale.config.compose import load_config
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.config.validate import validate_architecture
from ldm_scale.planning.flops import NetworkSize, RunSize, measure_run
from ldm_scale.planning.memory import FP32, MemoryPlan, plan_memory

# What the sections of `conditioning` are called in the table.
_PARTS = {
    "text": "text encoder",
    "frozen_text": "frozen text encoder",
    "classes": "class embedding",
    "layout": "layout encoder",
    "semantic_map": "map projection",
    "low_resolution": "small image",
    "inpainting": "image and mask",
}


def main(argv: Sequence[str]) -> int:
    """0, after printing the table or, with --json, one JSON object."""
    parser = Parser(prog="ldm-scale plan", description="Parameters, forward FLOPs and memory of a configuration.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as experiment=sd2 data.resolution=256")
    parser.add_argument("--ranks", type=int, default=1, help="that share the memory under ZeRO (1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.overrides)
    validate_architecture(config)
    if arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: must be at least 1")
    batches = batch_plan(config, arguments.ranks)
    size = measure_run(config)
    memory = plan_memory(config, batches, arguments.ranks, size.latent_shape)
    if arguments.json:
        print(json.dumps(plan_dict(config, size) | {"memory": memory_dict(memory)}))
    else:
        print(plan_table(config, size))
        print(memory_table(memory, batches.micro_batch))
    return 0


def plan_dict(config: Config, size: RunSize) -> dict[str, object]:
    """The plan for programs; keys of a network appear where the stage has it.

    Units: FLOPs (2 x MAC) per image and forward pass.
    """
    plan: dict[str, object] = {
        "experiment": config.experiment,
        "stage": config.stage,
        "resolution": config.data.resolution,
        "latent_shape": list(size.latent_shape),
        "forward_flops": size.trained.forward_flops,
        "parameters": size.trained.parameters,
        "autoencoder_parameters": size.autoencoder.parameters,
        "encode_flops": size.encoder.forward_flops,
        "decode_flops": size.decoder.forward_flops,
    }
    for name, network in (
        ("unet", size.unet),
        ("conditioner", size.tau_theta),
        ("classifier", size.classifier),
        ("discriminator", size.discriminator),
    ):
        if network is not None:
            plan[f"{name}_parameters"] = network.parameters
            plan[f"{name}_forward_flops"] = network.forward_flops
    if size.unet is not None:
        plan["conditioner_parts"] = {name: dataclasses.asdict(part) for name, part in size.conditioner.items()}
    return plan


def plan_table(config: Config, size: RunSize) -> str:
    """The plan for people: one line per network, then what is trained."""
    networks: list[tuple[str, NetworkSize | None]] = [
        ("autoencoder encode", size.encoder),
        ("autoencoder decode", size.decoder),
        ("discriminator", size.discriminator),
        *((_PARTS[name], part) for name, part in size.conditioner.items()),
        ("UNet", size.unet),
        ("classifier", size.classifier),
    ]
    channels, height, width = size.latent_shape
    resolution = config.data.resolution
    lines = [
        f"{config.experiment or 'defaults'}: stage {config.stage}, {resolution}x{resolution} pixels, "
        f"latents {channels}x{height}x{width} (f={config.autoencoder.downsampling_factor})",
        f"{'network':<20}{'parameters':>16}{'forward GFLOP per image':>26}",
    ]
    lines += [_row(name, network) for name, network in networks if network is not None]
    lines.append(f"trained: {size.trained.parameters:,} parameters ({_trained(size)}); 1 multiply-add = 2 FLOP")
    return "\n".join(lines)


def memory_dict(memory: MemoryPlan) -> dict[str, object]:
    """The memory of one rank for programs. Units: bytes."""
    places = {"device": memory.device, "host": memory.host}
    totals = {name: {"between_steps": place.total_held, "peak": place.peak} for name, place in places.items()}
    items = {name: dataclasses.asdict(place) for name, place in places.items()}
    return {
        "ranks": memory.ranks,
        "zero_stage": memory.stage,
        "bytes_per_number": memory.compute_bytes,
        **{name: totals[name] | items[name] for name in places},
    }


def memory_table(memory: MemoryPlan, micro_batch: int) -> str:
    """The memory of one rank for people: device and host, what lies there between steps, and the peak."""
    precision = "fp32" if memory.compute_bytes == FP32 else "bf16"
    lines = [
        f"memory of a rank (1 of {memory.ranks}, ZeRO stage {memory.stage}, {precision}, {micro_batch} images at once)"
        ", GiB; the framework's own, half to one, comes on top"
    ]
    for name, place in (("device", memory.device), ("host", memory.host)):
        if place.total_held or place.peak:
            parts = ", ".join(f"{what} {count / 2**30:.2f}" for what, count in place.held.items())
            held = f"{place.total_held / 2**30:.2f} between steps: {parts}"
            lines.append(f"{name:<8}{place.peak / 2**30:>9.2f} at the peak, {held}")
    if memory.activations_are_missing:
        lines.append("the activations of stage 1 are not counted: train.activation_checkpointing and a trial tell")
    return "\n".join(lines)


def _trained(size: RunSize) -> str:
    """What the headline counts, in words."""
    if size.unet is None:
        return "autoencoder" if size.classifier is None else "classifier"
    return " + ".join(["UNet", *(_PARTS[name] for name, part in size.conditioner.items() if part.parameters)])


def _row(name: str, network: NetworkSize) -> str:
    return f"{name:<20}{network.parameters:>16,}{network.forward_flops / 1e9:>26.2f}"
