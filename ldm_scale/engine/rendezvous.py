"""The ranks find each other, and compare what they were started with, before anything is built.

Rank 0 opens torch's store on MASTER_ADDR and MASTER_PORT, bound to that address alone, and leaves its facts there;
every other rank compares its own with them and leaves its place and what differs; rank 0 waits for all of them and
leaves the outcome. Whatever keeps them apart (a name without an address, a port that is taken, a rank that does not
come, two ranks of one number, other versions or configurations) is an error that names it, on every rank that can be
reached, within `wait_s`.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore  # torch.distributed's, with types

from ldm_scale.engine import network
from ldm_scale.errors import ConfigError

POLL_S = 0.05
_READ_S = 5.0  # that rank 0 stays for the others to read an outcome that ends the run
_SHOWN = 8  # ranks, or differences, that a message lists


@dataclass(frozen=True)
class Place:
    """Where a rank runs."""

    host: str
    pid: int
    pid_space: str  # processes know each other by number where this is equal
    interface: str  # through which it reaches the others


@dataclass(frozen=True)
class Meeting:
    """All ranks of a run, as they found each other."""

    places: tuple[Place, ...]
    started_s: float  # rank 0's clock, the same on every rank: what this start of the run is called
    address: str = ""  # where rank 0 listens; "" with one rank
    port: int = 0


def alone() -> Meeting:
    """The meeting of a run on one rank."""
    return Meeting((_place(""),), time.time())


def meet(
    rank: int, world_size: int, facts: Mapping[str, str], wait_s: float, one_host: bool = True
) -> tuple[Store, Meeting]:
    """The store that the process group starts on, and who came.

    `facts` are texts that all ranks must have in common, by their names; `one_host` says that all ranks are on one.
    Sets GLOO_SOCKET_IFNAME, and between hosts NCCL_SOCKET_IFNAME, where nobody did.
    Raises: ConfigError as the module says.
    Collective: all ranks.
    """
    deadline = time.monotonic() + wait_s
    host, address, port = _master()
    if rank == 0 and not one_host and address.startswith("127."):
        raise ConfigError(
            f"MASTER_ADDR={host} is {address} on {network.host_name()} itself, an entry of its /etc/hosts maybe, where "
            "other hosts cannot reach it; set MASTER_ADDR to this host's address in the network"
        )
    interface = _interface(host, address)
    if interface and not one_host:
        # NCCL would get in touch through the first one that it finds; data takes InfiniBand where there is any.
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    store = _prefixed(_open_store(rank, host, address, port, wait_s, deadline))
    place = _place(interface)
    who = f"rank {rank} on {place.host}"
    try:
        if store.add(f"rank {rank}", 1) > 1:
            raise ConfigError(
                f"two processes say that they are rank {rank} of {world_size}, one of them on {place.host}: start each "
                "rank with its own RANK (or SLURM_PROCID), and only one run on a MASTER_ADDR and MASTER_PORT"
            )
        if rank == 0:
            store.set("facts", json.dumps(dict(facts)))
            outcome = _lead(store, place, world_size, wait_s, deadline)
        else:
            differences = _differences(json.loads(_get(store, "facts", deadline, who)), facts)
            store.set(f"report {rank}", json.dumps({"place": asdict(place), "differences": differences}))
            outcome = json.loads(_get(store, "outcome", deadline + _READ_S, who))
            store.add("read", 1)
    except dist.DistError as error:
        raise ConfigError(
            f"{who}: rank 0 at {host}:{port} went away while the ranks were meeting ({_first_line(error)}); see "
            "what it says"
        ) from None
    if outcome["problem"]:
        raise ConfigError(outcome["problem"])
    places = tuple(Place(**given) for given in outcome["places"])
    return store, Meeting(places, outcome["started_s"], address, port)


def _master() -> tuple[str, str, int]:
    """MASTER_ADDR as given and as an address, and MASTER_PORT."""
    host, text = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise ConfigError(f"MASTER_PORT={text}: must be a port from 1 to 65535; launchers set it")
    try:
        return host, network.resolve(host, int(text)), int(text)
    except (OSError, UnicodeError) as error:  # the second: a name that cannot be one
        raise ConfigError(
            f"MASTER_ADDR={host} has no address on {network.host_name()} ({error}); set it to the name or the "
            "address of the node that rank 0 runs on"
        ) from None


def _interface(host: str, address: str) -> str:
    """The interface that the ranks' messages take; the user's, or the one on the way to rank 0."""
    variables = {name: os.environ[name] for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name in os.environ}
    for name, value in variables.items():
        _require_interface(name, value)
    if variables.get("GLOO_SOCKET_IFNAME"):
        return variables["GLOO_SOCKET_IFNAME"].split(",")[0]
    try:
        own = network.address_towards(address)
    except OSError as error:
        raise ConfigError(
            f"no way leads from {network.host_name()} to MASTER_ADDR={host} ({address}): {error.strerror}; its network "
            "is down, or MASTER_ADDR is an address of another network"
        ) from None
    interface = network.interface_of(own)
    if interface is None:
        return ""
    # gloo would take the interface that this host's own name resolves to, on many systems the loopback's.
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    return interface


def _require_interface(variable: str, value: str) -> None:
    """Nothing, if every interface that the variable names is there. NCCL's are prefixes, "=" and "^" are its signs."""
    there = network.interfaces()
    if value.startswith("^"):
        return
    exact = variable.startswith("GLOO") or value.startswith("=")
    for name in value.removeprefix("=").split(","):
        if not any(found == name if exact else found.startswith(name.partition(":")[0]) for found in there):
            raise ConfigError(
                f"{variable}={value}: {network.host_name()} has no interface {name}; it has {', '.join(there)}. Unset "
                "the variable to take the one on the way to MASTER_ADDR"
            )


def _open_store(rank: int, host: str, address: str, port: int, wait_s: float, deadline: float) -> Store:
    """Torch's store: served by rank 0, or by torchrun's agent."""
    # Its own time limit serves single requests to a store that is there.
    timeout = timedelta(seconds=max(30.0, wait_s))
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        fd = _listen(host, address, port)
        return TCPStore(address, port, None, True, timeout, wait_for_workers=False, master_listen_fd=fd)
    while network.round_trip_s(address, port) is None:
        if time.monotonic() > deadline:
            raise ConfigError(
                f"rank {rank} on {network.host_name()} does not reach rank 0 at {host}:{port} ({address}) after "
                f"{wait_s:g} s: rank 0 did not start there, another port was meant, or a firewall or a wrong interface "
                "is between them; check MASTER_ADDR and MASTER_PORT (watchdog.rendezvous_s allows more time)"
            )
        time.sleep(POLL_S)
    return TCPStore(address, port, None, False, timeout, wait_for_workers=False)


def _listen(host: str, address: str, port: int) -> int:
    try:
        return network.listen(address, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} ({address}) is taken by another process, maybe another run: set MASTER_PORT to "
                "a free one (slurm/train_ldm.sh makes it from the job's number)"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"MASTER_ADDR={host} ({address}) is not an address of {network.host_name()}, where rank 0 runs; set it "
                "to one of: " + ", ".join(a for name in network.interfaces() for a in network.addresses_of(name))
            ) from None
        raise ConfigError(f"rank 0 cannot listen at {host}:{port}: {error.strerror}") from None


def _prefixed(store: Store) -> Store:
    """The store, with names of this start of this run alone: an agent's outlives a restart."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_RESTART_COUNT")
    return PrefixStore("/".join(["ldm-scale", *(os.environ.get(name, "") for name in names)]), store)


def _lead(store: Store, place: Place, world_size: int, wait_s: float, deadline: float) -> dict[str, Any]:
    """Rank 0's part: the outcome, once all ranks have reported or the time is over."""
    missing, reports = set(range(1, world_size)), {0: {"place": asdict(place), "differences": {}}}
    while missing and time.monotonic() < deadline:
        for rank in [rank for rank in sorted(missing) if store.check([f"report {rank}"])]:
            reports[rank] = json.loads(store.get(f"report {rank}"))
            missing.remove(rank)
        time.sleep(POLL_S if missing else 0)
    problem = _who_is_missing(sorted(missing), reports, wait_s) if missing else _what_differs(reports)
    outcome: dict[str, Any] = {"problem": problem, "places": [], "started_s": time.time()}
    if not problem:
        outcome["places"] = [reports[rank]["place"] for rank in range(world_size)]
    store.set("outcome", json.dumps(outcome))
    given_up = time.monotonic() + _READ_S
    while problem and store.add("read", 0) < len(reports) - 1 and time.monotonic() < given_up:
        time.sleep(POLL_S)
    return outcome


def _who_is_missing(missing: Sequence[int], reports: Mapping[int, Any], wait_s: float) -> str:
    hosts = ", ".join(sorted({report["place"]["host"] for report in reports.values()}))
    return (
        f"{len(missing)} of {len(missing) + len(reports)} ranks have not come within {wait_s:g} s: rank(s) "
        f"{_listed(missing)}; those that came run on {hosts}. See what the missing ones say in the log, and whether "
        "their nodes are up (watchdog.rendezvous_s allows more time)"
    )


def _what_differs(reports: Mapping[int, Any]) -> str:
    """What the ranks were not started alike with, "" if that is nothing."""
    found: dict[str, dict[tuple[str, str], list[int]]] = {}  # by name, then by rank 0's value and the other
    for rank, report in sorted(reports.items()):
        for name, values in report["differences"].items():
            found.setdefault(name, {}).setdefault((values[0], values[1]), []).append(rank)
    lines = []
    for name, values in list(found.items())[:_SHOWN]:
        for (first, other), ranks in values.items():
            hosts = ", ".join(sorted({reports[rank]["place"]["host"] for rank in ranks}))
            lines.append(f"{name} is {other} on rank(s) {_listed(ranks)} ({hosts}) and {first} on rank 0")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    if not found:
        return ""
    return (
        f"the ranks were not started alike: {'; '.join(lines)}{more} ({reports[0]['place']['host']}). Start all of "
        "them by one command, in one environment and on the same files"
    )


def _differences(first: Mapping[str, str], own: Mapping[str, str]) -> dict[str, list[str]]:
    """Rank 0's value and this rank's, by name, where they differ."""
    names = [*first, *(name for name in own if name not in first)]
    pairs = {name: [first.get(name, "absent"), own.get(name, "absent")] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _get(store: Store, key: str, deadline: float, who: str) -> str:
    # By looking again and again: torch's own waiting logs its time limits as failures.
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise ConfigError(f"{who}: rank 0 is reached but does not answer; see what it says")
        time.sleep(POLL_S)
    return str(store.get(key).decode())


def _place(interface: str) -> Place:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        space = f"rank's own, process {os.getpid()}"  # nobody looks it up
    return Place(network.host_name(), os.getpid(), space, interface)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:_SHOWN])) + (" ..." if len(ranks) > _SHOWN else "")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
