"""The model of bytes and FLOPs, against counts done by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest

from ldm_kernels.common import roofline
from ldm_kernels.common.roofline import GPUS, Gpu, Work, memory_s, roofline_s, work
from ldm_kernels.common.shapes import Shape, all_shapes

# A round 3.0 TB/s, which the hand counts below take.
ROUND = Gpu("round", 3.0e12, 798e12, 399e12, 60e12)


def norm(channels: int, size: int, shifted: int = 0) -> Shape:
    sizes = (("channels", channels), ("height", size), ("width", size), ("groups", 32), ("silu", 1))
    return Shape("group_norm_silu", "by hand", (*sizes, ("shifted", shifted)))


def attention(heads: int, queries: int, keys: int, head_dim: int, operation: str = "attention") -> Shape:
    return Shape(operation, "by hand", (("heads", heads), ("queries", queries), ("keys", keys), ("head_dim", head_dim)))


# Microseconds of fewest bytes and of two passes, forward and backward: elements x 2 bytes x units / 3.0 TB/s.
@pytest.mark.parametrize(
    ("batch", "channels", "size", "expected_us"),
    [
        (8, 320, 64, (14.0, 21.0, 21.0, 35.0)),
        (8, 640, 32, (7.0, 10.5, 10.5, 17.5)),
        (8, 1280, 16, (3.5, 5.2, 5.2, 8.7)),
        (8, 960, 64, (41.9, 62.9, 62.9, 104.9)),
        (64, 320, 64, (111.8, 167.8, 167.8, 279.6)),
        (4, 128, 512, (179, 268, 268, 447)),
    ],
)
def test_group_norm_takes_two_units_or_three_forward_and_three_or_five_backward(
    batch: int, channels: int, size: int, expected_us: tuple[float, ...]
) -> None:
    shape = norm(channels, size)
    found_us = [
        1e6 * memory_s(work("group_norm_silu", direction, shape, variant=variant, batch=batch), ROUND, moved=True)
        for direction in ("fwd", "bwd")
        for variant in ("registers", "two_pass")
    ]
    # The hand counts leave out weights, mean and rstd, and are rounded.
    assert found_us == pytest.approx(expected_us, rel=0.015)


def test_small_tensors_of_the_norm_are_counted() -> None:
    # One image, one pixel, 32 channels in groups of one, fp32: x and y 128 bytes each; weight, bias and shift 128 each;
    # mean and rstd 128 each.
    forward = work("group_norm_silu", "fwd", norm(32, 1, shifted=1), "float32")
    assert forward.bytes_minimum == 7 * 128
    # Backward x, dy and dx; weight, bias and shift in and their gradients out; mean and rstd in.
    backward = work("group_norm_silu", "bwd", norm(32, 1, shifted=1), "float32", variant="two_pass")
    assert (backward.bytes_minimum, backward.bytes_moved) == (11 * 128, 13 * 128)


@pytest.mark.parametrize(
    ("heads", "tokens", "head_dim", "gflop", "forward_us", "backward_us", "memory_us"),
    [
        (8, 4096, 40, 21.5, 26.9, 67.3, 3.5),
        (5, 4096, 64, 21.5, 26.9, 67.3, 3.5),
        (8, 1024, 80, 2.68, 3.4, 8.4, 1.8),
        (1, 4096, 512, 34.4, 43.0, 108, 5.6),
    ],
)
def test_attention_against_counts_by_hand(
    heads: int,
    tokens: int,
    head_dim: int,
    gflop: float,
    forward_us: float,
    backward_us: float,
    memory_us: float,
) -> None:
    shape = attention(heads, tokens, tokens, head_dim)
    forward, backward = work("attention", "fwd", shape), work("attention", "bwd", shape)
    assert forward.flops / 1e9 == pytest.approx(gflop, rel=0.01)
    assert roofline.compute_s(forward, ROUND) * 1e6 == pytest.approx(forward_us, rel=0.02)
    assert roofline.compute_s(backward, ROUND) * 1e6 == pytest.approx(backward_us, rel=0.02)
    assert memory_s(forward, ROUND) * 1e6 == pytest.approx(memory_us, rel=0.04)


def test_cross_attention_reads_queries_and_writes_the_result() -> None:
    shape = attention(8, 4096, 77, 40, "cross_attention")
    assert memory_s(work("cross_attention", "fwd", shape), ROUND) * 1e6 == pytest.approx(1.75, rel=0.03)
    assert memory_s(work("cross_attention", "bwd", shape), ROUND) * 1e6 == pytest.approx(2.62, rel=0.03)
    # One query, one key, one channel, fp32: Q, K, V, O; and Q, K, V, dO, dQ, dK, dV.
    tiny = attention(1, 1, 1, 1, "cross_attention")
    assert work("cross_attention", "fwd", tiny, "float32") == Work(16, 16, 4, True)
    assert work("cross_attention", "bwd", tiny, "float32") == Work(28, 28, 10, True)


def test_parts_of_cross_attentions_gradients_are_written_and_read() -> None:
    shape = attention(5, 4096, 77, 64, "cross_attention")
    whole, in_parts = (work("cross_attention", "bwd", shape, batch=batch) for batch in (64, 8))
    # 320 heads and samples fill a GPU: one part. 40 do not: 7 parts, each dK and dV of 77 keys in fp32, out and in.
    assert whole.bytes_moved == whole.bytes_minimum
    assert in_parts.bytes_moved - in_parts.bytes_minimum == 7 * 2 * (8 * 5 * 77 * 64) * 4 * 2
    # The kernels for any number of keys: Q, dO, O, dQ and Q, dO; K, V twice, dK, dV; two fp32 numbers a query twice.
    anyhow = work("cross_attention", "bwd", attention(1, 1, 1, 1, "cross_attention"), "float32", variant="self")
    assert (anyhow.bytes_minimum, anyhow.bytes_moved) == (28, 24 + 24 + 16)


def test_geglu_moves_twelve_and_twenty_units_of_the_models_channels() -> None:
    channels, tokens = 320, 4096
    shape = Shape("geglu", "by hand", (("tokens", tokens), ("width", 4 * channels)))
    assert work("geglu", "fwd", shape).bytes_minimum == 12 * tokens * channels * 2
    assert work("geglu", "bwd", shape).bytes_minimum == 20 * tokens * channels * 2


def test_vector_quantize_never_writes_distances() -> None:
    shape = Shape("vector_quantize", "by hand", (("vectors", 65536), ("codes", 16384), ("dim", 4)))
    counted = work("vector_quantize", "fwd", shape, "float32")
    assert counted.bytes_minimum == 65536 * 4 * 4 + 16384 * 4 * 4 + 65536 * 8
    assert counted.flops == 2 * 65536 * 16384 * 4


def test_ema_reads_the_weights_once_for_several_decays() -> None:
    one, two = (Shape("ema_update", "by hand", (("parameters", 100), ("decays", decays))) for decays in (1, 2))
    assert work("ema_update", "fwd", one, variant="reference").bytes_moved == 1200
    assert work("ema_update", "fwd", one, variant="triton").bytes_moved == 1200
    assert work("ema_update", "fwd", two, variant="reference").bytes_moved == 2400
    assert work("ema_update", "fwd", two, variant="triton").bytes_moved == 2000
    assert work("ema_update", "fwd", two, batch=8) == work("ema_update", "fwd", two)


def counted_shapes() -> list[tuple[Shape, roofline.Direction]]:
    one_way = ("vector_quantize", "ema_update")
    return [(s, d) for s in all_shapes() for d in ("fwd", "bwd") if d == "fwd" or s.operation not in one_way]


def test_invariants_hold_for_every_shape() -> None:
    for shape, direction in counted_shapes():
        counted = work(shape.operation, direction, shape)
        assert 0 < counted.bytes_minimum <= counted.bytes_moved, shape
        assert counted.flops > 0, shape
        times = [roofline_s(counted, gpu) for gpu in GPUS.values()]
        assert times == sorted(times, reverse=True), f"a newer GPU would be slower at {shape}"
        for gpu in GPUS.values():
            assert roofline_s(counted, gpu, moved=True) >= roofline_s(counted, gpu) > 0
            assert roofline_s(work(shape.operation, direction, shape, "float32"), gpu, "float32") >= times[-1]
        if shape.operation == "ema_update":
            continue
        eight = work(shape.operation, direction, shape, batch=8)
        assert eight.flops == 8 * counted.flops
        # What does not grow with the batch (weights, a codebook) is read once.
        assert 7 * counted.bytes_minimum < eight.bytes_minimum + 7 * 2**19
        assert eight.bytes_minimum <= 8 * counted.bytes_minimum


def test_backward_costs_more_than_forward() -> None:
    for shape, direction in counted_shapes():
        if direction == "bwd":
            forward, backward = work(shape.operation, "fwd", shape), work(shape.operation, "bwd", shape)
            assert backward.bytes_minimum > forward.bytes_minimum
            assert backward.flops > forward.flops


def test_what_bounds_each_operation() -> None:
    h100 = GPUS["H100"]
    for shape, direction in counted_shapes():
        counted = work(shape.operation, direction, shape, batch=8)
        memory_bound = memory_s(counted, h100) >= roofline.compute_s(counted, h100, "bfloat16")
        if shape.operation in ("group_norm_silu", "geglu", "cross_attention", "ema_update"):
            assert memory_bound, shape
        if shape.operation == "attention" and shape["queries"] >= 4096:
            assert not memory_bound, shape


def test_roofline_takes_the_slower_of_the_two_rates() -> None:
    assert roofline_s(Work(3_000, 6_000, 0, False), ROUND) == pytest.approx(1e-9)
    assert roofline_s(Work(3_000, 6_000, 0, False), ROUND, moved=True) == pytest.approx(2e-9)
    assert roofline_s(Work(0, 0, 120_000, False), ROUND) == pytest.approx(2e-9)
    assert roofline_s(Work(0, 0, 798_000, True), ROUND, "float16") == pytest.approx(1e-9)
    # fp32 products: three TF32 products each, 133 TFLOP/s here, unless the plain rate is higher, as it may be.
    assert roofline_s(Work(0, 0, 133_000, True), ROUND, "float32") == pytest.approx(1e-9)
    assert roofline_s(Work(0, 0, 150_000, True), dataclasses.replace(ROUND, fp32_flops_per_s=150e12), "float32") == (
        pytest.approx(1e-9)
    )


def test_unknown_operations_and_variants_are_named() -> None:
    with pytest.raises(ValueError, match=r"vector_quantize\.bwd is not counted; take one of"):
        work("vector_quantize", "bwd", norm(320, 64))
    with pytest.raises(ValueError, match="has no variant 'three_pass'; take one of two_pass, registers, cluster"):
        work("group_norm_silu", "fwd", norm(320, 64), variant="three_pass")
    with pytest.raises(ValueError, match="attention has no variant 'cross'; take None"):
        work("attention", "fwd", attention(8, 64, 64, 64), variant="cross")
    with pytest.raises(ValueError, match="no shapes of a model 'sd9'; take one of"):
        roofline.table("sd9", 8)


def test_table_has_a_line_for_every_shape_and_direction(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--model", "sd2-64", "--batch", "8"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + sum(shape.model == "sd2-64" for shape, _ in counted_shapes())
    assert len({line.count("|") for line in lines}) == 1
    assert "computed, not measured" in printed
    cells = next(line for line in lines if line.startswith("| group_norm_silu fwd | 320x64x64 |")).split(" | ")
    x_and_y = 2 * 8 * 320 * 64 * 64 * 2
    assert math.isclose(float(cells[6]), 1e6 * x_and_y / 3.35e12, abs_tol=0.06)
    assert cells[-1] == "memory |"
