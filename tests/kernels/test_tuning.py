"""The table of measured winners, and the refusals of a backend that cannot run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_kernels.common import launch, tuning

SHAPE = {"queries": 4096, "keys": 77, "head_dim": 64, "batch": 40}
ROWS = [
    ("GPU A", "bfloat16", 8, 64, "triton"),
    ("GPU A", "bfloat16", 40, 64, "sdpa"),
    ("GPU A", "bfloat16", 640, 64, "xformers"),
    ("GPU A", "bfloat16", 40, 80, "reference"),
    ("GPU A", "float16", 40, 64, "xformers"),
    ("GPU B", "bfloat16", 40, 64, "reference"),
]


@pytest.fixture
def winners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table of a few rows in place of the measured one."""
    table = {
        "attention": [
            {
                "gpu": gpu,
                "dtype": dtype,
                "shape": {"queries": 4096, "keys": 77, "head_dim": d, "batch": n},
                "backend": name,
            }
            for gpu, dtype, n, d, name in ROWS
        ]
    }
    monkeypatch.setattr(tuning, "WINNERS", tmp_path / "winners.json")
    tuning.WINNERS.write_text(json.dumps(table))
    tuning._winners.cache_clear()
    tuning._rows_on.cache_clear()
    yield
    tuning._winners.cache_clear()
    tuning._rows_on.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "dtype", "changed", "expected"),
    [
        ("GPU A", "bfloat16", {}, "sdpa"),
        ("GPU A", "bfloat16", {"batch": 8}, "triton"),
        ("GPU A", "bfloat16", {"batch": 12}, "triton"),  # nearest by ratio: 1.5 from 8, 3.3 from 40
        ("GPU A", "bfloat16", {"batch": 100}, "sdpa"),
        ("GPU A", "bfloat16", {"batch": 10_000}, "xformers"),
        ("GPU A", "bfloat16", {"head_dim": 80}, "reference"),
        ("GPU A", "float16", {}, "xformers"),
        ("GPU B", "bfloat16", {}, "reference"),
        ("GPU B", "float16", {}, None),  # never another GPU's, type's or shape's row
        ("GPU C", "bfloat16", {}, None),
        ("GPU A", "bfloat16", {"keys": 128}, None),
    ],
)
@pytest.mark.usefixtures("winners")
def test_the_row_of_this_gpu_type_and_shape(
    gpu: str, dtype: str, changed: dict[str, int], expected: str | None
) -> None:
    assert tuning._winner_on("attention", gpu, dtype, SHAPE | changed) == expected
    assert tuning._winner_on("geglu", gpu, dtype, SHAPE | changed) is None


@pytest.mark.usefixtures("winners")
def test_auto_on_the_cpu_has_no_winner() -> None:
    assert tuning.choose("attention", "auto", ("triton", "sdpa"), torch.zeros(2, dtype=torch.bfloat16), SHAPE) is None


@pytest.mark.usefixtures("winners")
def test_auto_on_a_gpu_takes_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, device, dtype = True, torch.device("cuda", 1), torch.bfloat16

    names = {0: "GPU A", 1: "GPU B"}
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    tensor: Any = OnGpu()
    assert tuning.choose("attention", "auto", ("triton", "sdpa"), tensor, SHAPE) == "reference"
    assert tuning.choose("attention", "sdpa", ("triton", "sdpa"), tensor, SHAPE) == "sdpa"


def test_the_committed_table_has_the_form_that_is_read() -> None:
    table = json.loads(tuning.WINNERS.read_text())
    for rows in table.values():
        for row in rows:
            assert set(row) >= {"gpu", "dtype", "shape", "backend"}
            assert all(isinstance(size, int) and size > 0 for size in row["shape"].values())


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="geglu: backend 'cuda' is unknown; take one of auto, triton, reference"):
        tuning.choose("geglu", "cuda", ("triton", "reference"), torch.zeros(2), {})


def test_triton_is_refused_where_it_cannot_run() -> None:
    with pytest.raises(TypeError, match=r"geglu: backend 'triton' serves .* not torch.float64; convert"):
        tuning.choose("geglu", "triton", ("triton",), torch.zeros(2, dtype=torch.float64), {})
    tensor = torch.zeros(2)
    if launch.INTERPRETED:
        assert tuning.choose("geglu", "triton", ("triton",), tensor, {}) == "triton"
        assert tuning.serves(tensor)
    else:
        with pytest.raises(
            TypeError, match=r"needs the package triton and a tensor on a CUDA device .* on 'cpu'; .*TRITON_INTERPRET=1"
        ):
            tuning.choose("geglu", "triton", ("triton",), tensor, {})
        assert not tuning.serves(tensor)
    assert not tuning.serves(torch.zeros(2, dtype=torch.int64))


@pytest.mark.usefixtures("winners")
def test_the_lookup_compiles_with_symbolic_sizes() -> None:
    rows = launch.constant_when_compiled(lambda: tuning._rows_on("attention", "GPU A", "bfloat16"))

    def scaled(x: torch.Tensor) -> torch.Tensor:
        winner = tuning._match(rows(), {"queries": 4096, "keys": 77, "head_dim": x.shape[1], "batch": x.shape[0]})
        return x * {"sdpa": 2.0, "triton": 3.0}.get(str(winner), 1.0)

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (40, 8, 12, 100):
        x = torch.ones(batch, 64)
        assert torch.equal(compiled(x), scaled(x))


def test_without_triton_no_tensor_runs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda, device, dtype = True, torch.device("cuda", 0), torch.float32

    tensor: Any = OnGpu()
    capabilities = iter([(7, 5), (8, 0), (9, 0)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: next(capabilities))
    assert [launch.runs_kernels(tensor) for _ in range(3)] == [False, True, True]
    monkeypatch.setattr(launch, "_HAS_TRITON", False)
    assert not launch.runs_kernels(tensor)
    with pytest.raises(TypeError, match="needs the package triton"):
        tuning.require_kernels("geglu", tensor)
