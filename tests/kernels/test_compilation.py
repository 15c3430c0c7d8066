"""What a recorded launch is compiled from, and what its hash covers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ldm_kernels.common import launch

if launch.INTERPRETED:
    pytest.skip("TRITON_INTERPRET=1 interprets kernels, and these compile them", allow_module_level=True)
pytest.importorskip("triton", reason="needs triton, which compiles without a GPU")

import triton
import triton.language as tl

from ldm_kernels.common import compilation
from tests.helpers.toy_kernels import _toy_fwd_kernel, meta, scaled, toy


def test_arguments_are_specialised_as_at_a_launch() -> None:
    found = compilation.specialize(toy(4096, bias=meta(4096, dtype=torch.float32)), 90)
    assert found.signature == {
        "p_x": "*bf16",
        "p_y": "*bf16",
        "p_bias": "*fp32",
        "size": "i32",
        "factor": "fp32",
        "BLOCK": "constexpr",
    }
    aligned = {path for path, attributes in found.attributes.items() if ["tt.divisibility", 16] in attributes}
    assert aligned == {(0,), (1,), (2,), (3,)}
    assert found.constants == {(5,): 1024}


@pytest.mark.parametrize(
    ("size", "kind", "aligned"),
    [(1, "constexpr", False), (4095, "i32", False), (2**31 - 1, "i32", False), (2**31, "i64", True)],
)
def test_integers_are_specialised_by_value(size: int, kind: str, aligned: bool) -> None:
    found = compilation.specialize(replace(toy(), arguments={**toy().arguments, "size": size}), 80)
    assert found.signature["size"] == kind
    assert bool(found.attributes.get((3,))) == aligned
    assert ((3,) in found.constants) == (kind == "constexpr")


def test_absent_tensors_are_constants_and_types_are_kept() -> None:
    found = compilation.specialize(toy(x=meta(4096, dtype=torch.int64)), 80)
    assert (found.signature["p_bias"], found.signature["p_x"]) == ("constexpr", "*i64")
    assert found.constants[(2,)] is None


def test_a_view_that_starts_between_vectors_is_not_aligned() -> None:
    joint = meta(4096 + 8)
    assert compilation.specialize(toy(x=joint[8:]), 80).attributes[(0,)]
    assert not compilation.specialize(toy(x=joint[4:-4]), 80).attributes.get((0,))


def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(TypeError, match="unset TRITON_INTERPRET"):
        compilation.specialize(replace(toy(), kernel=lambda: None), 80)


@pytest.fixture
def edited() -> Any:
    """Replaces text in the source of a jit function, and puts it back."""
    originals: dict[Any, str] = {}

    def edit(function: Any, old: str, new: str) -> None:
        originals.setdefault(function, function.src)
        assert old in function.src
        function._unsafe_update_src(function.src.replace(old, new))

    yield edit
    for function, source in originals.items():
        function._unsafe_update_src(source)


def test_hash_follows_the_kernels_code(edited: Any) -> None:
    before = compilation.specialize(toy(), 80).hash
    edited(_toy_fwd_kernel, "* factor", "+ factor")
    assert compilation.specialize(toy(), 80).hash != before


def test_hash_follows_the_functions_that_the_kernel_calls(edited: Any) -> None:
    before = compilation.specialize(toy(), 80).hash
    edited(scaled, "x * FACTOR", "x + FACTOR")
    assert compilation.specialize(toy(), 80).hash != before


def test_hash_follows_constants_of_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    before = compilation.specialize(toy(), 80).hash
    monkeypatch.setitem(scaled.fn.__globals__, "FACTOR", tl.constexpr(3.0))
    assert compilation.specialize(toy(), 80).hash != before


def test_hash_leaves_comments_and_layout_out(edited: Any) -> None:
    before = compilation.specialize(toy(), 80).hash
    edited(_toy_fwd_kernel, "    if p_bias", "    # A remark.\n\n    if p_bias")
    assert compilation.specialize(toy(), 80).hash == before


def test_hash_follows_everything_else_that_changes_the_binary(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = [
        toy(),
        toy(4095),
        toy(x=meta(4096, dtype=torch.float16)),
        toy(bias=meta(4096, dtype=torch.float32)),
        replace(toy(), constants={"BLOCK": 512}),
        replace(toy(), num_warps=8),
        replace(toy(), num_stages=3),
    ]
    hashes = [compilation.specialize(launched, 80).hash for launched in launches]
    hashes += [compilation.specialize(toy(), 90).hash]
    monkeypatch.setattr(triton, "__version__", "0.0.0")
    hashes += [compilation.specialize(toy(), 80).hash]
    assert len(set(hashes)) == len(hashes)
    monkeypatch.undo()
    # Another grid, and another size of the same divisibility, are the same binary.
    assert {compilation.specialize(launched, 80).hash for launched in (toy(8192), toy(16))} == {hashes[0]}
