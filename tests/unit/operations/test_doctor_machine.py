"""`ldm-scale doctor machine`: each check against what this host says by another way, and each planted want found."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import os
import re
import resource
import shutil
import tomllib
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import Config
from ldm_scale.engine import env, versions
from ldm_scale.engine.ops import read_ops
from ldm_scale.operations import doctor_kernel, doctor_machine, doctor_speed
from ldm_scale.operations.doctor_report import Report
from ldm_scale.planning.flops import NetworkSize, RunSize, measure_run
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config

CPU = env.Environment(env.Launch(), torch.device("cpu"), torch.float32)
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return tiny_config("autoencoder", tmp_path / "data" / "manifest.json", tmp_path / "runs" / "tiny")


def _lines(report: Report, level: str) -> list[str]:
    return [f"{f.where}: {f.what}" for f in report.findings if f.level == level]


def test_versions_are_those_installed_and_every_requirement_is_looked_at() -> None:
    report = Report("machine")
    doctor_machine.check_versions(report)
    assert report.exit_code == 0
    versions = report.facts["versions"]
    assert versions["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    with Path("pyproject.toml").open("rb") as stream:
        required = tomllib.load(stream)["project"]["dependencies"]
    assert {re.split("[=><]", text)[0] for text in required} <= set(versions)


def test_requirements_that_are_missing_or_too_old_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        versions,
        "declared",
        lambda: ["torch>=99.1", "numpy", "surely-not-there>=1", "also-not-there; extra == 'dev'"],
    )
    report = Report("machine")
    doctor_machine.check_versions(report)
    torch_version = importlib.metadata.version("torch")
    assert _lines(report, "error") == [
        f"torch: version {torch_version}, needed >=99.1",
        "surely-not-there: not installed, needed >=1",
    ]


def test_the_host_is_described_and_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("machine")
    doctor_machine.check_host(report)
    host = report.facts["host"]
    assert host["usable_cores"] == len(os.sched_getaffinity(0))
    assert host["memory_gib"] == pytest.approx(
        int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1]) / 2**20,  # type: ignore[index]
        rel=0.01,
    )
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 256))
    report = Report("machine")
    doctor_machine.check_host(report)
    assert _lines(report, "warning") == ["ulimit -n: at most 256 open files"]


def test_without_a_gpu_triton_is_said_not_to_run() -> None:
    report = Report("machine")
    doctor_machine.check_devices(report, CPU)
    assert report.exit_code == 0
    assert report.facts["triton"] == "not run"
    assert len(report.facts["gpus"]) == torch.cuda.device_count()


def test_gpus_are_named_with_their_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = namedtuple("properties", "name total_memory major minor")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: properties(f"card {n}", 80 * 2**30, 9, 0))
    monkeypatch.setattr(doctor_machine, "_driver_version", lambda: "580.1")
    checked: list[torch.device] = []
    monkeypatch.setattr(doctor_machine, "check_kernel", lambda report, device: checked.append(device))
    report = Report("machine")
    cuda = torch.device("cuda", 0)
    doctor_machine.check_devices(report, env.Environment(env.Launch(), cuda, torch.bfloat16))
    assert report.facts["gpus"][1] == {"name": "card 1", "memory_gib": 80.0, "capability": "9.0"}
    assert report.facts["driver"] == "580.1"
    assert checked == [cuda]


@pytest.mark.parametrize("fault", ["none", "wrong", "does not compile"])
def test_the_kernel_is_compared_with_the_reference(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = doctor_kernel.group_norm_silu

    def stand_in(*args: Any, backend: str, **options: Any) -> torch.Tensor:
        y = operation(*args, backend="reference", **options)
        if backend == "reference" or fault == "none":
            return y
        if fault == "wrong":
            return y * 1.001
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(doctor_kernel, "group_norm_silu", stand_in)
    report = Report("machine")
    doctor_kernel.check_kernel(report, torch.device("cpu"))
    assert report.exit_code == int(fault != "none")
    assert report.facts["triton"] == ("fails" if fault == "does not compile" else "works")
    if fault == "wrong":
        assert report.facts["triton_relative_error"] == pytest.approx(1e-3, rel=0.01)
    if fault == "does not compile":
        assert "RuntimeError: no C compiler)" in _lines(report, "error")[0]


def test_deepspeed_tells_its_ops_from_a_process_of_its_own() -> None:
    ops = read_ops("cpu")
    assert ops is not None
    assert {"cpu_adam", "deepspeed_shm_comm"} <= set(ops)
    assert all(set(state) == {"installed", "compatible"} for state in ops.values())


def test_deepspeed_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "read_ops", lambda device: None)
    report = Report("machine")
    doctor_machine.check_deepspeed_ops(report, CPU)
    assert report.exit_code == 1
    monkeypatch.setattr(
        doctor_machine,
        "read_ops",
        lambda device: {
            "a": {"installed": True, "compatible": True},
            "b": {"installed": False, "compatible": True},
            "c": {"installed": False, "compatible": False},
        },
    )
    report = Report("machine")
    doctor_machine.check_deepspeed_ops(report, CPU)
    assert "ops built: a; could be built: a, b; ldm-scale needs none" in _lines(report, "ok")[0]


def test_disks_are_measured_and_nothing_stays(tmp_path: Path, config: Config) -> None:
    report = Report("machine")
    doctor_machine.check_folders(report, config, measure_run(config))
    assert report.exit_code == 0
    disks = report.facts["disks"]
    assert set(disks) == {"run_dir", "data.manifest"}
    assert disks["run_dir"]["folder"] == str(tmp_path)  # the nearest folder that exists: none is made
    assert disks["run_dir"]["write_mib_per_s"] > 0
    assert disks["run_dir"]["free_gib"] == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, rel=0.05)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fails_in_the_middle_keeps_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        assert os.fstat(descriptor).st_size == 2**20
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        doctor_speed.measure_disk(tmp_path, num_bytes=2**20)
    assert list(tmp_path.iterdir()) == []


def test_a_full_or_slow_or_closed_disk_is_told(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    size = measure_run(config)
    weights = 4 * size.trained.parameters

    def findings(free: int, measure: Any) -> Report:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, free))
        monkeypatch.setattr(doctor_speed, "measure_disk", measure)
        report = Report("machine")
        doctor_machine.check_folders(report, config, size)
        return report

    fast = lambda folder: doctor_speed.DiskSpeed(500.0, 500.0)  # noqa: E731
    slow = lambda folder: doctor_speed.DiskSpeed(5.0, 500.0)  # noqa: E731

    def closed(folder: Path) -> doctor_speed.DiskSpeed:
        raise PermissionError(13, "Permission denied")

    # A checkpoint is weights, two moments and, here, the EMA; two are kept while a third is written.
    assert findings(12 * weights, fast).findings[0].level == "ok"
    assert "checkpoints take" in _lines(findings(12 * weights - 1, fast), "warning")[0]
    assert findings(4 * weights - 1, fast).exit_code == 1
    # Two profiles, snapshot twice in fp16: two more averages in three checkpoints, and as much again on disk.
    ema = dataclasses.replace(config.ema, power_stds=(0.05, 0.1), snapshot_every_images=config.train.total_images // 2)
    config = dataclasses.replace(config, ema=ema)
    assert findings(20 * weights, fast).findings[0].level == "ok"
    assert "3 checkpoints and all snapshots take" in _lines(findings(20 * weights - 1, fast), "warning")[0]
    assert len(_lines(findings(2**40, slow), "warning")) == 2
    report = findings(2**40, closed)
    assert [line[: len("run_dir")] for line in _lines(report, "error")] == ["run_dir"]
    assert "data.manifest" in _lines(report, "warning")[0]


def test_small_shared_memory_is_told(config: Config) -> None:
    roomy = tiny_config("autoencoder", Path("m"), Path("r/x"), data={"num_workers": 4, "resolution": 512})

    def warnings(config: Config, launch: env.Launch) -> list[str]:
        report = Report("machine", facts={"host": {"shm_gib": 0.06}})
        doctor_machine.check_shared_memory(report, config, launch)
        return _lines(report, "warning")

    # 4 workers x 5 batches x 8 images x 3 x 512 x 512 numbers of 4 bytes, over all ranks.
    assert "hold up to 0.47 GiB" in warnings(roomy, env.Launch())[0]
    assert "hold up to 0.47 GiB" in warnings(roomy, env.Launch(world_size=4, local_world_size=4))[0]
    assert "hold up to 0.23 GiB" in warnings(roomy, env.Launch(world_size=4, local_world_size=2))[0]
    assert warnings(config, env.Launch()) == []


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_the_step_is_clocked_against_the_plan(stage: str, tmp_path: Path) -> None:
    config = tiny_config(stage, tmp_path / "manifest.json", tmp_path / "run")
    report, size = Report("machine"), measure_run(config)
    doctor_machine.check_step(report, config, size, CPU)
    step = report.facts["step"]
    assert step["batch"] == 8
    forward = size.trained.forward_flops + (size.tau_theta.forward_flops if size.tau_theta else 0)
    assert step["planned_forward_flops"] == forward
    assert step["images_per_s"] == pytest.approx(8 / step["step_s"], rel=0.02)
    assert step["tflops"] * 1e12 == pytest.approx(3 * forward * 8 / step["step_s"], rel=0.1, abs=1e8)
    assert 0 < step["share_of_matmul"] < 1
    assert step["ranks_images_per_s"] == [step["images_per_s"]]


def test_a_step_trains_the_network(tmp_path: Path) -> None:
    config = tiny_config("diffusion", tmp_path / "m", tmp_path / "r")
    seen: list[torch.optim.Optimizer] = []
    step = doctor_speed._training_step(config, measure_run(config), torch.device("cpu"), torch.float32, 2)
    hook = register_optimizer_step_post_hook(lambda adam, *_: seen.append(adam))
    step()
    hook.remove()
    (adam,) = seen
    parameters = adam.param_groups[0]["params"]
    assert sum(p.numel() for p in parameters) == measure_run(config).trained.parameters
    assert all(p.grad is None for p in parameters)  # freed for the next one
    assert len(adam.state) == len(parameters)  # every weight had a gradient


@pytest.mark.parametrize(
    ("parameters", "flops", "said"),
    [(10, 10**18, "one image would take over"), (10**13, 10, "weights and moments take"), (0, 0, "it trains nothing")],
)
def test_a_step_that_is_too_much_for_the_machine_is_not_tried(
    parameters: int, flops: int, said: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_speed, "measure_step", lambda *_: pytest.fail("it was tried"))
    monkeypatch.setattr(doctor_speed, "measure_matmul", lambda *_: 1e11)
    half = NetworkSize(parameters, flops)
    report = Report("machine")
    doctor_machine.check_step(report, config, RunSize((3, 8, 8), half, half), CPU)
    assert said in _lines(report, "warning")[0]
    assert "images_per_s" not in report.facts["step"]


def test_a_large_batch_is_halved_until_a_step_takes_seconds(config: Config) -> None:
    # 3 x 1e9 FLOP an image at a quarter of 1e9 FLOP/s: 12 s an image; at 1e10, 1.2 s, so 4 of 8 images.
    assert doctor_speed.choose_batch(config, 10**9, 1, 1e9) == 0
    assert doctor_speed.choose_batch(config, 10**9, 1, 1e10) == 4
    assert doctor_speed.choose_batch(config, 10**9, 2, 1e12) == 4


def test_the_step_of_a_classifier_is_clocked_too() -> None:
    overrides = ["stage=classifier", "unet.attention=self", "conditioning=none", "classifier.num_classes=3"]
    config = load_config(["experiment=demo_text", "data.resolution=32", *overrides])
    assert doctor_speed.measure_step(config, measure_run(config), CPU, 2).images_per_s > 0


def test_a_gpu_that_is_too_small_gets_smaller_batches(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def build(config: Config, size: RunSize, device: object, dtype: object, batch: int) -> Any:
        tried.append(batch)
        if batch > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return lambda: None

    monkeypatch.setattr(doctor_speed, "_training_step", build)
    assert doctor_speed.measure_step(config, measure_run(config), CPU, 8).batch == 2
    assert tried == [8, 4, 2]


def test_a_slow_rank_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "gather_objects", lambda rate: [100.0, 99.0, 40.0, None])
    report = Report("machine")
    doctor_machine.check_step(report, config, measure_run(config), CPU)
    assert [line.partition(":")[0] for line in _lines(report, "warning")] == ["rank 2", "rank 3"]


def test_matrix_products_are_timed_by_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_speed, "_durations", lambda *_: [0.5, 0.25, 1.0])
    assert doctor_speed.measure_matmul(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.25


def test_one_rank_has_no_bandwidth() -> None:
    report = Report("machine")
    doctor_machine.check_ranks(report, CPU)
    assert report.facts["ranks"] is None
    assert "not measured with one rank" in _lines(report, "ok")[0]


def _whole(config: Config) -> tuple[Report, float]:
    doctor_machine.read_ops = lambda device: {}  # type: ignore[assignment]  # in this process, which ends with the test
    report = doctor_machine.run(argparse.Namespace(config=config, overrides=[]))
    return report, report.facts["ranks"]["all_reduce_gib_per_s"]


def test_two_ranks_measure_together_and_rank_0_looks_at_the_host(tmp_path: Path) -> None:
    config = tiny_config("autoencoder", tmp_path / "manifest.json", tmp_path / "run")
    (first, bandwidth), (second, _) = run_ranks(_whole, 2, config)
    assert bandwidth > 0
    assert first.facts["ranks"]["world_size"] == 2
    assert first.facts["ranks"]["latency_us"] > 0
    assert first.facts["step"]["batch"] == 4
    assert len(first.facts["step"]["ranks_images_per_s"]) == 2
    assert {"versions", "host", "disks", "deepspeed_ops"} <= set(first.facts)
    assert "versions" not in second.facts


def test_bandwidth_counts_what_each_rank_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_speed, "_durations", lambda *_: [0.5])
    four = env.Environment(env.Launch(world_size=4), torch.device("cpu"), torch.float32)
    # A ring sends 2 (n - 1) / n of the bytes: 1.5 x 64 MiB in half a second.
    assert doctor_speed.measure_ranks(four).gib_per_s == pytest.approx(1.5 * 64 / 1024 / 0.5)  # type: ignore[union-attr]
