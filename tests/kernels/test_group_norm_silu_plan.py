"""The written table of group_norm_silu: which variant serves a shape, and in what blocks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from ldm_kernels.common import launch
from ldm_kernels.group_norm_silu.plan import Plan, variant_for

SIZES = (1, 7, 8, 15, 16, 31, 32, 64, 256)


def _plan(channels: int, side: int, batch: int = 8, **given: Any) -> Plan:
    arguments: dict[str, Any] = {
        "num_groups": 32,
        "itemsize": 2,
        "channels_last": True,
        "architecture": 90,
        "backward": False,
        **given,
    }
    return variant_for(batch, channels, pixels=side * side, **arguments)


@pytest.mark.parametrize(
    ("channels", "side", "backward", "expected"),
    [
        (1280, 8, False, Plan("registers", 64, 64, 4)),
        (1280, 8, True, Plan("registers", 64, 64, 4)),
        (2560, 8, False, Plan("registers", 64, 128, 4)),
        (2560, 8, True, Plan("registers", 64, 128, 8)),
        (1280, 16, False, Plan("registers", 256, 64, 8)),
        (1280, 16, True, Plan("registers", 256, 64, 16)),
        # Four groups of 10 channels are the fewest that start at a multiple of 16 bytes.
        (320, 16, False, Plan("registers", 256, 64, 8, groups=4)),
        (640, 16, True, Plan("registers", 256, 64, 16, groups=2)),
        # A single group of 10 channels would fit, in runs of 20 bytes.
        (320, 32, False, Plan("two_pass", 32, 64, 4, chunks=8, chunk_tiles=4, apply_tiles=4)),
        (2560, 16, False, Plan("two_pass", 32, 64, 4, chunks=2, chunk_tiles=4, apply_tiles=4)),
        (320, 64, False, Plan("two_pass", 32, 64, 4, chunks=26, chunk_tiles=5, apply_tiles=4)),
        (320, 64, True, Plan("two_pass", 32, 64, 4, chunks=26, chunk_tiles=5, apply_tiles=4)),
    ],
)
def test_the_table(channels: int, side: int, backward: bool, expected: Plan) -> None:
    assert _plan(channels, side, backward=backward) == expected


def test_clusters_only_where_asked_for_and_only_from_architecture_90() -> None:
    for backward, num_warps in ((False, 8), (True, 16)):
        expected = Plan("cluster", 1024, 64, num_warps, groups=2, num_ctas=4)
        assert _plan(640, 32, backward=backward, clusters=True) == expected
        assert _plan(640, 32, backward=backward).variant == "two_pass"
        assert _plan(640, 32, backward=backward, clusters=True, architecture=80).variant == "two_pass"
        assert _plan(640, 16, backward=backward, clusters=True).variant == "registers"
        assert _plan(320, 64, backward=backward, clusters=True) == Plan(
            "cluster", 4096, 32, num_warps, groups=2, num_ctas=8
        )


def test_the_switch_of_the_cluster_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="kernel.py needs triton")
    from ldm_kernels.group_norm_silu import kernel

    x = torch.empty(8, 640, 32, 32, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)

    def variant(architecture: int) -> str:
        with launch.recording(architecture):
            return kernel.plan_for(x, 32, backward=False).variant

    monkeypatch.setattr(kernel, "CLUSTERS_COMPILE", True)
    monkeypatch.delenv("LDM_KERNELS_CLUSTER", raising=False)
    assert variant(90) == "two_pass"
    monkeypatch.setenv("LDM_KERNELS_CLUSTER", "1")
    assert (variant(80), variant(90)) == ("two_pass", "cluster")
    monkeypatch.setattr(kernel, "CLUSTERS_COMPILE", False)
    assert variant(90) == "two_pass"
    with pytest.raises(ValueError, match=r"needs Triton 3\.8 or newer"):
        kernel.plan_for(x, 32, backward=False, variant="cluster")


def test_a_variant_that_cannot_hold_the_shape_says_so() -> None:
    with pytest.raises(ValueError, match="'registers' cannot hold 4096 pixels x 10 channels"):
        _plan(320, 64, variant="registers")
    with pytest.raises(ValueError, match="cannot hold"):
        _plan(320, 256, variant="cluster")
    with pytest.raises(ValueError, match="one of two_pass, registers, cluster"):
        _plan(320, 8, variant="fastest")


def test_every_plan_covers_its_shape_within_its_limits() -> None:
    chosen = set()
    for side, cpg, groups, channels_last, backward in itertools.product(
        SIZES, (1, 4, 10, 20, 30, 33, 40, 60, 80, 512), (1, 3, 32), (True, False), (True, False)
    ):
        plan = _plan(
            cpg * groups, side, num_groups=groups, channels_last=channels_last, backward=backward, clusters=True
        )
        pixels = side * side
        chosen.add(plan.variant)
        for size in (plan.block_hw, plan.block_c, plan.num_warps, plan.groups):
            assert size & (size - 1) == 0
        if plan.variant == "two_pass":
            assert plan.block_hw * plan.block_c <= 2048
            assert 0 <= plan.chunks * plan.chunk_tiles * plan.block_hw - pixels < plan.chunk_tiles * plan.block_hw
            assert plan.chunk_tiles <= 32
            # Offsets inside a chunk are 32-bit.
            assert plan.chunk_tiles * plan.block_hw <= 2**16
        else:
            assert groups % plan.groups == 0
            assert plan.block_hw >= pixels
            assert plan.block_c >= plan.groups * cpg
            threads = 32 * plan.num_warps * plan.num_ctas
            assert plan.block_hw * plan.block_c <= threads * (32 if backward else 64)
            assert 2 * pixels * plan.groups * cpg >= plan.block_hw * plan.block_c
    assert chosen == {"two_pass", "registers", "cluster"}


def test_large_tensors_get_many_programs_whatever_the_batch() -> None:
    for batch, channels, side in ((1, 320, 64), (8, 320, 64), (4, 128, 512), (64, 960, 64), (1, 128, 256)):
        for channels_last in (True, False):
            plan = _plan(channels, side, batch=batch, channels_last=channels_last)
            programs = batch * plan.chunks * -(-channels // plan.block_c)
            assert programs >= min(528, batch * channels * side * side // (2048 * 4))
            # The partial sums stay small beside x: 8 bytes against two for every pixel of a chunk.
            assert 8 * plan.chunks <= 0.04 * 2 * side * side
