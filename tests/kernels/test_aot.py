"""The ahead-of-time check: what it derives, what it reads from a binary, and that a regression names itself.

The command itself compiles the operations' kernels (`make aot`); here it works on small kernels of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_kernels.common import launch
from ldm_kernels.common.shapes import Shape

if launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 interprets kernels, and these compile them", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton, which compiles without a GPU")

import triton

from ldm_kernels.common import aot, aot_table, cases
from ldm_kernels.common.aot_table import Row, Table
from ldm_kernels.common.binary import Figures
from ldm_kernels.common.launch import Launch
from tests.helpers.toy_kernels import meta, product, spilling, toy

OPERATIONS = {
    "group_norm_silu": ("fwd", "bwd"),
    "attention": ("fwd", "bwd"),
    "cross_attention": ("fwd", "bwd"),
    "geglu": ("fwd", "bwd"),
    "vector_quantize": ("fwd",),
    "ema_update": ("fwd",),
}


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Launch]], None]:
    """Makes the command see only one case a launch, for sm_80 and sm_90."""

    def install(launches: list[Launch]) -> None:
        def call(case: cases.Case) -> None:
            launch.run(launches[case.shape["index"]])

        monkeypatch.setitem(cases._CALLS, "toy", call)
        listed = [
            cases.Case(Shape("toy", "test", (("index", index),)), "fwd", torch.bfloat16)
            for index in range(len(launches))
        ]
        monkeypatch.setattr(aot, "all_cases", lambda architecture: iter(listed))
        monkeypatch.setattr(aot, "ARCHITECTURES", (80, 90))

    return install


def row(name: str, **changes: Any) -> Row:
    known = Figures(64, 0, 1024, 0, 0, {128: 4}, {128: 2}, 0, {"HMMA.BF16": 8}, 0, 0, 300)
    base = Row("toy", "fwd", "_toy_fwd_kernel", 80, "bfloat16", name, 1, "warps=4", 1, "0" * 16, known)
    return replace(base, **changes)


def test_rules_for_every_kernel_give_figure_and_limit() -> None:
    good = row("good")
    assert aot_table.broken_rules(good) == []
    spilled = replace(good.figures, stack_bytes=16, local_loads=3, local_stores=2)
    assert aot_table.broken_rules(replace(good, figures=spilled)) == [
        "stack of 16 bytes a thread, allowed 0",
        "registers spilled: 3 loads and 2 stores of local memory, allowed 0",
    ]
    allowed = {"stack_bytes": 16, "local_instructions": 5, "reason": "outside the loop"}
    assert aot_table.broken_rules(replace(good, figures=spilled, allowed=allowed)) == []
    worse = replace(spilled, stack_bytes=24)
    assert aot_table.broken_rules(replace(good, figures=worse, allowed=allowed)) == [
        "stack of 24 bytes a thread, allowed 16"
    ]
    large = replace(good.figures, shared_bytes=164 * 1024)
    assert aot_table.broken_rules(replace(good, figures=large)) == ["shared memory of 167936 bytes, limit 166912"]
    assert aot_table.broken_rules(replace(good, figures=large, architecture=90)) == []
    assert aot_table.broken_rules(replace(good, figures=replace(good.figures, atomics=1))) == [
        "1 atomic instructions on global memory, allowed 0"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"registers": 65}, "registers 65, stated 64"),
        ({"loads": {64: 8}}, "global loads by width in bits 8 of 64, stated 4 of 128"),
        ({"loads": {128: 3, 16: 8}}, "global loads by width in bits 3 of 128, 8 of 16, stated 4 of 128"),
        ({"stores": {}}, "global stores by width in bits none, stated 2 of 128"),
        ({"matrix": {}}, "matrix instructions none, stated ['HMMA.BF16']"),
        ({"matrix": {"HMMA.TF32": 8}}, "matrix instructions ['HMMA.TF32'], stated ['HMMA.BF16']"),
    ],
)
def test_what_is_worse_than_stated_is_named(changes: dict[str, Any], message: str) -> None:
    stated = row("stated").figures
    assert aot_table.regressions(stated, replace(stated, **changes)) == [message]


def test_what_is_better_than_stated_passes() -> None:
    stated = row("stated").figures
    better = replace(stated, registers=32, loads={128: 8}, matrix={"HMMA.BF16": 16}, instructions=900)
    assert aot_table.regressions(stated, better) == []


def test_equal_compilations_share_a_row_and_alike_ones_a_class(toys: Callable[[list[Launch]], None]) -> None:
    toys([toy(4096), toy(8192), toy(4095), replace(toy(), constants={"BLOCK": 2048}), replace(toy(), num_warps=8)])
    jobs = aot.jobs_of(aot.all_cases(80), 80)
    # 8192 is the same binary as 4096; 4095 another of its class (and BLOCK a constant that varies within one).
    assert [(job.in_table, job.row.calls) for job in jobs] == [(True, 4), (False, 0), (False, 0), (True, 1)]
    assert len({job.row.name for job in jobs}) == 4


def test_a_spilling_kernel_is_caught_by_name(
    toys: Callable[[list[Launch]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    toys([toy(), spilling()])
    assert aot.main(["--update", "--table", str(path)]) == 1
    output = capsys.readouterr().out
    assert "FAILED toy.fwd _spilling_fwd_kernel sm_80 bfloat16 test 1 batch 8: stack of" in output
    assert "FAILED toy.fwd _spilling_fwd_kernel sm_90 bfloat16 test 1 batch 8: registers spilled" in output
    assert "_toy_fwd_kernel" not in output
    # The table now states the spill, no row changed, and none is compiled: it stays red.
    table = aot_table.read(path)
    aot_table.write(Table(table.triton, tuple(replace(row, fixed=False) for row in table.rows)), path)
    assert aot.main(["--table", str(path)]) == 1
    again = capsys.readouterr().out
    assert again.splitlines()[:-1] == output.splitlines()[:-1]
    assert "0 of 4 rows compiled" in again


def test_a_narrowed_load_is_caught_and_names_figure_and_stated_value(
    toys: Callable[[list[Launch]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    toys([toy(4096)])
    assert aot.main(["--update", "--table", str(path)]) == 0
    assert aot.main(["--table", str(path)]) == 0
    capsys.readouterr()
    toys([toy(4095)])
    assert aot.main(["--table", str(path)]) == 1
    output = capsys.readouterr().out
    assert "FAILED toy.fwd _toy_fwd_kernel sm_80 bfloat16 test 0 batch 8: global loads by width in bits" in output
    assert "of 16, stated 1 of 128" in output


def test_update_keeps_what_was_allowed(toys: Callable[[list[Launch]], None], tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    toys([toy()])
    aot.main(["--update", "--table", str(path)])
    table = aot_table.read(path)
    allowed = {"stack_bytes": 8, "local_instructions": 2, "reason": "a test"}
    aot_table.write(Table(table.triton, (replace(table.rows[0], allowed=allowed), *table.rows[1:])), path)
    assert aot.main(["--update", "--table", str(path)]) == 0
    assert [row.allowed for row in aot_table.read(path).rows] == [allowed, None]


def test_default_compiles_changed_and_fixed_rows(
    toys: Callable[[list[Launch]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "table.json"
    monkeypatch.setattr(aot_table, "NUM_FIXED", 2)
    launches = [toy(), replace(toy(), num_warps=8), replace(toy(), num_warps=2)]
    toys(launches)
    assert aot.main(["--update", "--table", str(path)]) == 0
    capsys.readouterr()
    assert aot.main(["--json", "--table", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["compiled"] == 2
    toys([*launches[:2], replace(toy(bias=meta(4096)), num_warps=2)])
    aot.main(["--json", "--table", str(path)])
    assert json.loads(capsys.readouterr().out)["compiled"] == 4
    assert aot.main(["--json", "--all", "--only", "sm_90", "--table", str(path)]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["compiled"] == 3


def test_rows_without_a_launch_and_launches_without_a_row_are_named(
    toys: Callable[[list[Launch]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    toys([toy(), product(torch.float16, "ieee")])
    aot.main(["--update", "--table", str(path)])
    toys([toy(), replace(toy(), num_warps=8)])
    capsys.readouterr()
    assert aot.main(["--table", str(path)]) == 1
    output = capsys.readouterr().out
    assert "_toy_fwd_kernel sm_80 bfloat16 test 1 batch 8: launched, but the table does not state it" in output
    assert "_product_fwd_kernel sm_80 bfloat16 test 1 batch 8: stated in the table, but nothing launches it" in output


def test_figures_of_another_triton_are_not_compared(
    toys: Callable[[list[Launch]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    toys([toy()])
    aot.main(["--update", "--table", str(path)])
    rows = tuple(replace(row, figures=replace(row.figures, registers=1)) for row in aot_table.read(path).rows)
    aot_table.write(Table("1.2.3", rows), path)
    capsys.readouterr()
    assert aot.main(["--table", str(path)]) == 0
    assert "the table was made with triton 1.2.3; its figures are compared only for that version" in (
        capsys.readouterr().out
    )
    aot_table.write(Table(triton.__version__, rows), path)
    assert aot.main(["--table", str(path)]) == 1
    assert ", stated 1\n" in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_is_named(
    toys: Callable[[list[Launch]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toys([replace(toy(), constants={"BLOCK": 1000})])
    assert aot.main(["--update", "--table", str(tmp_path / "table.json")]) == 1
    output = capsys.readouterr().out
    assert "FAILED toy.fwd _toy_fwd_kernel sm_80 bfloat16 test 0 batch 8: does not compile: " in output


def test_a_grid_that_no_gpu_accepts_is_named(toys: Callable[[list[Launch]], None]) -> None:
    toys([toy(), replace(toy(), grid=(1, 65_536))])
    (problem,) = aot.grid_problems(aot.all_cases(80), 80)
    assert problem.startswith("toy.fwd _toy_fwd_kernel test 1 batch 64: grid (1, 65536) passes CUDA's limits")


def test_the_command_says_why_it_cannot_interpret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert "unset it" in capsys.readouterr().err


def test_committed_table_covers_every_operation_on_both_architectures() -> None:
    rows = aot_table.read().rows
    assert len({row.name for row in rows}) == len(rows) <= 300
    wanted = {
        (op, direction, sm) for op, directions in OPERATIONS.items() for direction in directions for sm in (80, 90)
    }
    assert {(row.operation, row.direction, row.architecture) for row in rows} >= wanted
    assert {row.operation for row in rows} == set(OPERATIONS)
    assert {row.architecture for row in rows} == set(cases.ARCHITECTURES)
    for row in rows:
        assert len(row.hash) == 16, row.name
        assert 0 < row.figures.registers <= 255, row.name
        assert row.figures.loads, f"{row.name} loads nothing"
        assert row.calls > 0, row.name


def test_committed_table_breaks_no_rule() -> None:
    broken = {row.name: aot_table.broken_rules(row) for row in aot_table.read().rows}
    assert {name: rules for name, rules in broken.items() if rules} == {}
    assert all(row.allowed["reason"] for row in aot_table.read().rows if row.allowed)


def test_fixed_rows_are_every_operation_in_both_directions_on_both_architectures() -> None:
    rows = aot_table.read().rows
    fixed = [row for row in rows if row.fixed]
    assert len(fixed) == aot_table.NUM_FIXED
    assert {row.name for row in fixed} == {row.name for row in aot_table.choose_fixed(rows)}
    found = {(row.operation, row.direction, row.architecture) for row in fixed}
    assert found == {(op, way, sm) for op, directions in OPERATIONS.items() for way in directions for sm in (80, 90)}


def test_table_survives_being_written_and_read(tmp_path: Path) -> None:
    table = Table("9.9", (row("one", fixed=True), row("two", allowed={"stack_bytes": 8, "reason": "a test"})))
    path = tmp_path / "table.json"
    aot_table.write(table, path)
    assert aot_table.read(path) == table
    assert all(line.count('"hash"') <= 1 for line in path.read_text().splitlines())


def test_a_name_that_no_row_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        aot.main(["--only", "nosuchkernel"])
    assert exit_.value.code == 2
    assert "--only nosuchkernel: no row" in capsys.readouterr().err
