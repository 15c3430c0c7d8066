"""Safetensors files written and read a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from ldm_scale.engine.lazy_tensors import Deferred, LazyTensors
from ldm_scale.engine.tensor_file import TYPES
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange import safetensors_io
from ldm_scale.interchange.safetensors_io import passing, read_tensors, spilled, tensors_sha256, write_tensors
from tests.helpers.disks import full_disk


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """One of each type that safetensors has, small ones first; and a scalar, an empty and a strided tensor."""
    values = torch.arange(15).view(3, 5)
    each = {name: values.to(dtype) for name, dtype in sorted(TYPES.items(), key=lambda item: item[1].itemsize)}
    return each | {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "strided": torch.randn(4, 6).T}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    flat = [x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other)]
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(*flat)


def test_safetensors_reads_what_was_written_and_so_do_we(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    for found in (load_file(path), read_tensors(path)):
        assert found.keys() == tensors.keys()
        assert all(same(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert tensors_sha256(read_tensors(path)) == tensors_sha256(tensors)


def test_each_tensor_is_gone_before_the_next_but_one_is_read(tmp_path: Path) -> None:
    """Two at a time: one is hashed while the next is read."""
    alive: set[int] = set()
    most = 0

    class Watched(torch.Tensor):
        def __del__(self) -> None:
            alive.discard(id(self))

    def read() -> torch.Tensor:
        nonlocal most
        made = torch.ones(3).as_subclass(Watched)
        alive.add(id(made))
        most = max(most, len(alive))
        return made

    lazy = LazyTensors({str(n): Deferred(torch.empty(3, device="meta"), read) for n in range(20)})
    write_tensors(tmp_path / "x", lazy)
    assert most <= 2
    tensors_sha256(lazy)
    assert most <= 3
    assert not alive


def test_open_files_outlive_their_names(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, tensors)
    found = read_tensors(path)
    path.unlink()
    write_tensors(path, {name: torch.zeros(1) for name in tensors})
    assert all(same(found[name], tensor) for name, tensor in tensors.items())
    path.unlink()
    kept = spilled(tensors, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert all(same(kept[name], tensor) for name, tensor in tensors.items())


def test_a_file_that_is_cut_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(5), "b": torch.ones(50000)})
    found = read_tensors(path)
    with path.open("r+b") as file:
        file.truncate(1000)
    assert torch.equal(found["a"], torch.ones(5))
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read .*cut short"):
        found["b"]


def test_a_full_disk_for_what_leaves_memory_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=re.escape(str(tmp_path))), full_disk(1000):
        spilled({"a": torch.ones(5000)}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_takes_long_shows_bytes_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(safetensors_io, "_BAR_DELAY_S", 0.0)
    tensors = {str(n): torch.zeros(250_000) for n in range(4)}

    def shown() -> Iterator[str]:
        for name, _ in passing(tensors, "hashing"):
            (bar,) = [bar for bar in tqdm._instances if bar.desc.startswith("hashing")]
            bar.refresh()
            yield name

    assert list(shown()) == list(tensors)
    assert re.search(r"hashing: +75%.* 3\.00M/4\.00M \[00:00<00:00, .*B/s\]", capsys.readouterr().err)
    monkeypatch.setattr(safetensors_io, "shows_progress", lambda: False)
    assert [name for name, _ in passing(tensors, "hashing")] == list(tensors)
    assert capsys.readouterr().err == ""
