"""The ladder of the training step: its rungs add up, compute the same, and one that does not has no speed-up."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import step_ladder, step_sweeps, step_ways
from benchmarks.unet_step import Case, random_batch
from ldm_scale.config.schema import TrainConfig
from ldm_scale.engine import env
from ldm_scale.errors import ConfigError
from ldm_scale.models.compiled import compile_blocks, compiled_kinds
from ldm_scale.models.convolution import Conv2d
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import UNET

CPU = torch.device("cpu")
CASE = Case(UNET, batch=2, latent_channels=3, latent_side=8, context_tokens=4, context_width=16)


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are compiled in one test alone, in a process of its own."""

    def check_compiler(device: torch.device) -> None:
        raise ConfigError("no compiler")

    monkeypatch.setattr(step_ways, "check_compiler", check_compiler)


def test_every_rung_adds_to_the_one_before_and_a_cpu_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert [rung.missing for rung in step_ways.rungs(CPU) if rung.name == "+ blocks compiled"] == ["no compiler"]
    monkeypatch.setattr(step_ways, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    winners = tmp_path / "winners.json"
    winners.write_text('{"attention": [{"gpu": "another GPU"}]}')
    monkeypatch.setattr(step_ways, "WINNERS", winners)
    on_cpu, on_gpu = step_ways.rungs(CPU), step_ways.rungs(torch.device("cuda"))
    assert [rung.name for rung in on_cpu] == [rung.name for rung in on_gpu]
    assert [rung.name for rung in on_gpu if rung.missing] == ["+ attention by the measured winner"]
    assert any("no winners have been measured on a GPU" in rung.missing for rung in on_gpu)
    winners.write_text('{"attention": [{"gpu": "a GPU"}]}')
    on_gpu = step_ways.rungs(torch.device("cuda"))
    assert not any(rung.missing for rung in on_gpu)
    missing = [rung.name for rung in on_cpu if rung.missing]
    assert missing == [rung.name for rung in on_gpu if "kernel" in rung.name or "winner" in rung.name]
    for before, after in pairwise(on_gpu):
        old, new = _flat(before.setting), _flat(after.setting)
        assert len([key for key in old if old[key] != new[key]]) == 1, after.name
    last = on_gpu[-1].setting.kernels
    assert {last.group_norm_silu, last.attention, last.geglu} == {"auto"}


def _flat(setting: step_ways.Setting) -> dict[str, Any]:
    found = asdict(setting)
    return found.pop("kernels") | found


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_setting_has_its_layout_throughout_the_network(channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if channels_last:
        monkeypatch.setattr(Conv2d, "_weight_is_larger", lambda self, x: False)  # as on a GPU
    module, layouts = step_ways.network(CASE, CPU), set()

    def note(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if min(inputs[0].shape[1:]) > 1:
            layouts.add(inputs[0].is_contiguous(memory_format=torch.channels_last))

    batch = random_batch(CASE, CPU)
    with step_ways.using(module, step_ways.Setting(channels_last=channels_last)):
        for convolution in module.modules():
            if isinstance(convolution, torch.nn.Conv2d):
                convolution.register_forward_pre_hook(note)
        step_ways.loss(module, batch)
    assert layouts == {channels_last}
    assert len(module.get_submodule("conv_in")._forward_pre_hooks) == 1, "the layout's own is gone, the test's is left"


def test_a_rung_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = step_ways.loss

    def doubled(module: torch.nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        value, output = honest(module, batch)
        planes = len(module.get_submodule("conv_in")._forward_pre_hooks)
        return (value, output) if planes else (value * 2, output)

    rows = step_ladder.measure(CASE, CPU, 2, "tiny")
    timed = [row for row in rows if "step_s" in row]
    assert all(row["speed_up"]["median"] > 0 and row["difference"] < 1e-4 for row in timed)
    assert timed[0]["speed_up"]["max"] == 1.0
    monkeypatch.setattr(step_ways, "loss", doubled)
    wrong = step_ladder.measure(CASE, CPU, 2, "tiny")
    assert ["speed_up" in row for row in wrong if "step_s" in row] == [True, False, False, False]
    results = {"tiny": {"rows": wrong}}
    assert step_ladder.table(results).count("another result") == 3
    assert step_ladder.table(results).count("not here: Triton kernels run on CUDA") == 3
    step_ladder.write_csv(results, tmp_path / "rows.csv")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert len(lines) == 1 + len(wrong)
    assert sum("computes something else" in line for line in lines) == 3
    step_ladder.draw(results, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_rungs_peak_is_counted_with_its_own_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[str, bool] = {}

    @contextmanager
    def own_peak(device: Any, network: Any, optimizer: Any, peaks: dict[str, float], name: str) -> Iterator[None]:
        (group,) = optimizer.param_groups
        assert all(a is b for a, b in zip(group["params"], network.parameters(), strict=True))
        yield
        assert optimizer.state, "it has trained"
        counted[name] = group["fused"]
        peaks[name] = 2.0 if group["fused"] else 1.0

    monkeypatch.setattr(step_ladder, "own_peak", own_peak)
    rows = step_ladder.measure(CASE, CPU, 2, "tiny")
    assert list(counted.values()) == [False, False, False, True]
    assert {row["name"]: row["peak_mem_gib"] for row in rows if "step_s" in row}["+ AdamW fused"] == 2.0


def test_two_adamws_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    module, batch = step_ways.network(CASE, CPU), random_batch(CASE, CPU)
    ladder = [rung for rung in step_ways.rungs(CPU) if not rung.missing]
    off = step_ways.differences(module, batch, ladder, torch.float32)
    assert max(value for of_rung in off.values() for value in of_rung.values()) < 1e-4
    honest = step_ways.adamw

    def faster(parameters: Any, fused: bool, lr: float) -> torch.optim.Optimizer:
        return honest(parameters, fused, lr * (1.01 if fused else 1.0))

    monkeypatch.setattr(step_ways, "adamw", faster)
    off = step_ways.differences(module, batch, ladder, torch.float32)
    assert off["+ AdamW fused"].pop("update") == pytest.approx(0.01, rel=1e-3)
    assert max(value for of_rung in off.values() for value in of_rung.values()) < 1e-4


def test_what_gradients_may_be_off_the_output_may_not() -> None:
    plain = {"output": 1e-3, "gradients": 1e-2, "update": 0.0}  # as in bf16
    same = step_ways.furthest_off(plain, plain)
    assert same == ("output", 1e-3, 2e-3)
    for what, off in (("output", 5e-3), ("update", 2e-4), ("gradients", 0.03), ("gradients", float("nan"))):
        worst, difference, allowed = step_ways.furthest_off(plain | {what: off}, plain)
        assert worst == what
        assert not difference <= allowed


def _rows_with_compiled_blocks() -> list[dict[str, Any]]:
    with (
        mock.patch.object(step_ways, "check_compiler"),
        mock.patch.object(step_ways, "compile_blocks", functools.partial(compile_blocks, backend="eager")),
    ):
        networks = step_ways.variants(step_ways.network(CASE, CPU), step_ways.rungs(CPU))
        assert [bool(compiled_kinds(networks[compiled])) for compiled in (False, True)] == [False, True]
        return step_ladder.measure(CASE, CPU, 2, "tiny")


def test_compiled_blocks_are_a_rung_and_compute_the_same() -> None:
    (found,) = run_ranks(_rows_with_compiled_blocks, 1)
    assert [row["name"] for row in found if row["setting"]["compiled"]] == ["+ blocks compiled"]
    assert found[-1]["speed_up"]["median"] > 0
    assert found[-1]["difference"] < 1e-4


def _sweeps() -> dict[str, list[dict[str, Any]]]:
    here = env.start(env.read_launch(), TrainConfig(device="cpu"))
    return {part: sweep(CASE, here, 2, "tiny") for part, sweep in step_sweeps.SWEEPS.items()}


def test_the_sweeps_compare_what_trains_the_same() -> None:
    (found,) = run_ranks(_sweeps, 1)
    assert [row["batch"] for row in found["batch"]] == [1, 2, 4]
    assert [row["latent_side"] for row in found["resolution"]] == [4, 8, 16]
    for part in ("batch", "resolution"):
        assert not any("speed_up" in row for row in found[part]), "other images have no speed-up"
    for part, count in (("recomputed", 3), ("zero", 4)):
        assert ["speed_up" in row for row in found[part]] == [True] * count
        assert found[part][0]["difference"] == 0.0


def _without_memory_for_stage_2() -> list[dict[str, Any]]:
    honest = step_sweeps.sharded

    def sharded(module: Any, stage: int, *rest: Any) -> Any:
        if stage == 2:
            raise torch.OutOfMemoryError("tried to allocate")
        return honest(module, stage, *rest)

    with mock.patch.object(step_sweeps, "sharded", sharded):
        return step_sweeps.by_stage(CASE, env.start(env.read_launch(), TrainConfig(device="cpu")), 2, "tiny")


def test_a_zero_stage_that_does_not_fit_is_listed() -> None:
    (found,) = run_ranks(_without_memory_for_stage_2, 1)
    assert ["speed_up" in row for row in found] == [True, True, False, True]
    assert "does not fit" in found[2]["missing"]
    assert "ZeRO 2, 1 rank(s)" in step_ladder.table({"tiny": {"rows": found}})


def test_what_does_not_fit_is_listed_and_the_first_that_fits_is_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = step_ladder.train

    def train(module: Any, optimizer: Any, batch: Any) -> None:
        if len(module.get_submodule("conv_in")._forward_pre_hooks):
            raise torch.OutOfMemoryError("tried to allocate")
        honest(module, optimizer, batch)

    monkeypatch.setattr(step_ladder, "train", train)
    rows = {row["name"]: row for row in step_ladder.measure(CASE, CPU, 2, "tiny")}
    assert rows["plain"]["missing"] == step_ways.TOO_LARGE
    assert rows["+ channels_last"]["speed_up"]["max"] == 1.0
    assert "plain" in step_ladder.table({"tiny": {"rows": list(rows.values())}})
