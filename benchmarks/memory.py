"""Peak memory of a rank at every ZeRO stage, on 1, 2 and 4 ranks, against what `ldm-scale plan` says.

Each setting is a fresh set of processes on this host: a UNet of 41M parameters, large enough that its states dominate,
makes a few steps in fp32, and each rank tells its largest resident memory beyond what it had before there was a network
(the kernel's high-water mark, set back at that moment). On a CPU both of the plan's places are host memory, and the
plan is the sum of both. What a GPU needs is another figure: kernels, allocator and buckets differ there.

    OMP_NUM_THREADS=1 python -m benchmarks.memory [--ranks 1 --ranks 2 --ranks 4] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.high_water import give_back_freed, set_back_high_water, status
from benchmarks.measured import RESULTS, write_results
from ldm_scale.__main__ import run_command
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ConditioningConfig,
    Config,
    EmaConfig,
    Recomputation,
    TrainConfig,
    UNetConfig,
    ZeroConfig,
)
from ldm_scale.engine import collectives, env
from ldm_scale.engine.zero import ShardedModel
from ldm_scale.models.build import build_seeded
from ldm_scale.planning.memory import plan_memory

UNET = UNetConfig(base_channels=512, channel_multipliers=(1,), num_res_blocks=1, attention_levels=(), attention="self")
LATENT = (4, 16, 16)
BATCH, STEPS = 4, 2
LIVE = 5_000_000  # elements, where less is kept gathered
FAR = 0.15  # off the plan: to be explained
MARK = "result: "


@dataclass(frozen=True)
class Setting:
    """How memory is divided and saved."""

    ranks: int
    stage: int
    recomputed: Recomputation = "none"
    live_elements: int = ZeroConfig.live_elements
    bucket_elements: int = 5_000_000

    def config(self, unet: UNetConfig = UNET) -> Config:
        """The run that is measured and planned."""
        return Config(
            stage="diffusion",
            autoencoder=AutoencoderConfig(kind="identity", channel_multipliers=(1,)),
            unet=unet,
            conditioning=ConditioningConfig(),
            ema=EmaConfig(half_life_images=0.0),
            zero=ZeroConfig(stage=self.stage, bucket_elements=self.bucket_elements, live_elements=self.live_elements),
            train=TrainConfig(
                device="cpu",
                precision="fp32",
                global_batch=BATCH,
                activation_checkpointing=self.recomputed,
                async_checkpoints=False,
            ),
        )


def settings(ranks: Sequence[int]) -> list[Setting]:
    """All that are measured."""
    found = [Setting(count, stage) for count in ranks for stage in range(4)]
    found += [Setting(count, 3, live_elements=LIVE) for count in ranks if count > 1]
    return found + [Setting(1, 0, recomputed) for recomputed in ("selective", "full")]  # type: ignore[arg-type]


def main(argv: Sequence[str]) -> int:
    """0."""
    parser = argparse.ArgumentParser(description="Peak memory of a rank by ZeRO stage.")
    parser.add_argument("--ranks", type=int, action="append", help="default: 1, 2 and 4")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--one", help="a setting as JSON: this process is a rank of it")
    arguments = parser.parse_args(argv)
    if arguments.one is not None:
        reports = measure(Setting(**json.loads(arguments.one)).config())
        if env.read_launch().rank == 0:
            print("\n" + MARK + json.dumps(reports), flush=True)
        return 0
    results = []
    for setting in tqdm(settings(arguments.ranks or (1, 2, 4)), unit="setting"):
        results.append(compared(setting, _run(setting)))
        tqdm.write(table(results).splitlines()[-2])
    print(table(results))
    write_results(arguments.out, "memory", torch.device("cpu"), {"settings": results})
    return 0


def measure(config: Config) -> list[dict[str, int]]:
    """Each rank's resident bytes before there is a network, and the most beyond them. Collective: all ranks."""
    here = env.start(env.read_launch(), config.train)
    plan = batch_plan(config, here.world_size)
    _import_all(here)
    collectives.barrier()
    give_back_freed()
    set_back_high_water()
    before = status("VmRSS")
    model = build_seeded(lambda: LatentDiffusion(config.unet, config.conditioning, LATENT[0]), 0)
    model.unet.checkpoint_activations = config.train.activation_checkpointing
    sharded = ShardedModel(
        model,
        optimizer=config.optimizer,
        zero=config.zero,
        stage=config.zero.stage,
        micro_batch=plan.micro_batch,
        accumulation_steps=plan.accumulation_steps,
        environment=here,
    )
    built = status("VmHWM") - before
    set_back_high_water()
    for _ in range(STEPS):
        z = torch.randn(plan.micro_batch, *LATENT)
        sharded.backward(sharded(z, torch.full((len(z),), 5), {}).float().square().mean())
        sharded.step(1e-4)
    peak = status("VmHWM") - before
    own = {"before_bytes": before, "peak_of_building_bytes": built, "peak_of_steps_bytes": peak}
    reports = collectives.gather_objects(own)
    env.stop()
    return reports


def compared(setting: Setting, ranks: Sequence[dict[str, int]]) -> dict[str, Any]:
    """Measured and planned, side by side."""
    config = setting.config()
    plan = plan_memory(config, batch_plan(config, setting.ranks), setting.ranks, LATENT)
    planned = plan.device.peak + plan.host.peak
    peak = max(rank["peak_of_steps_bytes"] for rank in ranks)
    return {
        "setting": asdict(setting),
        "measured": list(ranks),
        "peak_bytes": peak,
        "planned_bytes": planned,
        "plan": {"held": plan.device.held, "backward": plan.device.backward, "update": plan.device.update},
        "measured_over_planned": peak / planned,
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line per setting."""
    lines = [
        f"{'ranks':>5} {'ZeRO':>5} {'recomputed':>11} {'live elements':>14}{'peak MiB':>10}{'planned':>9}{'ratio':>7}"
    ]
    for result in results:
        setting, ratio = result["setting"], result["measured_over_planned"]
        live = "all" if setting["live_elements"] >= ZeroConfig.live_elements else f"{setting['live_elements']:,}"
        peak, planned = (result[name] / 2**20 for name in ("peak_bytes", "planned_bytes"))
        far = "  *" if abs(ratio - 1) > FAR else ""
        lines.append(
            f"{setting['ranks']:>5} {setting['stage']:>5} {setting['recomputed']:>11} {live:>14}"
            f"{peak:>10.0f}{planned:>9.0f}{ratio:>7.2f}{far}"
        )
    return "\n".join([*lines, f"*: more than {FAR:.0%} off the plan"])


def _run(setting: Setting) -> list[dict[str, int]]:
    """What the ranks of a setting report, in processes of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.ranks)]
    command += ["-m", "benchmarks.memory", "--one", json.dumps(asdict(setting))]
    variables = {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | variables).stdout
    (line,) = [line for line in output.splitlines() if line.startswith(MARK)]
    found: list[dict[str, int]] = json.loads(line.removeprefix(MARK))
    return found


def _import_all(here: env.Environment) -> None:
    """Loads what the first step would load, so that it is not counted as the network's."""
    tiny = replace(UNET, base_channels=64)
    network = build_seeded(lambda: LatentDiffusion(tiny, ConditioningConfig(), LATENT[0]), 0)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    network(torch.randn(1, *LATENT), torch.zeros(1, dtype=torch.int64), {}).square().mean().backward()
    optimizer.step()
    from ldm_scale.engine.zero import import_deepspeed

    import_deepspeed(here)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
