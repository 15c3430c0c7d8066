"""Ranks that cannot come together, or were not started alike, are told why within seconds, on every rank."""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ldm_scale.config.schema import TrainConfig, WatchdogConfig
from ldm_scale.data import open_manifest
from ldm_scale.engine import env, network, rendezvous
from ldm_scale.errors import ConfigError
from ldm_scale.interchange.artifact import read_artifact
from ldm_scale.operations import train as operations
from tests.helpers.latents import other_artifact
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.shards import make_dataset

WAIT_S = 2.0
SECONDS = 10.0  # that an error may take, on a busy machine


def _start(changes: dict[int, dict[str, str]], facts: dict[int, dict[str, str]]) -> tuple[str, float]:
    """What a rank is told, and after how many seconds; `changes` are environment variables and `facts` by rank."""
    rank = int(os.environ["RANK"])
    os.environ |= changes.get(rank, {}) | changes.get(-1, {})
    started = time.perf_counter()
    try:
        env.start(
            env.read_launch(), TrainConfig(device="cpu"), WatchdogConfig(rendezvous_s=WAIT_S), facts.get(rank, {})
        )
    except ConfigError as error:
        return str(error), time.perf_counter() - started
    return "", time.perf_counter() - started


def _told(ranks: int, changes: dict[int, dict[str, str]], facts: dict[int, dict[str, str]] | None = None) -> list[str]:
    results: list[Any] = run_ranks(_start, ranks, changes, facts or {})
    assert max(seconds for _, seconds in results) < SECONDS
    return [message for message, _ in results]


def test_a_rank_that_does_not_come_is_named() -> None:
    everyone = {-1: {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}}
    for message in _told(2, everyone):
        assert "2 of 4 ranks have not come within 2 s: rank(s) 2, 3; those that came run on" in message


def test_a_rank_that_cannot_reach_rank_0_says_where_it_looked() -> None:
    first, second = _told(2, {1: {"MASTER_PORT": "1"}})
    assert "1 of 2 ranks have not come within 2 s: rank(s) 1;" in first
    assert second.startswith(f"rank 1 on {network.host_name()} does not reach rank 0 at 127.0.0.1:1 ")


def test_two_ranks_of_one_number_are_named() -> None:
    messages = _told(3, {-1: {"WORLD_SIZE": "3"}, 2: {"RANK": "1"}})
    assert sum("two processes say that they are rank 1 of 3" in message for message in messages) == 1
    assert "rank(s) 2;" in messages[0]


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        first = _told(1, {-1: {"WORLD_SIZE": "2", "MASTER_PORT": port}})[0]
    assert first.startswith(f"port {port} of 127.0.0.1 (127.0.0.1) is taken by another process")
    assert "set MASTER_PORT" in first


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": "no..host"}, r"MASTER_ADDR=no\.\.host has no address on "),
        (
            {"MASTER_ADDR": "192.0.2.1"},
            r"MASTER_ADDR=192\.0\.2\.1 \(192\.0\.2\.1\) is not an address of .*127\.0\.0\.1",
        ),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http: must be a port from 1 to 65535"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: must be a port"),
        ({"GLOO_SOCKET_IFNAME": "none7"}, "GLOO_SOCKET_IFNAME=none7: .* has no interface none7; it has .*lo"),
        ({"GLOO_SOCKET_IFNAME": "l"}, "has no interface l;"),  # gloo takes whole names
        ({"NCCL_SOCKET_IFNAME": "=l"}, "has no interface l;"),
        (
            {"LOCAL_WORLD_SIZE": "1"},
            r"MASTER_ADDR=127\.0\.0\.1 is 127\.0\.0\.1 on .* itself, an entry of its /etc/hosts",
        ),
    ],
)
def test_an_address_that_cannot_work_is_named(variables: dict[str, str], message: str) -> None:
    (told,) = _told(1, {-1: {"WORLD_SIZE": "2", **variables}})
    assert re.search(message, told), told


def test_what_differs_between_ranks_is_named_with_both_values() -> None:
    same = {"train.seed": "1", "digest of the data": "aa"}
    facts = {
        0: same,
        1: same | {"train.seed": "2"},
        2: same | {"digest of the data": "bb"},
        3: same | {"train.seed": "2"},
    }
    host = network.host_name()
    for message in _told(4, {}, facts):
        assert f"train.seed is 2 on rank(s) 1, 3 ({host}) and 1 on rank 0" in message
        assert f"digest of the data is bb on rank(s) 2 ({host}) and aa on rank 0" in message
    (first, second) = _told(2, {}, {0: same, 1: {"train.seed": "1"}})
    assert first == second
    assert "digest of the data is absent on rank(s) 1" in first


def _train(manifest: Path, run_dir: Path) -> str:
    rank = int(os.environ["RANK"])
    train = {"seed": rank, "total_images": 8}
    config = tiny_config("autoencoder", manifest, run_dir, train=train, watchdog={"rendezvous_s": WAIT_S})
    try:
        operations.train(config, env.read_launch())
    except ConfigError as error:
        return str(error)
    return ""


def test_the_command_compares_configurations_before_anything_is_built(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", num_samples=16, samples_per_shard=16, resolution=20)
    for message in run_ranks(_train, 2, manifest, tmp_path / "run"):
        expected = (
            f"the ranks were not started alike: train.seed is 1 on rank(s) 1 ({network.host_name()}) and 0 on rank 0"
        )
        assert message.startswith(expected)
    assert not (tmp_path / "run").exists()


def _train_on_own_copy(folder: Path) -> tuple[str, float]:
    """What a rank is told, and after how many seconds, whose host has other files than rank 0's at the same place."""
    os.chdir(folder / f"host{os.environ['RANK']}")
    data = {"validation_split": "heldout"}
    config = tiny_config("diffusion", Path("data/manifest.json"), folder / "run", data=data)
    config = dataclasses.replace(config, artifact="artifact")
    started, told = time.perf_counter(), ""
    try:
        operations.train(config, env.read_launch())
    except ConfigError as error:
        told = str(error)
    return told, time.perf_counter() - started


def _digest(host: Path, what: str) -> str:
    if what == "artifact":
        return read_artifact(host / what).content_hash
    return open_manifest(host / "data" / "manifest.json", SPLITS[what], check_sizes=True).digest


SPLITS = {"data": "train", "validation data": "heldout"}


@pytest.mark.parametrize("what", [*SPLITS, "artifact"])
def test_ranks_with_other_files_at_the_same_place_end_within_seconds(tmp_path: Path, what: str) -> None:
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    for number, host in enumerate(hosts):
        for name, split in SPLITS.items():
            num_samples = 24 if number and name == what else 16
            make_dataset(host / "data", num_samples, splits=(split,))
        (other_artifact if number and what == "artifact" else tiny_artifact)(host / "artifact")
    first, other = (_digest(host, what) for host in hosts)
    for message, seconds in run_ranks(_train_on_own_copy, 2, tmp_path):
        assert message.startswith(
            f"the ranks were not started alike: digest of the {what} is {other} on rank(s) 1 "
            f"({network.host_name()}) and {first} on rank 0 ({network.host_name()}). "  # and nothing else differs
        )
        assert seconds < SECONDS
    assert not (tmp_path / "run").exists()


def _with_another_torch() -> tuple[str, float]:
    if os.environ["RANK"] == "1":
        env.running_versions = lambda: rendezvous_versions | {"version of torch": "2.0.0"}  # type: ignore[assignment]
    return _start({}, {})


rendezvous_versions = env.running_versions()


def test_another_version_on_one_rank_is_named() -> None:
    results: list[Any] = run_ranks(_with_another_torch, 2)
    for message, _ in results:
        assert f"version of torch is 2.0.0 on rank(s) 1 ({network.host_name()}) and " in message
        assert "; " not in message.partition(": ")[2], "only torch differs"


def _rank_0_goes() -> None:
    def leave(store: Any, *_: Any) -> dict[str, Any]:
        while not store.check(["report 1"]):
            time.sleep(0.01)
        os._exit(0)

    rendezvous._lead = leave
    raise AssertionError(_start({}, {})[0])


def test_a_rank_0_that_dies_is_named() -> None:
    with pytest.raises(
        AssertionError, match=r"rank 1 on .*: rank 0 at 127\.0\.0\.1:\d+ went away while the ranks were"
    ):
        run_ranks(_rank_0_goes, 2)


def _listeners() -> tuple[set[str], str, int]:
    environment = env.start(env.read_launch(), TrainConfig(device="cpu"))
    assert environment.meeting is not None
    port = f"{environment.meeting.port:04X}"
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    listening = {row[1] for row in rows if row[1].endswith(f":{port}") and row[3] == "0A"}
    total = dist.get_world_size()
    dist.barrier()
    return listening, os.environ["GLOO_SOCKET_IFNAME"], total


def test_the_store_listens_on_the_address_of_the_rendezvous_alone() -> None:
    for listening, interface, total in run_ranks(_listeners, 2):
        assert [entry.partition(":")[0] for entry in listening] == ["0100007F"]
        assert (interface, total) == ("lo", 2)


def _interface_variables(one_host: bool) -> tuple[str | None, str | None]:
    os.environ["MASTER_ADDR"] = "0.0.0.0"  # this host, and none of the loopback's addresses
    rendezvous.meet(0, 1, {}, WAIT_S, one_host)
    return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")


def test_between_hosts_nccl_takes_the_same_interface() -> None:
    assert run_ranks(_interface_variables, 1, False) == [("lo", "=lo")]
    assert run_ranks(_interface_variables, 1, True) == [("lo", None)]


def test_interfaces_are_read_from_the_system() -> None:
    assert "127.0.0.1" in network.addresses_of("lo")
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("192.0.2.1") is None
    assert network.is_up("lo")
    assert not network.is_up("none7")
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    assert network.trouble("none7", "127.0.0.1", 1) == "", "refused: the host is there"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        seconds = network.round_trip_s("127.0.0.1", server.getsockname()[1])
    assert seconds is not None
    assert 0 < seconds < 0.5
    assert network.round_trip_s("127.0.0.1", 1) is None
