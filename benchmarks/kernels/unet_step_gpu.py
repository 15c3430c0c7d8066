"""One training step of Stable Diffusion 2's UNet with our kernels off and on, in turn, on one model.

A step is forward, eps loss, backward and AdamW (torch's fused one), in bf16 throughout, on a fixed batch of random
latents. Everything but `set_kernels` is the same on both sides: channels_last, SDPA for attention, the same weights.
Weights that start at zero are made random: a network of zero outputs has zero gradients almost everywhere, and a GPU
can be faster on zeros.

Before anything is timed, outputs and gradients are compared on a small batch: those with kernels may be twice as far
from the fp32 computation as those without, no further.

    python -m benchmarks.kernels.unet_step_gpu --out unet.json [--batch 32] [--side 64] [--seconds 60] [--way compiled]

`--way` puts one more way to compute beside these two: blocks through torch.compile, the step's forward and backward
pass as a CUDA graph, or both (train.compile and train.cuda_graphs), on a copy of the weights with an optimizer of its
own: a graph copies every gradient by a hook on the weight, which the others must not run. The copy's weights, gradients
and moments are not in the others' peak memory, nor theirs in its own. What a graph keeps between steps counts in
everybody's: of such a run only the graph's own means anything.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kernels.report import DRY_RUN
from benchmarks.kernels.timing import quartiles
from benchmarks.measured import own_bytes
from ldm_kernels.common import launch
from ldm_scale.config.schema import KernelsConfig, UNetConfig
from ldm_scale.engine.cuda_graphs import ReplayedForward, record_on_cuda
from ldm_scale.models.build import build_seeded, build_unet
from ldm_scale.models.compiled import compile_blocks
from ldm_scale.models.fused import set_kernels

# configs/model/sd2.yaml, without Hydra.
SD2 = UNetConfig(base_channels=320, channel_multipliers=(1, 2, 4, 4), attention_levels=(0, 1, 2), head_dim=64)
TINY = UNetConfig(
    base_channels=32, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_dim=32, norm_groups=8
)
SETTINGS = {
    "kernels off": KernelsConfig(group_norm_silu="reference", attention="sdpa", geglu="reference"),
    "kernels on": KernelsConfig(),
    "kernels on, Triton attention too": KernelsConfig(attention="triton"),
}
OFF, ON = list(SETTINGS)[:2]
COMPILED, REPLAYED = "compiled", "replayed"
WAYS = (REPLAYED, COMPILED, f"{COMPILED} and {REPLAYED}")  # of computing, with the kernels on
CONTEXT = (77, 1024)  # tokens and width of OpenCLIP-H's text encoder
CHECK_BATCH = 2
MAX_ERROR_RATIO = 2.0
WARMUP_ROUNDS = 2
MAX_ROUNDS = 20


def main(argv: Sequence[str]) -> int:
    """0; 1 if the two sides do not compute the same; 2 without a GPU."""
    parser = argparse.ArgumentParser(description="SD-2's training step with kernels off and on.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--batch", type=int, default=32, help="latents; halved until it fits")
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--seconds", type=float, default=60.0, help="for everything; rounds are cut to fit")
    parser.add_argument("--way", choices=WAYS, help="measured beside kernels off and on")
    parser.add_argument("--dry-run", action="store_true", help="a tiny UNet on the CPU in fp32: no meaning")
    arguments = parser.parse_args(argv)
    deadline_s = time.perf_counter() + arguments.seconds
    if not arguments.dry_run and not torch.cuda.is_available():
        print("error: the UNet step needs a CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    dtype = torch.float32 if arguments.dry_run else torch.bfloat16
    side = 8 if arguments.dry_run else arguments.side
    model = _model(TINY if arguments.dry_run else SD2, device)
    document: dict[str, Any] = {
        "mark": DRY_RUN if arguments.dry_run else "",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "side": side,
    }
    way: str | None = arguments.way
    settings = dict(list(SETTINGS.items())[:2]) if arguments.dry_run or way else dict(SETTINGS)
    found = {name: check(model, kernels, dtype, side) for name, kernels in settings.items()}
    if way:
        settings[way] = settings[ON]
        found[way] = check(model, settings[ON], dtype, side, way)
    document["errors"] = {name: {"output": o, "gradient": g} for name, (o, g) in found.items()}
    correct = {name: _is_right(errors, found[OFF]) for name, errors in found.items()}
    document["right"] = correct
    model.to(dtype)
    batch = 2 if arguments.dry_run else arguments.batch
    chosen = {name: kernels for name, kernels in settings.items() if correct[name]}
    while batch:
        measured = _measure_if_it_fits(model, chosen, batch, side, dtype, deadline_s)
        if measured is not None:
            document |= {"batch": batch} | measured
            break
        document.setdefault("out_of_memory_at_batch", []).append(batch)
        batch //= 2
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    print(table(document))
    return 0 if all(correct.values()) else 1


def _model(config: UNetConfig, device: torch.device) -> nn.Module:
    """The UNet in fp32, none of its matrices zero."""
    with device:
        model = build_seeded(lambda: build_unet(config, 4, 4, CONTEXT[1]), seed=0)
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    return model.train()


def faster(network: nn.Module, way: str | None) -> nn.Module:
    """The network, which from now on computes that way when it trains."""
    if way is not None and COMPILED in way:
        compile_blocks(network)
    if way is not None and REPLAYED in way:
        # A dry run has no device to record on: it replays by computing.
        ReplayedForward(network, record_on_cuda if torch.cuda.is_available() else lambda network, _: network)
    return network


def _inputs(batch: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_t and noise (B, 4, side, side) in channels_last, t (B,), context (B, M, d_tau)."""
    generator = torch.Generator(device).manual_seed(2)
    z_t, noise = (
        torch.randn(batch, 4, side, side, generator=generator, device=device)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    t = torch.randint(1000, (batch,), generator=generator, device=device)
    context = torch.randn(batch, *CONTEXT, generator=generator, device=device).to(dtype).requires_grad_()
    return z_t, noise, t, context


def _loss(model: nn.Module, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    z_t, noise, t, context = inputs
    output = model(z_t, t, context)
    return F.mse_loss(output.float(), noise.float()), output


def check(
    model: nn.Module, kernels: KernelsConfig, dtype: torch.dtype, side: int, way: str | None = None
) -> tuple[float, float]:
    """|result - plain fp32 result| / |plain fp32 result| of the output and of all gradients, in `dtype`."""
    device = next(model.parameters()).device
    inputs = _inputs(CHECK_BATCH, side, device, dtype)
    torch.backends.cudnn.allow_tf32 = False
    exact = _output_and_gradients(
        model, SETTINGS[OFF], (*(x.float() for x in inputs[:2]), inputs[2], inputs[3].float())
    )
    actual = _output_and_gradients(faster(copy.deepcopy(model).to(dtype), way), kernels, inputs)
    output, gradient = (
        (sum(float((a.float() - b).square().sum()) for a, b in zip(x, y, strict=True)) ** 0.5)
        / max(sum(float(b.square().sum()) for b in y) ** 0.5, 1e-30)
        for x, y in zip(actual, exact, strict=True)
    )
    return output, gradient


def _output_and_gradients(
    model: nn.Module, kernels: KernelsConfig, inputs: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    set_kernels(model, kernels)
    z_t, noise, t, context = inputs
    loss, output = _loss(model, (z_t, noise, t, context))
    return [output.detach()], list(torch.autograd.grad(loss, list(model.parameters())))


def _is_right(errors: tuple[float, float], without: tuple[float, float]) -> bool:
    """At most twice as far from fp32 as without kernels; the floor is for fp32 itself. A NaN is not right."""
    return all(e <= MAX_ERROR_RATIO * max(w, 1e-5) for e, w in zip(errors, without, strict=True))


def _measure_if_it_fits(model: nn.Module, *arguments: Any) -> dict[str, Any] | None:
    """`measure`, or None where memory does not suffice, with all of the attempt's memory free again."""
    try:
        return measure(model, *arguments)
    except torch.OutOfMemoryError:
        pass
    # Only now is the attempt's traceback gone, which held its activations.
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return None


def measure(
    model: nn.Module, settings: dict[str, KernelsConfig], batch: int, side: int, dtype: torch.dtype, deadline_s: float
) -> dict[str, Any]:
    """Seconds of a step per setting, taken in turn, their ratios to the first, peak memory, and the paths taken."""
    device = next(model.parameters()).device
    inputs = _inputs(batch, side, device, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    networks = {name: faster(copy.deepcopy(model), name) if name in WAYS else model for name in settings}
    optimizers = {
        network: torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
        for network in dict.fromkeys(networks.values())
    }
    result: dict[str, Any] = {"peak_mem_gib": {}, "paths": {}}
    for index in range(WARMUP_ROUNDS + MAX_ROUNDS):
        if index > WARMUP_ROUNDS + 3 and time.perf_counter() > deadline_s:
            break
        for name, kernels in list(settings.items())[:: -1 if index % 2 else 1]:
            network = networks[name]
            set_kernels(network, kernels)
            before = launch.outcomes()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(_time(network, inputs, optimizers[network], device))
            if device.type == "cuda":
                others = sum(own_bytes(*other) for other in optimizers.items() if other[0] is not network)
                result["peak_mem_gib"][name] = round((torch.cuda.max_memory_allocated() - others) / 2**30, 2)
            calls = {key: count - before.get(key, 0) for key, count in launch.outcomes().items()}
            result["paths"][name] = {": ".join(key): count for key, count in calls.items() if count}
    timed = {name: values[WARMUP_ROUNDS:] for name, values in seconds.items()}
    result["step_s"] = {name: quartiles(values) for name, values in timed.items()}
    result["images_per_s"] = {name: batch / step["median"] for name, step in result["step_s"].items()}
    result["times_faster"] = {
        name: quartiles([a / b for a, b in zip(timed[OFF], values, strict=True)])
        for name, values in timed.items()
        if name != OFF
    }
    result["rounds"] = len(timed[OFF])
    return result


def _time(
    model: nn.Module,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin_s = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    inputs[3].grad = None
    torch.autograd.backward(_loss(model, inputs)[0])
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def table(document: dict[str, Any]) -> str:
    """Markdown; what is wrong comes first."""
    mark = f" ({document['mark']})" if document["mark"] else ""
    lines = [f"### UNet training step{mark}\n"]
    for name, errors in document["errors"].items():
        if not document["right"][name]:
            without = document["errors"][OFF]
            lines.append(
                f"WRONG, not timed: {name}: relative errors {errors['output']:.2g} of the output and "
                f"{errors['gradient']:.2g} of the gradients; without kernels {without['output']:.2g} and "
                f"{without['gradient']:.2g}\n"
            )
    if "step_s" not in document:
        return "\n".join([*lines, "Not timed: no batch fits in memory."])
    side = document["side"]
    what = f"{document['parameters'] / 1e6:.1f}M parameters, {document['dtype']}"
    lines.append(f"{what}, {document['batch']} latents of 4x{side}x{side}, {document['rounds']} rounds in turn.")
    if "out_of_memory_at_batch" in document:
        lines.append(f"Out of memory at batch {', '.join(map(str, document['out_of_memory_at_batch']))}.")
    lines.append("")
    lines.append("| | step ms: median (quartiles) | images/s | times faster: median (quartiles) | peak GiB | paths |")
    lines.append("|---|---|---|---|---|---|")
    for name, step in document["step_s"].items():
        faster = document["times_faster"].get(name)
        ratio = (
            f"{faster['median']:.3f} ({faster['lower_quartile']:.3f} to {faster['upper_quartile']:.3f})"
            if faster
            else ""
        )
        ms = {key: f"{1e3 * value:.1f}" for key, value in step.items()}
        spread = f"{ms['median']} ({ms['lower_quartile']} to {ms['upper_quartile']})"
        paths = ", ".join(f"{path} x{calls}" for path, calls in document["paths"][name].items())
        peak = document["peak_mem_gib"].get(name, "")
        lines.append(f"| {name} | {spread} | {document['images_per_s'][name]:.1f} | {ratio} | {peak} | {paths} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
