"""Each launcher's variables say who a process is; incomplete and impossible ones are refused before anything starts."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env
from ldm_scale.engine.env import Launch, read_launch
from ldm_scale.errors import ConfigError
from tests.helpers.ranks import run_ranks

OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables."""
    for name in os.environ:
        if name in OURS or name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    return monkeypatch


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch(0, 1, 0, 1)),
        (TORCHRUN, Launch(5, 8, 1, 4)),
        (DEEPSPEED, Launch(5, 8, 1, 4)),
        (SRUN, Launch(5, 8, 1, 4)),
        ({**SRUN, **TORCHRUN, "RANK": "6"}, Launch(6, 8, 1, 4)),  # a launcher inside an allocation has the last word
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, Launch()),
        ({"SLURM_NTASKS": "8"}, Launch()),  # a shell inside salloc: nobody has started eight of us
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, Launch(0, 2, 0, 2)),
    ],
)
def test_launchers(environ: pytest.MonkeyPatch, variables: dict[str, str], expected: Launch) -> None:
    for name, value in variables.items():
        environ.setenv(name, value)
    assert read_launch() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, r"WORLD_SIZE, LOCAL_RANK missing while RANK"),
        ({"WORLD_SIZE": "2"}, r"RANK, LOCAL_RANK missing"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"LOCAL_RANK missing"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, r"SLURM_LOCALID missing"),
        ({**TORCHRUN, "RANK": "8"}, r"RANK=8 is outside 0\.\.7 \(WORLD_SIZE=8\)"),
        ({**TORCHRUN, "RANK": "-1"}, r"RANK=-1: must be a whole number of at least 0"),
        ({**SRUN, "SLURM_PROCID": "9"}, r"SLURM_PROCID=9 is outside 0\.\.7 \(SLURM_NTASKS=8\)"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, r"WORLD_SIZE=two"),
        ({**TORCHRUN, "LOCAL_RANK": ""}, r"LOCAL_RANK="),
        ({**SRUN, "SLURM_NTASKS": "many"}, r"SLURM_NTASKS=many"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, r"LOCAL_WORLD_SIZE=0"),
    ],
)
def test_impossible_variables_are_named(environ: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        environ.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        read_launch()


def test_ranks_without_an_address_are_told_what_sets_it(environ: pytest.MonkeyPatch) -> None:
    environ.setenv("MASTER_PORT", "29500")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR not set for 2 ranks: use torchrun"):
        env.start(Launch(0, 2, 0, 2), TrainConfig(device="cpu"))
    assert not dist.is_initialized()


def test_devices_that_are_not_there_are_refused(environ: pytest.MonkeyPatch) -> None:
    environ.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"train\.device=cuda but torch sees no CUDA device"):
        env.start(Launch(), TrainConfig(device="cuda"))
    environ.setattr(torch.cuda, "is_available", lambda: True)
    environ.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"local rank 2 has no GPU of its own \(2 on this host\)"):
        env.start(Launch(2, 4, 2, 4), TrainConfig(device="auto"))
    assert not dist.is_initialized()


def _started(precision: str) -> tuple[int, int, bool, str, str, bool]:
    environment = env.start(read_launch(), TrainConfig(device="cpu", precision=precision))  # type: ignore[arg-type]
    summary = (environment.rank, environment.world_size, environment.is_main, str(environment.dtype))
    line = environment.describe()
    env.stop()
    return *summary, line, dist.is_initialized()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_started_rank_knows_its_place_and_type(ranks: int) -> None:
    for rank, report in enumerate(run_ranks(_started, ranks, "auto")):
        line = f"{ranks} rank(s) on cpu (gloo), float32, activations in channels_last"
        assert report == (rank, ranks, rank == 0, "torch.float32", line, False)
    assert run_ranks(_started, 1, "bf16")[0][3] == "torch.bfloat16"


class _Tensor:
    """Stands for a tensor on its way to a GPU, which is not here: notes what is done to it."""

    def __init__(self, place: str, pinned: bool = False) -> None:
        self.device, self._pinned = torch.device(place), pinned
        self.done: list[object] = []

    def is_pinned(self) -> bool:
        return self._pinned

    def pin_memory(self) -> _Tensor:
        self.done.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool) -> _Tensor:
        self.done.append((device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("target", "place", "pinned", "expected"),
    [
        ("cuda", "cpu", False, ["pinned", ("cuda", True)]),
        ("cuda", "cpu", True, [("cuda", True)]),
        ("cuda", "cuda", False, [("cuda", True)]),
        ("cpu", "cpu", False, [("cpu", True)]),
    ],
)
def test_copies_to_a_gpu_are_from_pinned_memory(target: str, place: str, pinned: bool, expected: list[object]) -> None:
    x = _Tensor(place, pinned)
    env.Environment(Launch(), torch.device(target), torch.float32).put(x)  # type: ignore[arg-type]
    assert x.done == expected
