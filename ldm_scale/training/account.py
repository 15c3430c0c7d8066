"""What a run costs and how well it uses its machine: a row for each attempt, and figures for the log of scalars.

attempts.jsonl in the run directory has a row where an attempt begins (configuration, machine, versions, sizes) and one
where it ends, with the reason. One that was killed has no end.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldm_scale import __version__
from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import BatchPlan, Config
from ldm_scale.engine import phases
from ldm_scale.engine.env import Environment
from ldm_scale.engine.phase_times import shares
from ldm_scale.engine.versions import TRAINING, installed_version
from ldm_scale.planning.devices import peak_flops
from ldm_scale.planning.flops import RunSize, measure_run
from ldm_scale.redaction import redact
from ldm_scale.telemetry.memory import peak_memory
from ldm_scale.telemetry.side_files import RowFile
from ldm_scale.training.best import has_ended
from ldm_scale.training.state import TrainingState

ATTEMPTS = "attempts.jsonl"
SPLIT = (*phases.STEP, "evaluate", "save")  # phases whose shares of the time are logged
_LIBRARIES = (*TRAINING, "numpy", "torchvision", "triton")
_MAX_REASON = 500  # characters


class Account:
    """The account of one attempt; rank 0 keeps it, for all others it does nothing."""

    def __init__(self, config: Config, plan: BatchPlan, environment: Environment) -> None:
        self._config, self._plan, self._environment = config, plan, environment
        self._file = RowFile(Path(config.run_dir) / ATTEMPTS)
        self._images = 0  # in steps since the last figures
        self._step_flops = 0
        self._peak_flops: float | None = None

    @contextmanager
    def attempt(self, state: TrainingState) -> Iterator[None]:
        """A block with all of the training; its beginning and end are noted."""
        if not self._environment.is_main:
            yield
            return
        size = measure_run(self._config)
        device = _device_name(self._environment.device)
        self._step_flops, self._peak_flops = size.step_flops, peak_flops(device, self._environment.dtype)
        phases.current.times.take()
        self._file.cut()
        self._file.append(self._beginning(size, device, state), durable=True)
        reason = ""
        try:
            yield
        except BaseException as error:
            reason = f"{type(error).__name__}: {' '.join(redact(str(error)).split())}"[:_MAX_REASON]
            raise
        finally:
            finished = not reason and has_ended(state, self._config.train)
            row = {"event": "end", "time": round(time.time(), 3), "images": state.cur_images}
            row |= {"training_s": round(state.training_s, 3)}
            self._file.append(row | {"reason": reason or ("finished" if finished else "stopped")}, durable=True)

    def step(self) -> None:
        """Nothing; a step was made."""
        self._images += self._plan.global_batch

    def figures(self) -> dict[str, float]:
        """Since the last call: shares of the time, the model's FLOP/s a rank and MFU; peaks of memory so far.

        The model's FLOPs are `RunSize.step_flops` of images at data.resolution, the time that of all steps and not of
        validation, pictures and saves.
        """
        if not self._environment.is_main:
            return {}
        seconds = phases.current.times.take()
        images, self._images = self._images, 0
        figures = {f"time_share/{name}": share for name, share in shares(seconds, SPLIT).items()}
        in_steps = sum(seconds.get(name, 0.0) for name in phases.STEP)
        if in_steps > 0 and self._step_flops:
            rate = self._step_flops * images / in_steps / self._environment.world_size
            figures["throughput/model_tflops_per_s"] = rate / 1e12
            if self._peak_flops is not None:
                figures["throughput/mfu"] = rate / self._peak_flops
        return figures | peak_memory(self._environment.device)

    def _beginning(self, size: RunSize, device: str, state: TrainingState) -> Mapping[str, Any]:
        environment, meeting = self._environment, self._environment.meeting
        hosts = [place.host for place in meeting.places] if meeting is not None else [platform.node()]
        system = os.uname()  # platform.platform() runs a program
        return {
            "event": "start",
            "time": round(time.time(), 3),
            "images": state.cur_images,
            "init": state.init,
            "ranks": environment.world_size,
            "hosts": {host: hosts.count(host) for host in dict.fromkeys(hosts)},  # ranks by host
            "device": device,
            "device_type": environment.device.type,
            "precision": str(environment.dtype).removeprefix("torch."),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
            "micro_batch": self._plan.micro_batch,
            "accumulation_steps": self._plan.accumulation_steps,
            "parameters": size.trained.parameters,
            "forward_flops": size.trained.forward_flops,
            "step_flops": size.step_flops,
            "peak_flops": self._peak_flops,
            "versions": {
                "ldm-scale": __version__,
                "python": platform.python_version(),
                "cuda": torch.version.cuda,
                "system": " ".join((system.sysname, system.release, system.machine)),
                **{name: installed_version(name) for name in _LIBRARIES},
            },
            "config": config_to_dict(self._config),
        }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()} ({len(os.sched_getaffinity(0))} cores)"
    return f"{platform.machine()} ({len(os.sched_getaffinity(0))} cores)"
