"""Speed of a stage-2 training step: our UNet against diffusers' UNet2DConditionModel with the same weights.

A step is forward, eps loss, backward and AdamW, on the same batch in the same process. The context asks for its
gradient, as it does when tau_theta trains jointly. Ours keeps its weights in torch's order, as it does under ZeRO,
which flattens them. On a CPU theirs runs as it comes and again in channels_last, weights and all, and the faster of the
two is what ours is compared with; on CUDA it is in channels_last.

Steps alternate (ours, theirs, theirs, ours, ...), and the result is the median over rounds of neighbouring steps of
their times' ratio: whatever else slows the machine down hits all steps of a round. On one CPU thread the clock is the
process's own time. That costs a multiple of the memory and some cache, equally on all sides. Before anything is timed,
outputs and gradients are compared in fp32; if they differ, the two are not the same function and no figure is printed.

There is a case for every family of models that the paper trains, its UNet made narrower: captions (SD-1, SD-2 with
linear projections), classes, boxes, nothing, a label map, a small picture, a picture with a hole.

    python -m benchmarks.unet_step [--device cuda] [--case demo] [--pairs 20] [--compile]

SD-2's UNet at its full width, on the latents of 512 and of 256 px, is for a GPU and is measured when it is named. With
--compile theirs is compiled as a whole by torch.compile, ours block by block as train.compile=blocks does; graphs are
made in the warm-up. CUDA computes in bf16 (weights and AdamW's moments too, on both sides), the CPU in fp32. On CUDA
the peak memory of either alone is counted: of its weights, moments and gradients, and what its step takes beside them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.both import give_both
from benchmarks.harness import Way, are_same, median_range, take_turns
from benchmarks.measured import command_line, is_trial, own_peak, parse, set_threads, spread, step_clock, write_cases
from ldm_scale.__main__ import run_command
from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import UNetConfig
from ldm_scale.errors import ConfigError
from ldm_scale.interchange.comparison import relative_difference
from ldm_scale.interchange.diffusers_unet import empty_unet
from ldm_scale.interchange.name_maps import NameMap, translate, unet_names
from ldm_scale.models.build import build_seeded, build_unet
from ldm_scale.models.compiled import check_compiler, compile_blocks

TOLERANCE = 1e-4  # of the norm, for outputs and for gradients
WARMUP_PAIRS = 3
CHANNELS_LAST, AS_IT_COMES = "theirs in channels_last", "theirs as it comes"
LEARNING_RATE = 1e-5


@dataclass(frozen=True)
class Case:
    """One UNet and the batch that it trains on."""

    unet: UNetConfig
    batch: int
    latent_channels: int
    latent_side: int
    context_tokens: int = 0  # 0: the attention is among pixels alone
    context_width: int | None = None
    spatial_channels: int = 0  # concatenated to the latents


@dataclass(frozen=True)
class Batch:
    """A batch of random latents.

    Shapes: z_t (B, c + spatial, H, W), noise (B, c, H, W), t (B,), context (B, M, d_tau) where the model has one.
    """

    z_t: Tensor
    t: Tensor
    context: Tensor | None
    noise: Tensor


def common_cases() -> dict[str, Case]:
    """The UNets that other benchmarks take too, by name: with a context, nothing concatenated."""
    demo = load_config(["experiment=demo_text"])
    text = demo.conditioning.text
    assert text is not None, "demo_text is conditioned on captions"
    mid = UNetConfig(base_channels=128, channel_multipliers=(1, 2, 4), attention_levels=(0, 1, 2), head_dim=64)
    # The paper's class-conditional LDM-8 at a quarter of its width.
    ldm8 = _narrow("classes_ldm8", 64)
    return {
        "demo": Case(
            demo.unet,
            demo.train.global_batch,
            demo.autoencoder.latent_channels,
            demo.data.resolution // demo.autoencoder.downsampling_factor,
            text.max_tokens,
            text.width,
        ),
        "mid": Case(mid, batch=4, latent_channels=4, latent_side=32, context_tokens=77, context_width=768),
        "ldm8": Case(ldm8, batch=4, latent_channels=4, latent_side=32, context_tokens=1, context_width=512),
    }


def cases() -> dict[str, Case]:
    """The UNets that are measured, by name: the common ones, and the other families, narrow."""
    sd1, sd2, layout = _narrow("sd1", 64), _narrow("sd2", 64), _narrow("layout_ldm4", 32)
    # diffusers has one width of heads for all levels where there is no context.
    inpaint = _narrow("inpaint_ldm4_big", 64, num_heads=None, head_dim=32)
    return common_cases() | {
        "sd1": Case(sd1, 2, latent_channels=4, latent_side=32, context_tokens=77, context_width=768),
        "sd2": Case(sd2, 2, latent_channels=4, latent_side=32, context_tokens=77, context_width=1024),
        "unconditional": Case(_narrow("unconditional_ldm4", 64), 2, latent_channels=3, latent_side=32),
        "layout": Case(layout, 2, latent_channels=3, latent_side=32, context_tokens=92, context_width=512),
        "semantic": Case(_narrow("concat_ldm4", 32), 2, latent_channels=3, latent_side=32, spatial_channels=3),
        "superres": Case(_narrow("superres_ldm4", 32), 2, latent_channels=3, latent_side=32, spatial_channels=3),
        "inpaint": Case(inpaint, 2, latent_channels=3, latent_side=32, spatial_channels=4),
    }


def full_cases() -> dict[str, Case]:
    """SD-2's UNet as it is, on 32 latents: what docs/speed.md has goals for. Too much for a CPU."""
    unet = load_config(["model=sd2"]).unet
    sizes = {"sd2_512": 64, "sd2_256": 32}
    return {
        name: Case(unet, 32, latent_channels=4, latent_side=side, context_tokens=77, context_width=1024)
        for name, side in sizes.items()
    }


def _narrow(model: str, base_channels: int, **fields: Any) -> UNetConfig:
    """The UNet of a file of configs/model, of another width."""
    return replace(load_config([f"model={model}"]).unet, base_channels=base_channels, **fields)


def main(argv: Sequence[str]) -> int:
    """0; 1 if two UNets of a case do not compute the same."""
    known = cases() | full_cases()
    parser = command_line(
        "Training step of our UNet against diffusers'.", known, "pairs", 20, "all but the full-width ones"
    )
    parser.add_argument("--compile", action="store_true", help="theirs as a whole, ours block by block")
    arguments = parse(parser, argv)
    device = torch.device(arguments.device)
    set_threads(device)
    if arguments.compile:
        try:
            check_compiler(device)
        except ConfigError as error:
            parser.error(str(error))
    results: dict[str, Any] = {}
    for name in arguments.case or cases():
        case = known[name]
        result = measure(case, device, arguments.pairs, name, "inductor" if arguments.compile else None)
        if result is None:
            return 1
        results[name] = {"case": asdict(case)} | result
    print(table(results))
    if not is_trial(arguments.pairs, "pairs"):
        write_cases(arguments.out, "unet_step", device, results)
    return 0


def measure(
    case: Case, device: torch.device, num_pairs: int, name: str, backend: str | None = None
) -> dict[str, Any] | None:
    """Times and ratios of a case; None, with the reason on stderr, if the two UNets are not the same function.

    `backend` is torch.compile's for both; None: neither is compiled.
    """
    ours, theirs, names = both_unets(case, device)
    batch = random_batch(case, device)
    output, gradient = differences(ours, theirs, names, batch)
    if not are_same(name, {"outputs": output, "gradients": gradient}, TOLERANCE):
        return None
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype != torch.float32:
        ours, theirs = ours.to(dtype), theirs.to(dtype)
    networks = {"ours": ours, CHANNELS_LAST: theirs}
    if device.type == "cpu":
        networks[AS_IT_COMES] = copy.deepcopy(theirs).to(memory_format=torch.contiguous_format)
    if backend is not None:
        compile_blocks(ours, backend)
    peaks, clock = dict[str, float](), step_clock(device, ranks=1)
    ways = {way: _way(way, network, _laid_out(batch, way, dtype), peaks, backend) for way, network in networks.items()}
    turns = take_turns(ways, num_pairs, warmup=WARMUP_PAIRS, clock=clock, name=name, unit="pair")
    steps = turns.spreads()
    baseline = min(networks.keys() - {"ours"}, key=lambda way: steps[way]["median"])
    ratios = turns.ratios(baseline, "ours")
    return {
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "output_difference": output,
        "gradient_difference": gradient,
        "pairs": num_pairs,
        "compiled": backend is not None,
        "peak_mem_gib": peaks,
        "baseline": baseline,
        "ratio_images_per_s": spread(ratios),
        "ratio_median_range": list(median_range(ratios)),
        "ours_step_s": steps["ours"],
        "theirs_step_s": {way: steps[way] for way in networks if way != "ours"},
    }


def both_unets(case: Case, device: torch.device) -> tuple[nn.Module, nn.Module, NameMap]:
    """Ours and theirs in fp32 with the same weights, none of them zero throughout, and the map between their names."""
    channels, spatial = case.latent_channels, case.spatial_channels
    ours = build_seeded(lambda: build_unet(case.unet, channels + spatial, channels, case.context_width), seed=0)
    theirs = empty_unet(case.unet, channels, case.context_width, case.latent_side, spatial).to_empty(device="cpu")
    names = unet_names(case.unet)
    give_both(ours, theirs, names)
    return ours.to(device).train(), theirs.to(device).to(memory_format=torch.channels_last).train(), names


def random_batch(case: Case, device: torch.device) -> Batch:
    """A fixed batch in fp32, the latents in channels_last."""
    generator = torch.Generator().manual_seed(1)
    latents = (case.batch, case.latent_channels, case.latent_side, case.latent_side)
    z_t, noise = (torch.randn(latents, generator=generator).to(device) for _ in range(2))
    if case.spatial_channels:
        size = (case.batch, case.spatial_channels, *latents[2:])
        z_t = torch.cat([z_t, torch.randn(size, generator=generator).to(device)], dim=1)
    context = None
    if case.context_width is not None:
        context = torch.randn(case.batch, case.context_tokens, case.context_width, generator=generator).to(device)
        context.requires_grad_()
    t = torch.randint(1000, (case.batch,), generator=generator).to(device)
    channels_last = torch.channels_last
    return Batch(
        z_t.contiguous(memory_format=channels_last),
        t,
        context,
        noise.contiguous(memory_format=channels_last),
    )


def inputs(batch: Batch) -> tuple[Tensor, ...]:
    """What a UNet is called with: latents, times and, where the model has one, the context."""
    return (batch.z_t, batch.t) if batch.context is None else (batch.z_t, batch.t, batch.context)


def differences(ours: nn.Module, theirs: nn.Module, names: NameMap, batch: Batch) -> tuple[float, float]:
    """|theirs - ours| / |ours| of the outputs, and of the loss's gradients over all weights together."""
    torch.backends.cudnn.allow_tf32 = False
    our_output = ours(*inputs(batch))
    their_output = theirs(*inputs(batch)).sample
    torch.autograd.backward([F.mse_loss(output, batch.noise) for output in (our_output, their_output)])
    torch.backends.cudnn.allow_tf32 = True
    their_gradients = _gradients(theirs)
    our_gradients = translate(_gradients(ours), names, their_gradients, "the UNet")
    order = sorted(their_gradients)
    return (
        relative_difference(their_output.detach(), our_output.detach()),
        relative_difference(_flat(their_gradients, order), _flat(our_gradients, order)),
    )


def _way(name: str, network: nn.Module, batch: Batch, peaks: dict[str, float], backend: str | None) -> Way:
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, fused=True)
    call: Callable[..., Any] = network if backend is None or name == "ours" else torch.compile(network, backend=backend)

    def predict() -> Tensor:
        output = call(*inputs(batch)) if name == "ours" else call(*inputs(batch), return_dict=False)[0]
        return cast(Tensor, output)

    around = partial(own_peak, batch.z_t.device, network, optimizer, peaks, name)
    return Way(partial(train, predict, optimizer, batch), around)


def _laid_out(batch: Batch, way: str, dtype: torch.dtype) -> Batch:
    """The batch in a network's type, and in its layout."""
    layout = torch.contiguous_format if way == AS_IT_COMES else torch.channels_last
    context = None if batch.context is None else batch.context.detach().to(dtype).requires_grad_()
    z_t, noise = batch.z_t.to(dtype).contiguous(memory_format=layout), batch.noise.contiguous(memory_format=layout)
    return Batch(z_t, batch.t, context, noise)


def train(predict: Callable[[], Tensor], optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One optimizer step on the batch; the weights move, so no step repeats another's values."""
    optimizer.zero_grad(set_to_none=True)
    if batch.context is not None:
        batch.context.grad = None
    torch.autograd.backward(F.mse_loss(predict().float(), batch.noise))
    optimizer.step()


def table(results: dict[str, Any]) -> str:
    """Images/s of ours as a multiple of theirs, a line per case."""
    lines = [
        f"{'images/s, ours / diffusers':<28}{'median':>8}{'quartiles':>18}{'holds at 95%':>18}{'rounds':>8}  against"
    ]
    for name, result in results.items():
        ratio = result["ratio_images_per_s"]
        quartiles = f"{ratio['lower_quartile']:.3f} .. {ratio['upper_quartile']:.3f}"
        low, high = result["ratio_median_range"]
        holds = f"{low:.3f} .. {high:.3f}"
        label = f"{name} ({result['parameters'] / 1e6:.1f}M, {result['dtype']})"
        notes = [result["baseline"], *(f"{way} {gib:.2f} GiB" for way, gib in result["peak_mem_gib"].items())]
        figures = f"{ratio['median']:>8.3f}{quartiles:>18}{holds:>18}{result['pairs']:>8}"
        lines.append(f"{label:<28}{figures}  {', '.join(notes)}")
    return "\n".join(lines)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def _flat(tensors: dict[str, Tensor], order: Sequence[str]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in order])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
