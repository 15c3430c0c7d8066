"""`ldm-scale plan experiment=NAME [--gpu GPU ...] [--json]`: what a configuration amounts to, before anything runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence

from ldm_scale.command_line import Parser
from ldm_scale.conditioning.open_clip_models import text_tower_parameters, text_tower_size
from ldm_scale.config.compose import load_config
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.config.validate import validate_architecture
from ldm_scale.engine.cuda_graphs import check_cuda_graphs
from ldm_scale.errors import ConfigError
from ldm_scale.planning.cluster import GB, GPUS, Cluster, find_gpu
from ldm_scale.planning.cluster_plan import plan_on_cluster
from ldm_scale.planning.cluster_table import cluster_dict, cluster_table
from ldm_scale.planning.flops import NetworkSize, RunSize, measure_run
from ldm_scale.planning.jobs import ranks_of, transformer_trace
from ldm_scale.planning.memory import FP32, MemoryPlan, plan_memory
from ldm_scale.planning.recomputation import recomputed_words

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
    parser = Parser(
        prog="ldm-scale plan",
        description="Parameters, forward FLOPs and memory of a configuration; with --gpu, a run on a cluster.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as experiment=sd2 data.resolution=256")
    parser.add_argument("--ranks", type=int, help="that share the memory under ZeRO (1)")
    add_cluster_options(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.overrides)
    validate_architecture(config)
    if arguments.ranks is not None and arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: must be at least 1")
    cluster = read_cluster(arguments)
    ranks = (arguments.ranks or 1) if cluster is None else ranks_of(cluster, config)
    batches = batch_plan(config, ranks)
    if config.train.cuda_graphs:
        check_cuda_graphs(config, ranks)
    size = measure_run(config)
    if cluster is not None:
        plan = plan_on_cluster(
            config,
            size,
            cluster,
            precision=arguments.precision,
            cached=arguments.cached,
            images=arguments.images,
            watts=arguments.watts,
            price_per_gpu_hour=arguments.price_per_gpu_hour,
        )
        if arguments.json:
            on_cluster = {"memory": memory_dict(plan.memory), "cluster": cluster_dict(plan)}
            print(json.dumps(plan_dict(config, size) | on_cluster))
        else:
            print(plan_table(config, size))
            print(cluster_table(plan))
            _print_budget(plan.memory, config)
        return 0
    memory = plan_memory(config, batches, ranks, size.latent_shape)
    if arguments.json:
        print(json.dumps(plan_dict(config, size) | {"memory": memory_dict(memory)}))
    else:
        print(plan_table(config, size))
        print(memory_table(memory, batches.micro_batch))
        _print_budget(memory, config)
    return 0


def _print_budget(memory: MemoryPlan, config: Config) -> None:
    """Nothing; says which blocks a budget has chosen, if one has."""
    if not isinstance(memory.recomputed, str):
        print(recomputed_words(memory.recomputed, config.train.memory_budget_gib))


# What only a cluster needs: without --gpu these options would be ignored.
_OF_A_CLUSTER = (
    "gpus_per_node",
    "nodes",
    "intra_gbs",
    "inter_gbs",
    "storage_gbs",
    "images",
    "price_per_gpu_hour",
    "watts",
)


def add_cluster_options(parser: Parser) -> None:
    """Nothing; the parser takes a cluster."""
    group = parser.add_argument_group("a cluster", "with --gpu: time, scaling, cost and a recommendation")
    group.add_argument("--gpu", help=f"one of {', '.join(GPUS)}")
    group.add_argument("--gpus-per-node", type=int, help="(8)")
    group.add_argument("--nodes", type=int, help="(1)")
    group.add_argument("--intra-gbs", type=float, help="GB/s one way from a GPU to others of its node (the GPU's)")
    group.add_argument("--inter-gbs", type=float, help="GB/s one way from a GPU to other nodes (the GPU's usual node)")
    group.add_argument("--storage-gbs", type=float, help="GB/s that all nodes together read (2 a node)")
    group.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="(the configuration's)")
    group.add_argument("--cached", action="store_true", help="latents and frozen text come from `ldm-scale encode`")
    group.add_argument("--images", type=int, help="of the whole run (train.total_images)")
    group.add_argument("--price-per-gpu-hour", type=float, help="in any currency; without it no price is told")
    group.add_argument("--watts", type=float, help="of a GPU and its share of the machine (1.35 times the GPU's)")


def read_cluster(arguments: argparse.Namespace) -> Cluster | None:
    """The cluster of the options; None without --gpu.

    Raises: ConfigError if a number is out of range, the GPU unknown, or an option would be ignored.
    """
    given = {name: getattr(arguments, name) for name in _OF_A_CLUSTER if getattr(arguments, name) is not None}
    if arguments.gpu is None:
        others = {"cached": arguments.cached, "precision": arguments.precision != "auto"}
        names = [*given, *(name for name, is_given in others.items() if is_given)]
        if names:
            raise ConfigError(f"{_option(names[0])} is about a cluster; name its GPU with --gpu")
        return None
    if arguments.ranks is not None:
        raise ConfigError("--ranks and --gpu: a cluster has a rank for each GPU; leave --ranks out")
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{_option(name)} {value:g}: must be above 0 and finite; leave it out for the default")
    return Cluster(
        find_gpu(arguments.gpu),
        given.get("gpus_per_node", 8),
        given.get("nodes", 1),
        GB * given.get("intra_gbs", 0.0),
        GB * given.get("inter_gbs", 0.0),
        GB * given.get("storage_gbs", 0.0),
    )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
        ("frozen_text_encoder", _frozen_tower(config)),
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
        *(
            (_PARTS[name], _frozen_tower(config) if name == "frozen_text" else part)
            for name, part in size.conditioner.items()
        ),
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


def _frozen_tower(config: Config) -> NetworkSize | None:
    """What stands beside tau_theta's `frozen_text` and is not trained; None where the model has none."""
    text = config.conditioning.frozen_text
    if text is None or config.stage != "diffusion":
        return None
    layers, width = text_tower_size(text.model)
    flops = transformer_trace(layers, width, text.max_tokens, FP32).flops(1)
    return NetworkSize(text_tower_parameters(text.model), round(flops))


def memory_dict(memory: MemoryPlan) -> dict[str, object]:
    """The memory of one rank for programs. Units: bytes."""
    places = {"device": memory.device, "host": memory.host}
    totals = {name: {"between_steps": place.total_held, "peak": place.peak} for name, place in places.items()}
    items = {name: dataclasses.asdict(place) for name, place in places.items()}
    return {
        "ranks": memory.ranks,
        "zero_stage": memory.stage,
        "bytes_per_number": memory.compute_bytes,
        "recomputed": memory.recomputed if isinstance(memory.recomputed, str) else sorted(memory.recomputed),
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
    return "\n".join(lines)


def _trained(size: RunSize) -> str:
    """What the headline counts, in words."""
    if size.unet is None:
        return "autoencoder" if size.classifier is None else "classifier"
    return " + ".join(["UNet", *(_PARTS[name] for name, part in size.conditioner.items() if part.parameters)])


def _row(name: str, network: NetworkSize) -> str:
    return f"{name:<20}{network.parameters:>16,}{network.forward_flops / 1e9:>26.2f}"
