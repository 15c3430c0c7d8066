"""Who this process is among the ranks, and what it computes on.

The same script runs plainly, under torchrun, under the deepspeed launcher and as one Slurm task per rank; each tells
the rank through its own environment variables. Reading them (`read_launch`) starts nothing, so that a configuration
can be refused before any process group exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType

import torch
import torch.distributed as dist

from ldm_scale import faults
from ldm_scale.config.schema import TrainConfig, WatchdogConfig
from ldm_scale.engine import collectives, rendezvous
from ldm_scale.engine.copies import put_on
from ldm_scale.engine.rendezvous import Meeting
from ldm_scale.engine.versions import running_versions
from ldm_scale.errors import ConfigError
from ldm_scale.telemetry.log import get_logger

_LEAST_COLLECTIVE_S = 1800.0  # torch's own limit for gloo


@dataclass(frozen=True)
class Launch:
    """This process's place among the ranks, as its launcher set it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


@dataclass(frozen=True)
class Environment:
    """A started rank: its place, its device and the type it computes in."""

    launch: Launch
    device: torch.device
    dtype: torch.dtype
    meeting: Meeting | None = None  # where all ranks run; None if somebody else has started them

    @property
    def rank(self) -> int:
        """Number of this process among all ranks."""
        return self.launch.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.launch.world_size

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes what exists once."""
        return self.launch.rank == 0

    def put(self, x: torch.Tensor) -> torch.Tensor:
        """See `put_on`; onto this rank's device."""
        return put_on(self.device, x)

    def describe(self) -> str:
        """One line for the log: ranks, device, backend, type."""
        backend = dist.get_backend() if dist.is_initialized() else "none"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.world_size} rank(s) on {self.device.type} ({backend}), {dtype}, activations in channels_last"


def read_launch() -> Launch:
    """This process's place from RANK, WORLD_SIZE, LOCAL_RANK (torchrun, deepspeed) or SLURM_* (one task per rank).

    Raises: ConfigError if the variables are incomplete, are no numbers or contradict each other.
    """
    environ = os.environ
    if "RANK" in environ or "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        local_names: tuple[str, ...] = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # torchrun's, deepspeed's
    elif "SLURM_PROCID" in environ and "SLURM_NTASKS" in environ and _number("SLURM_NTASKS", 1) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        local_names = ("SLURM_NTASKS_PER_NODE",)
    else:
        return Launch()
    missing = [name for name in names if name not in environ]
    if missing:
        raise ConfigError(
            f"environment variable(s) {', '.join(missing)} missing while {names[0]} or {names[1]} is set: "
            "a launcher sets all three; unset them to run on one rank"
        )
    rank, world_size, local_rank = _number(names[0], 0), _number(names[1], 1), _number(names[2], 0)
    if rank >= world_size:
        raise ConfigError(
            f"{names[0]}={rank} is outside 0..{world_size - 1} ({names[1]}={world_size}); start the ranks by torchrun, "
            "deepspeed or slurm/train_ldm.sh, which set both"
        )
    local_world_size = next((_number(name, 1) for name in local_names if name in environ), world_size)
    return Launch(rank, world_size, local_rank, local_world_size)


def _number(name: str, at_least: int) -> int:
    """Value of an environment variable that a launcher has set."""
    text = os.environ[name]
    if not text.isdecimal() or int(text) < at_least:
        raise ConfigError(
            f"environment variable {name}={text}: must be a whole number of at least {at_least}; launchers set it, "
            "unset it to run on one rank"
        )
    return int(text)


def start(
    launch: Launch,
    train: TrainConfig,
    watchdog: WatchdogConfig | None = None,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Environment:
    """The started rank: device chosen, threads set, process group up.

    `facts` are texts that all ranks must have in common, by their names; versions are compared with them.
    Raises: ConfigError if train.device asks for CUDA and there is none, or the ranks do not come together or were not
    started alike.
    Collective: all ranks.
    """
    faults.configure(launch.rank, get_logger(launch.rank).warning)
    device = choose_device(train.device, launch, "train.device=")
    precision = train.precision if train.precision != "auto" else ("bf16" if device.type == "cuda" else "fp32")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    else:
        torch.set_num_threads(cpu_threads(launch.local_world_size))
    backend = "nccl" if device.type == "cuda" else "gloo"
    meeting = _start_process_group(launch, backend, watchdog or WatchdogConfig(), running_versions() | dict(facts))
    return Environment(launch, device, torch.bfloat16 if precision == "bf16" else torch.float32, meeting)


def collective_limit(watchdog: WatchdogConfig) -> timedelta:
    """Time after which torch gives up a collective: long after the watchdog has ended a hang, and named it."""
    return timedelta(seconds=max(_LEAST_COLLECTIVE_S, 2 * (watchdog.step_s + watchdog.other_s)))


def cpu_threads(processes: int = 1) -> int:
    """Threads for each of so many computing processes on this host: its share of the cores, less one.

    The spare core is for loader workers and everything else. Threads of one operation wait for each other actively: a
    single other busy process on a full machine made two threads 2 to 5 times slower than one (docs/decisions.md).
    """
    return max(1, len(os.sched_getaffinity(0)) // processes - 1)


def stop() -> None:
    """Ends the process group of a run that finished; after an error the process just ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def choose_device(wanted: str, launch: Launch, option: str) -> torch.device:
    """This rank's device for "auto", "cpu" or "cuda"; `option` is what stands before the value in messages.

    Raises: ConfigError if it asks for CUDA and there is none, or not one for each rank of the host.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(f"{option}cuda but torch sees no CUDA device; give {option}auto or {option}cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {launch.local_rank} has no GPU of its own ({torch.cuda.device_count()} on this host); "
            "start at most one rank per GPU"
        )
    return torch.device("cuda", launch.local_rank)


def _start_process_group(
    launch: Launch, backend: str, watchdog: WatchdogConfig, facts: Mapping[str, str]
) -> Meeting | None:
    if dist.is_initialized():
        return rendezvous.alone() if launch.world_size == 1 else None
    timeout = collective_limit(watchdog)
    if launch.world_size == 1:
        # A store in memory: a single rank needs no port, so any number of runs can share a host.
        own_store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but absent from torch's stubs
        dist.init_process_group(backend, store=own_store, rank=0, world_size=1, timeout=timeout)
        return rendezvous.alone()
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} not set for {launch.world_size} ranks: use torchrun, deepspeed or "
            "slurm/train_ldm.sh, which set them"
        )
    one_host = launch.local_world_size >= launch.world_size
    store, meeting = rendezvous.meet(launch.rank, launch.world_size, facts, watchdog.rendezvous_s, one_host)
    own = meeting.places[launch.rank]
    get_logger().info(
        f"{launch.world_size} ranks on {len({place.host for place in meeting.places})} host(s) meet at "
        f"{meeting.address}:{meeting.port}; gloo's messages go through {own.interface or 'an interface of its choice'}"
    )
    # gloo connects every two ranks here, within its time limit for a collective.
    limit = timedelta(seconds=watchdog.rendezvous_s)
    try:
        dist.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=limit)
    except RuntimeError as error:
        raise ConfigError(
            f"rank {launch.rank} on {own.host} met the others at {meeting.address}:{meeting.port}, but {backend} does "
            f"not connect it with them ({str(error).partition(chr(10))[0]}): a firewall between the nodes, or "
            f"GLOO_SOCKET_IFNAME={os.environ.get('GLOO_SOCKET_IFNAME', '')} is not the network that they share"
        ) from None
    collectives.set_time_limit(timeout)
    return meeting
