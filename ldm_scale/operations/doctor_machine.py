"""`ldm-scale doctor machine`: what runs here and how fast, before a run is sent to it.

One process looks at one host. Started by torchrun or deepspeed, every rank clocks itself, the ranks' messages are
measured too, and rank 0 alone reports. Nothing is left on the disks.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import shutil
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.data.urls import local_path
from ldm_scale.engine import env
from ldm_scale.engine.collectives import gather_objects
from ldm_scale.engine.ema import average_names
from ldm_scale.engine.ops import read_ops
from ldm_scale.engine.snapshots import snapshot_bytes
from ldm_scale.engine.versions import installed_version, misfits, requirements
from ldm_scale.operations import doctor_speed as speed
from ldm_scale.operations.doctor_kernel import check_kernel
from ldm_scale.operations.doctor_report import Report
from ldm_scale.planning.flops import RunSize, measure_run
from ldm_scale.telemetry.log import get_logger

DEFAULT_EXPERIMENT = "demo_autoencoder"
_SHOWN = ("torch", "triton", "deepspeed", "xformers", "webdataset", "open_clip_torch")
_GIB = 2**30
_MIN_OPEN_FILES = 1024  # 128 shards per loader worker (data/shards.py), their pipes, the libraries' own
_SLOW_DISK_MIB_S = 50.0
_STRAGGLER = 0.8  # of the median rank's images/s


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Nothing; the parser knows what `run` reads. The command puts the configuration into `config`."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help=f"whose step is clocked, and its folders (default: experiment={DEFAULT_EXPERIMENT})",
    )


def run(arguments: argparse.Namespace) -> Report:
    """What was found; the same on every rank where it is measured together. Collective: all ranks.

    Raises: ConfigError if the ranks or the device cannot be had.
    """
    config: Config = arguments.config
    launch = env.read_launch()
    batch_plan(config, launch.world_size)
    environment = env.start(launch, config.train)
    report = Report(f"machine {platform.node()}")
    size = measure_run(config)
    log = get_logger(environment.rank)
    log.info(f"{environment.describe()}; disks, DeepSpeed's ops and the step's clock take up to a minute")
    if environment.is_main:
        check_versions(report)
        check_host(report)
        check_devices(report, environment)
        check_deepspeed_ops(report, environment)
        check_folders(report, config, size)
        check_shared_memory(report, config, launch)
    check_step(report, config, size, environment)
    check_ranks(report, environment)
    env.stop()
    return report


def check_versions(report: Report) -> None:
    """Notes the versions, and each requirement of ldm-scale that is missing or outside its range."""
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    versions: dict[str, Any] = {"python": platform.python_version(), "cuda": torch.version.cuda, "cudnn": cudnn}
    versions |= {requirement.name: installed_version(requirement.name) for requirement in requirements()}
    wrong = list(misfits())
    for requirement, found in wrong:
        what = "not installed" if found is None else f"version {found}"
        report.error(f"{what}, needed {requirement.specifier or 'any version'}", requirement.name, "run `make env`")
    report.facts["versions"] = versions
    shown = ", ".join(f"{name} {versions.get(name)}" for name in _SHOWN)
    built = f"CUDA {versions['cuda']}, cuDNN {cudnn}" if versions["cuda"] else "torch without CUDA"
    report.ok(f"python {versions['python']}, {built}, {shown}")
    if not wrong:
        report.ok("every requirement of ldm-scale is installed in its range")


def check_host(report: Report) -> None:
    """Notes cores, memory and limits."""
    cores, usable = os.cpu_count() or 1, len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    report.facts["host"] = {
        "name": platform.node(),
        "cores": cores,
        "usable_cores": usable,
        "threads_per_rank": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "open_files_limit": files,
        "shm_gib": None if shm is None else round(shm.total / _GIB, 2),
    }
    report.ok(f"{usable} of {cores} cores usable, {torch.get_num_threads()} threads a rank, {memory:.1f} GiB memory")
    if files != resource.RLIM_INFINITY and files < _MIN_OPEN_FILES:
        report.warning(f"at most {files} open files", "ulimit -n", f"set it to at least {_MIN_OPEN_FILES}")
    else:
        report.ok(f"at most {files} open files" if files != resource.RLIM_INFINITY else "any number of open files")


def check_devices(report: Report, environment: env.Environment) -> None:
    """Notes the GPUs, and whether Triton compiles and computes right on the first of them."""
    gpus = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        gpus.append(
            {
                "name": found.name,
                "memory_gib": round(found.total_memory / _GIB, 1),
                "capability": f"{found.major}.{found.minor}",
            }
        )
    driver = _driver_version() if gpus else None
    report.facts |= {"gpus": gpus, "driver": driver}
    for number, gpu in enumerate(gpus):
        report.ok(f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}", f"GPU {number}")
    if driver:
        report.ok(f"NVIDIA driver {driver}")
    if environment.device.type == "cuda":
        check_kernel(report, environment.device)
        return
    reason = "torch sees no GPU" if not gpus else "train.device=cpu"
    report.facts["triton"] = "not run"
    report.ok(f"{reason}: Triton only interprets (TRITON_INTERPRET=1) or compiles ahead of time here (`make aot`)")


def _driver_version() -> str | None:
    """Version of the NVIDIA driver as nvidia-smi tells it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return lines[0].strip() if lines else None


def check_deepspeed_ops(report: Report, environment: env.Environment) -> None:
    """Notes DeepSpeed's compiled ops, none of which is needed."""
    ops = read_ops(environment.device.type)
    report.facts["deepspeed_ops"] = ops
    if ops is None:
        report.error(
            "does not start in a process of its own", "DeepSpeed", "see what `python -m ldm_scale.engine.ops` prints"
        )
        return
    built = [name for name, state in ops.items() if state["installed"]]
    compatible = [name for name, state in ops.items() if state["compatible"]]
    report.ok(
        f"ops built: {', '.join(built) or 'none'}; could be built: {', '.join(compatible) or 'none'}; ldm-scale needs "
        "none of them",
        "DeepSpeed",
    )


def check_folders(report: Report, config: Config, size: RunSize) -> None:
    """Notes space and speed of the file systems of the run and of the data."""
    moments_and_weights = 3 + len(average_names(config.ema))
    checkpoint = 4 * moments_and_weights * size.trained.parameters
    snapshots = snapshot_bytes(config.ema, config.train.total_images, size.trained.parameters)
    # Beside those that are kept: one being written, one to go back to, the best.
    count = config.train.keep_checkpoints + 1
    count += (config.spikes.action == "rollback") + (config.train.best_metric is not None)
    wanted = checkpoint * count + snapshots
    folders = {"run_dir": Path(config.run_dir)}
    if config.data.manifest and local_path(config.data.manifest) is not None:
        folders["data.manifest"] = Path(config.data.manifest).parent
    measured: dict[int, speed.DiskSpeed] = {}
    report.facts["disks"] = {}
    for name, path in folders.items():
        folder = speed.existing_folder(path)
        free = shutil.disk_usage(folder).free
        facts: dict[str, Any] = {"folder": str(folder), "free_gib": round(free / _GIB, 2)}
        report.facts["disks"][name] = facts
        place = f"{name} ({folder})"
        if name == "run_dir" and free < wanted:
            note = report.error if free < checkpoint else report.warning
            note(
                f"{free / _GIB:.2f} GiB free; {count} checkpoints"
                f"{' and all snapshots' if snapshots else ''} take {wanted / _GIB:.2f}",
                place,
                "free some or set run_dir elsewhere",
            )
        try:
            device = folder.stat().st_dev
            if device not in measured:
                measured[device] = speed.measure_disk(folder)
        except OSError as error:
            # Data may be read-only; a run must write.
            note = report.error if name == "run_dir" else report.warning
            note(f"no file can be written here ({error.strerror}), so its speed was not measured", place)
            continue
        found = measured[device]
        facts |= {"write_mib_per_s": round(found.write, 1), "read_mib_per_s": round(found.read, 1)}
        text = f"{free / _GIB:.1f} GiB free, writes {found.write:,.0f} MiB/s (fsync), reads {found.read:,.0f} MiB/s"
        if min(found.write, found.read) < _SLOW_DISK_MIB_S:
            report.warning(text, place, "checkpoints and data wait for it")
        else:
            report.ok(text, place)


def check_shared_memory(report: Report, config: Config, launch: env.Launch) -> None:
    """Notes whether the batches that loader workers hold ready fit into /dev/shm."""
    shm = report.facts["host"]["shm_gib"]
    data = config.data
    images = batch_plan(config, launch.world_size).micro_batch * data.num_workers * (data.prefetch_batches + 1)
    held = launch.local_world_size * images * 3 * data.resolution**2 * 4
    if shm is None or held / _GIB > shm:
        report.warning(
            f"{shm or 0} GiB; the loader workers of this host hold up to {held / _GIB:.2f} GiB of batches",
            "/dev/shm",
            "enlarge it (docker: --shm-size), or lower data.prefetch_batches or train.micro_batch",
        )
    else:
        report.ok(f"{shm} GiB; the loader workers of this host hold up to {held / _GIB:.2f} GiB of batches", "/dev/shm")


def check_step(report: Report, config: Config, size: RunSize, environment: env.Environment) -> None:
    """Clocks a small training step of the experiment against what the plan counts. Collective: all ranks."""
    matmul = speed.measure_matmul(environment.device, environment.dtype)
    name = config.experiment or "the configuration"
    forward = size.trained_forward_flops
    batch = speed.choose_batch(config, forward, environment.world_size, matmul) if forward else 0
    needed = speed.TRAINING_BYTES * size.trained.parameters
    available = _available_bytes(environment)
    clock, why_not = None, ""
    if not forward:
        why_not = "it trains nothing"
    elif needed > available:
        why_not = f"its weights and moments take {needed / _GIB:.1f} GiB and {available / _GIB:.1f} are free"
    elif not batch:
        why_not = f"one image would take over {speed.LARGEST_STEP_S:.0f} s"
    else:
        try:
            clock = speed.measure_step(config, size, environment, batch)
        except torch.cuda.OutOfMemoryError:
            why_not = "the GPU's memory does not hold a step with one image"
    rates: list[float | None] = gather_objects(None if clock is None else clock.images_per_s)
    dtype = str(environment.dtype).removeprefix("torch.")
    facts: dict[str, Any] = {"experiment": config.experiment, "matmul_tflops": round(matmul / 1e12, 4), "dtype": dtype}
    report.facts["step"] = facts
    report.ok(f"matrix products reach {matmul / 1e12:.3f} TFLOP/s in {dtype} on {environment.device.type}")
    if clock is None:
        report.warning(f"the step of {name} was not clocked: {why_not}")
        return
    share = clock.flops_per_s / matmul
    facts |= {
        "batch": clock.batch,
        "step_s": round(clock.seconds, 5),
        "images_per_s": round(clock.images_per_s, 2),
        "tflops": round(clock.flops_per_s / 1e12, 4),
        "share_of_matmul": round(share, 4),
        "planned_forward_flops": forward,
        "ranks_images_per_s": [None if rate is None else round(rate, 2) for rate in rates],
    }
    report.ok(
        f"{name}: {clock.images_per_s:,.1f} images/s a rank at a batch of {clock.batch}, forward, backward and Adam "
        f"without losses and data; {clock.flops_per_s / 1e12:.3f} TFLOP/s by the plan's count (3 x {forward / 1e9:.2f} "
        f"GFLOP an image), {share:.0%} of the matrix products'"
    )
    usual = median(rate for rate in rates if rate is not None)
    for rank, rate in enumerate(rates):
        if rate is None or rate < _STRAGGLER * usual:
            report.warning(
                f"{rate or 0:,.1f} images/s, the median is {usual:,.1f}: all ranks wait for it", f"rank {rank}"
            )


def _available_bytes(environment: env.Environment) -> int:
    """Free memory of this rank's device; of the host, its share."""
    if environment.device.type == "cuda":
        return int(torch.cuda.mem_get_info(environment.device)[0])
    match = re.search(r"^MemAvailable: +([0-9]+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match is not None, "/proc/meminfo has no MemAvailable"
    return int(match[1]) * 1024 // environment.launch.local_world_size


def check_ranks(report: Report, environment: env.Environment) -> None:
    """Notes the speed of messages between ranks. Collective: all ranks."""
    found = speed.measure_ranks(environment)
    if found is None:
        report.facts["ranks"] = None
        report.ok("bandwidth between ranks: not measured with one rank; start it by torchrun or deepspeed")
        return
    report.facts["ranks"] = {
        "world_size": environment.world_size,
        "all_reduce_gib_per_s": round(found.gib_per_s, 3),
        "latency_us": round(found.latency_us, 1),
    }
    report.ok(
        f"{environment.world_size} ranks: all-reduce of {speed.ALL_REDUCE_BYTES // 2**20} MiB at {found.gib_per_s:.2f} "
        f"GiB/s (bus), {found.latency_us:.0f} us for one number"
    )
