"""Files that safetensors reads, with the checksum of their very bytes."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldm_scale.engine import tensor_file
from ldm_scale.engine.tensor_file import Stored, file_crc32, replace_file, replace_files, require_place, write_tensors
from ldm_scale.errors import CheckpointError, ConfigError
from tests.helpers.disks import full_disk


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 22])
def test_safetensors_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setattr(tensor_file, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(tensor_file, "_BEGIN_BYTES", 100)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(7, 30, generator=generator)
    tensors = [
        Stored("net/weight/a", values, torch.float32),
        Stored("net/ema/a", values.T, torch.float16),  # not contiguous
        Stored('net/weight/with "quotes" and ä', values[0, :1].bfloat16(), torch.bfloat16),
        Stored("net/weight/none", torch.empty(0), torch.float32),
        Stored("net/weight/last", values.requires_grad_(), torch.float64),
    ]
    path, again = tmp_path / "file", tmp_path / "again"
    checksum = write_tensors(path, tensors)
    assert checksum == zlib.crc32(path.read_bytes()) == file_crc32(path) == file_crc32(path, from_disk=True)
    read = load_file(path)
    assert read.keys() == {tensor.name for tensor in tensors}
    for name, stored, dtype in tensors:
        assert read[name].dtype == dtype
        assert torch.equal(read[name], stored.detach().reshape(-1).to(dtype)), name
    assert write_tensors(again, tensors) == checksum
    assert again.read_bytes() == path.read_bytes()


def test_a_value_beyond_the_type_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"net/ema=0\.1/a does not fit float16; set ema\.snapshot_dtype=fp32"):
        write_tensors(tmp_path / "file", [Stored("net/ema=0.1/a", torch.tensor([1.0, 1e5]), torch.float16)])


def test_no_second_tensor_takes_a_name(tmp_path: Path) -> None:
    twice = [Stored("a", torch.ones(1), torch.float32)] * 2
    with pytest.raises(AssertionError, match="a twice in a file"):
        write_tensors(tmp_path / "file", twice)


def test_two_processes_write_one_file_and_neither_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes all of it while the first is about to rename."""
    path, rename = tmp_path / "result.json", Path.replace

    def meanwhile(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", rename)
        replace_file(path, "second")
        assert path.read_text() == "second"
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", meanwhile)
    replace_file(path, "first")
    assert path.read_text() == "first"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_several_files_are_replaced_when_all_are_written(tmp_path: Path) -> None:
    replace_files(tmp_path, {"a.png": b"1", "b.json": "1"})
    with full_disk(at_bytes=4), pytest.raises(OSError, match=r"b\.json"):
        replace_files(tmp_path, {"a.png": b"2", "b.json": "22222222"})
    assert [(tmp_path / name).read_bytes() for name in ("a.png", "b.json")] == [b"1", b"1"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_place_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    require_place(tmp_path / "new" / "folder", "--out x")
    require_place(tmp_path, "--out x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/a"), Path("/proc")):
        with pytest.raises(ConfigError, match=r"^--out x: nothing can be written there \(.*; give another place"):
            require_place(place, "--out x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
