"""The moving-average kernel against float64, over many tensors, decays and addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ldm_kernels.common import launch
from ldm_kernels.ema_update import op, reference
from ldm_kernels.ema_update.op import ema_update
from tests.helpers.kernels import FLOAT_DTYPES, assert_close_to_float64

DECAYS = [0.0, 0.3, 0.999999, 1.0]
SHAPES = [(3,), (2, 5), (1,), (), (0,), (7, 1, 2), (4, 0), (4099,), (16, 256), (12,)]


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Tables that a test leaves behind describe memory that may come back as another test's."""
    yield
    if launch.INTERPRETED or torch.cuda.is_available():
        from ldm_kernels.ema_update import kernel

        kernel._tables.clear()


def _exact(average: Tensor, weight: Tensor, decay: float) -> Tensor:
    return decay * average.double() + (1 - decay) * weight.double()


def _assert_updated(averages: Sequence[Sequence[Tensor]], weights: Sequence[Tensor], decays: Sequence[float]) -> None:
    """Updates in place, and compares with float64 and with torch.lerp."""
    before = [[average.clone() for average in of_decay] for of_decay in averages]
    weights_before = [weight.clone() for weight in weights]
    places = [average.data_ptr() for of_decay in averages for average in of_decay]
    ema_update(averages, weights, decays, backend="triton")
    assert [average.data_ptr() for of_decay in averages for average in of_decay] == places
    assert all(map(torch.equal, weights, weights_before)), "the weights were written"
    for old, new, decay in zip(before, averages, decays, strict=True):
        for i, (was, now, weight) in enumerate(zip(old, new, weights, strict=True)):
            plain = torch.lerp(was, weight.float(), 1 - decay)
            assert_close_to_float64(f"pair {i}, decay {decay}", now, plain, _exact(was, weight, decay))
            if decay == 1:
                assert torch.equal(now, was)
            if decay == 0:
                assert torch.equal(now, weight.float())


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("decays", [[d] for d in DECAYS] + [[0.3, 0.999999], DECAYS, [*DECAYS, 0.5, 0.99]])
def test_ema_update(device: str, decays: list[float], dtype: torch.dtype) -> None:
    weights = [torch.randn(s, device=device).to(dtype) for s in SHAPES]
    averages = [[torch.randn(s, device=device) for s in SHAPES] for _ in decays]
    _assert_updated(averages, weights, decays)


def test_steps_of_a_millionth_add_up(device: str) -> None:
    # 1 - decay in fp32 would be off by more than a hundredth of itself.
    average, weight = torch.zeros(64, device=device), torch.ones(64, device=device)
    for _ in range(20):
        ema_update([average], [weight], 0.999999, backend="triton")
    torch.testing.assert_close(average.double(), torch.full_like(average, 1 - 0.999999**20).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_slices_of_a_flat_tensor_at_any_address(device: str, dtype: torch.dtype) -> None:
    # As the fragments of a sharded optimizer are: every start and every length of the last few elements.
    bounds = [(start, start + length) for start in range(5) for length in (1, 3, 4, 7, 8, 30)]
    flat = torch.randn(64 * len(bounds), device=device).to(dtype)
    kept = [torch.randn(64 * len(bounds), device=device) for _ in range(2)]
    untouched = [x.clone() for x in kept]
    weights = [flat[64 * i + a : 64 * i + b] for i, (a, b) in enumerate(bounds)]
    # Averages of the first decay lie as the weights do, those of the second elsewhere.
    averages = [
        [kept[0][64 * i + a : 64 * i + b] for i, (a, b) in enumerate(bounds)],
        [kept[1][64 * i + 6 : 64 * i + 6 + b - a] for i, (a, b) in enumerate(bounds)],
    ]
    _assert_updated(averages, weights, [0.9, 0.5])
    for flat_averages, was, views in zip(kept, untouched, averages, strict=True):
        for view in views:
            view.fill_(torch.nan)
        assert torch.equal(flat_averages[~flat_averages.isnan()], was[~flat_averages.isnan()]), (
            "a neighbour was written"
        )


def test_several_blocks_of_several_tensors(device: str) -> None:
    sizes = [4096, 4097, 2 * 4096 + 5, 1, 3 * 4096]
    _assert_updated([[torch.randn(n, device=device) for n in sizes] for _ in range(2)],
                    [torch.randn(n, device=device) for n in sizes], [0.9, 0.99])  # fmt: skip


def test_300_tensors_of_mixed_types(device: str) -> None:
    dtypes = [FLOAT_DTYPES[i % len(FLOAT_DTYPES)] for i in range(300)]
    weights = [torch.randn(1 + i % 9, device=device).to(dtype) for i, dtype in enumerate(dtypes)]
    _assert_updated([[torch.randn(len(w), device=device) for w in weights] for _ in range(2)], weights, [0.9, 0.999])


def test_channels_last(device: str) -> None:
    weight = torch.randn(3, 8, 2, 5, device=device).contiguous(memory_format=torch.channels_last)
    average = torch.randn(3, 8, 2, 5, device=device).contiguous(memory_format=torch.channels_last)
    _assert_updated([[average]], [weight], [0.7])


def test_nan_and_infinity_come_through(device: str) -> None:
    weight = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf], device=device)
    for decay in (0.2, 0.9):
        average, plain = torch.ones(4, device=device), torch.ones(4, device=device).lerp_(weight, 1 - decay)
        ema_update([average], [weight], decay, backend="triton")
        torch.testing.assert_close(average, plain, equal_nan=True)


def test_parameters_take_part_without_a_graph(device: str) -> None:
    weight = torch.nn.Parameter(torch.ones(4, device=device))
    for backend in ("triton", "reference"):
        average = torch.nn.Parameter(torch.zeros(4, device=device))
        version = average._version
        ema_update([[average]], [weight], [0.5], backend=backend)
        assert average.grad_fn is None
        assert average._version > version, "autograd must know of the write"
        assert average.tolist() == [0.5] * 4


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_reference(device: str, dtype: torch.dtype) -> None:
    weights = [torch.randn(s, device=device).to(dtype) for s in SHAPES]
    averages = [[torch.randn(s, device=device) for s in SHAPES] for _ in DECAYS]
    expected = [
        [_exact(a, w, d) for a, w in zip(of, weights, strict=True)] for of, d in zip(averages, DECAYS, strict=True)
    ]
    reference.ema_update(averages, weights, DECAYS)
    for of_decay, exact in zip(averages, expected, strict=True):
        for average, value in zip(of_decay, exact, strict=True):
            torch.testing.assert_close(average.double(), value, rtol=1e-6, atol=1e-6)
    reference.ema_update([], [], 0.5)


def test_tables_are_built_once_and_forgotten_in_turn(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm_kernels.ema_update import kernel

    built: list[int] = []
    build = kernel._build
    monkeypatch.setattr(kernel, "_build", lambda rows: (built.append(len(rows)), build(rows))[1])
    sets = [[torch.zeros(5, device=device) for _ in range(3)] for _ in range(kernel._MAX_TABLES + 1)]
    for decay in (0.1, 0.2, 0.3):
        ema_update([sets[0][0]], [sets[0][1]], decay, backend="triton")
    assert built == [1], "decays must not need tables of their own"
    for averages, weights, _ in sets:
        ema_update([averages], [weights], 0.5, backend="triton")
    assert len(kernel._tables) == kernel._MAX_TABLES
    before = len(built)
    ema_update([sets[-1][0]], [sets[-1][1]], 0.5, backend="triton")
    assert len(built) == before
    ema_update([sets[0][0]], [sets[0][1]], 0.5, backend="triton")
    assert len(built) == before + 1
    # The same average with other weights, or of another size, is another set.
    ema_update([sets[0][0]], [sets[0][2]], 0.5, backend="triton")
    ema_update([sets[0][0][:4]], [sets[0][1][:4]], 0.5, backend="triton")
    assert len(built) == before + 3


def test_launches_are_recorded_without_addresses() -> None:
    from ldm_kernels.ema_update import kernel

    flat = torch.empty(100_001, device="meta")
    with launch.recording(90) as recorded:
        kernel.ema_update_([[flat[:9000]], [flat[:9000]]], [flat[:9000]], [0.9, 0.99])
        kernel.ema_update_([[flat[1:9001]]], [flat[:9000]], [0.9])
        kernel.ema_update_([[flat]] * 6, [flat.bfloat16()], [0.9] * 6)
    constants = [
        tuple(n.constants[name] for name in ("WEIGHT_TYPE", "NUM_DECAYS", "VECTOR")) for n in recorded.launches
    ]
    assert [(*c, n.grid) for c, n in zip(constants, recorded.launches, strict=True)] == [
        ("fp32", 2, 4, (3,)),
        ("fp32", 1, 1, (3,)),
        ("bf16", 4, 4, (25,)),
        ("bf16", 4, 1, (1,)),  # the last element
        ("bf16", 2, 4, (25,)),
        ("bf16", 2, 1, (1,)),
    ]
    for launched in recorded.launches:
        assert all(a.is_meta for a in launched.arguments.values() if isinstance(a, Tensor))
        assert [type(launched.arguments[f"rate_{i}"]) for i in range(4)] == [float] * 4


def test_operator(device: str) -> None:
    averages = [torch.randn(5, device=device), torch.randn(2, 3, device=device)] * 2
    weights = [torch.randn(5, device=device), torch.randn(2, 3, device=device)]
    torch.library.opcheck(op._ema_update, ([x.clone() for x in averages], weights, [0.9, 0.5]))


def test_in_a_compiled_graph(device: str) -> None:
    def step(averages: list[list[Tensor]], weights: list[Tensor]) -> Tensor:
        ema_update(averages, weights, [0.9, 0.5], backend="triton")
        ema_update(averages, weights, [0.5, 0.9], backend="triton")
        return averages[0][0] + 1

    weights = [torch.randn(5, device=device), torch.randn(2, 3, device=device)]
    averages = [[torch.randn_like(w) for w in weights] for _ in range(2)]
    copies = [[a.clone() for a in of_decay] for of_decay in averages]
    expected = step(copies, weights)
    actual = torch.compile(step, backend="aot_eager", fullgraph=True)(averages, weights)
    torch.testing.assert_close(actual, expected)
    for of_decay, of_copy in zip(averages, copies, strict=True):
        torch.testing.assert_close(of_decay, of_copy)


def test_choice_of_implementation(device: str) -> None:
    weights = [torch.randn(4, 6, device=device)]

    def averages(count: int) -> list[list[Tensor]]:
        return [[torch.zeros(4, 6, device=device)] for _ in range(count)]

    across = [torch.zeros(6, 4, device=device).T]
    for lists, decay, backend, path in (
        (averages(1)[0], 0.5, "auto", "reference"),
        (averages(1), [0.5], "auto", "reference"),
        (averages(2), [0.5, 0.9], "auto", "triton"),
        (averages(2), [0.5, 0.9], "reference", "reference"),
        (averages(1)[0], 0.5, "triton", "triton"),
        ([across, across], [0.5, 0.9], "auto", "reference"),
    ):
        before = launch.outcomes().get(("ema_update", path), 0)
        ema_update(lists, weights, decay, backend=backend)  # type: ignore[arg-type]
        assert launch.outcomes()["ema_update", path] == before + 1, (decay, backend, path)
    torch.testing.assert_close(across[0], (0.9 * 0.5 + 0.1) * weights[0])
    with pytest.raises(ValueError, match=r"pair 0 of shape \(4, 6\) has strides \(6, 1\), \(1, 4\)"):
        ema_update([across], weights, [0.5], backend="triton")


def test_mistakes_are_explained_before_anything_is_written() -> None:
    good, weight = torch.zeros(3), torch.ones(3)
    cases = [
        ([good], [weight, weight], 0.5, ValueError, "1 averages .* for 2 weights"),
        ([good, torch.zeros(4)], [weight, weight], 0.5, ValueError, r"pair 1 .* shapes \(4,\) and \(3,\)"),
        ([good, torch.zeros(1)], [weight, weight], 0.5, ValueError, "same shape"),
        ([good, good.double()], [weight, weight], 0.5, TypeError, r"pair 1 .* torch\.float64 and torch\.float32"),
        ([good, good.half()], [weight, weight], 0.5, TypeError, "averages are float32"),
        ([good, good], [weight, weight.double()], 0.5, TypeError, "weights float32, float16 or bfloat16"),
        ([good, good.to("meta")], [weight, weight], 0.5, ValueError, "on meta and cpu"),
        ([good], [weight], 1.5, ValueError, r"decay 1\.5 is not between 0 and 1"),
        ([good], [weight], float("nan"), ValueError, "decay nan"),
        ([[good], [good]], [weight], [0.5], ValueError, "2 lists of averages for 1 decays"),
        ([[good], [torch.zeros(4)]], [weight], [0.5, 0.9], ValueError, r"pair 0 \(decay 0\.9\)"),
    ]
    for averages, weights, decay, error, message in cases:
        for backend in ("auto", "reference"):
            with pytest.raises(error, match=message):
                ema_update(averages, weights, decay, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="take one of auto, triton, reference"):
        ema_update([good], [weight], 0.5, backend="foreach")
    assert not good.any()


def test_nothing_to_do(device: str) -> None:
    for backend in ("auto", "triton", "reference"):
        ema_update([], [], 0.5, backend=backend)
        ema_update([[], []], [], [0.5, 0.9], backend=backend)
        ema_update([], [torch.ones(2, device=device)], [], backend=backend)
        ema_update([torch.zeros(0, device=device)], [torch.zeros(0, device=device)], 0.5, backend=backend)
