"""Tensors that are read when they are asked for, and by nothing else."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ldm_scale.engine.lazy_tensors import (
    Deferred,
    LazyTensors,
    converted,
    joined,
    num_bytes,
    num_elements,
    parts_of,
    renamed,
    without_values,
)

VALUES = {"a": torch.arange(6.0).view(3, 2), "b": torch.tensor([1, 2]), "c": torch.ones(2, 2)}


class Counted:
    """Lazy tensors that write down which were read."""

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.tensors = LazyTensors({n: Deferred(x.to("meta"), partial(self.read, n)) for n, x in VALUES.items()})

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return VALUES[name].clone()


def test_looking_at_names_and_shapes_reads_nothing() -> None:
    counted = Counted()
    tensors = counted.tensors
    assert "a" in tensors
    assert "x" not in tensors
    assert list(tensors) == list("abc")
    assert tensors.keys() - {"a"} == {"b", "c"}
    assert (num_elements(tensors), num_bytes(tensors)) == (12, 24 + 16 + 16)
    without = without_values(tensors | {"d": torch.zeros(1)})
    assert {n: (x.shape, x.dtype, x.device.type) for n, x in without.items()} == {
        n: (x.shape, x.dtype, "meta") for n, x in (VALUES | {"d": torch.zeros(1)}).items()
    }
    halves = converted(renamed(tensors, lambda n: None if n == "b" else n.upper()), Tensor.half)
    assert {n: x.dtype for n, x in without_values(halves).items()} == dict.fromkeys("AC", torch.float16)
    assert counted.reads == []
    assert torch.equal(halves["A"], VALUES["a"].half())
    assert counted.reads == ["a"]


def test_a_tensor_is_read_anew_each_time_and_what_is_put_over_it_is_not_read() -> None:
    counted = Counted()
    counted.tensors["a"].zero_()
    assert torch.equal(counted.tensors["a"], VALUES["a"])
    changed = counted.tensors | {"a": torch.ones(1)}
    assert torch.equal(changed["a"], torch.ones(1))
    assert counted.reads == ["a", "a"]


def test_parts_in_their_order_take_one_read_of_the_whole_and_go_together_again() -> None:
    counted = Counted()
    names = {"a": ["a0", "a1", "a2"], "b": ["b0"], "c": ["c0", "c1"]}
    parts = parts_of(counted.tensors, names, lambda name, tensor: tensor.chunk(len(names[name])))
    assert list(parts) == ["a0", "a1", "a2", "b0", "c0", "c1"]
    assert parts.entries["a1"].like.shape == (1, 2)
    assert counted.reads == []
    assert torch.equal(torch.cat([parts[name] for name in names["a"]]), VALUES["a"])
    assert counted.reads == ["a"]
    whole = joined(parts, names, lambda name, found: torch.cat(found))
    assert without_values(whole).keys() == VALUES.keys()
    assert counted.reads == ["a"]
    counted.reads.clear()
    assert all(torch.equal(whole[name], tensor) for name, tensor in VALUES.items())
    assert counted.reads == ["b", "c"], "the parts of a are still there"
