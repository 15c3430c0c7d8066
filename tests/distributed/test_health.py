"""Ranks that should agree and do not are found on all of them, by name; ranks that do agree pass at every stage."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm_scale import faults
from ldm_scale.config.schema import EmaConfig
from ldm_scale.engine.checkpoint import Trained
from ldm_scale.engine.ema import ShardedEma
from ldm_scale.engine.health import RankBatch, check_ranks
from ldm_scale.errors import NumericsError
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded import network, sharded, train_step

EMA = EmaConfig(half_life_images=10.0, power_stds=(0.1,))
Fault = Callable[[Trained], None]


def _start(stage: int, precision: str) -> Trained:
    model = sharded(network(), stage, precision)
    ema = ShardedEma(model, EMA)
    for step in range(2):
        train_step(model, step, 1e-2)
        ema.update((step + 1) * 8, 8)
    return Trained(model, ema, {"usage": torch.arange(5)})


def _batch(rank: int) -> RankBatch:
    return RankBatch([16 + 2 * rank, 17 + 2 * rank], [f"s/{2 * rank}", f"s/{2 * rank + 1}"], num_samples=100)


def _message(item: Trained, batch: RankBatch | None = None) -> str:
    try:
        check_ranks({"net": item}, batch or _batch(item.model.environment.rank), 16)
    except NumericsError as error:
        return str(error)
    return ""


def _faulty(stage: int, precision: str, ranks: list[int], faults: dict[str, Fault]) -> dict[str, str]:
    """What is said of each fault on `ranks` alone, after a check that must pass."""
    item = _start(stage, precision)
    messages = {"": _message(item)}
    for name, fault in faults.items():
        if item.model.environment.rank in ranks:
            fault(item)
        messages[name] = _message(item)
        if item.model.environment.rank in ranks:
            fault(item)  # each undoes itself
    messages["after"] = _message(item)
    return messages


def _flip(x: torch.Tensor) -> None:
    """Negates the last element, in place, whatever the type."""
    with torch.no_grad():
        x.view(-1)[-1].neg_()


def _parameter(item: Trained) -> None:
    _flip(dict(item.model.module.named_parameters())["first.weight"])


def _average(item: Trained) -> None:
    assert item.ema is not None
    _flip(item.ema.averages["ema=0.1"][0])


def _moment(item: Trained) -> None:
    _flip(item.model.moments(item.model.fragments[-1])["exp_avg"])


def _buffer(item: Trained) -> None:
    _flip(item.buffers["usage"])


def _run(function: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """The ranks' common result."""
    results = run_ranks(function, ranks, *args)
    assert all(result == results[0] for result in results), "the ranks were told different things"
    return results[0]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16")])
def test_copies_that_differ_are_named(stage: int, precision: str) -> None:
    faults: dict[str, Fault] = {"parameter": _parameter, "average": _average, "moment": _moment, "buffer": _buffer}
    found = _run(_faulty, 2, stage, precision, [1], faults)
    assert found[""] == found["after"] == ""
    for name, tensor in (
        ("parameter", r"net/parameter/first\.weight"),
        ("average", r"net/ema=0\.1/first\.weight"),
        ("moment", r"net/exp_avg/last\.bias"),
        ("buffer", "net/buffer/usage"),
    ):
        tensors = 2 if (name, precision) == ("parameter", "fp32") else 1  # in fp32 the masters are the parameters
        assert re.search(
            rf"at 16 images: ranks disagree about {tensor}, the first of {tensors} tensors of \d+: "
            r"rank\(s\) 0 against 1;",
            found[name],
        ), (name, found[name])


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "bf16")])
def test_divided_masters_and_whole_parameters(stage: int, precision: str) -> None:
    found = _run(_faulty, 2, stage, precision, [1], {"parameter": _parameter, "buffer": _buffer})
    assert found[""] == found["after"] == ""
    assert "net/parameter/first.weight" in found["parameter"]
    assert "net/buffer/usage" in found["buffer"]
    # On all ranks alike: nothing differs, yet the rank that owns the masters sees it.
    everywhere = _run(_faulty, 2, stage, precision, [0, 1], {"parameter": _parameter})["parameter"]
    assert re.search(r"on rank \d net/parameter/first\.weight is not what its fp32 masters say", everywhere)


def test_parameters_divided_at_stage_3() -> None:
    found = _run(_faulty, 2, 3, "fp32", [1], {"buffer": _buffer})
    assert found[""] == found["after"] == ""
    assert "net/buffer/usage" in found["buffer"]


def _flipped(stage: int, precision: str, fault: str) -> str:
    os.environ[faults.VARIABLE] = fault
    return _message(_start(stage, precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_one_bit_of_a_weight_on_one_rank(stage: int, precision: str) -> None:
    """The lowest bit of the first weight, after the second step."""
    message = _run(_flipped, 2, stage, precision, "flip:at=weights,rank=1,nth=2")
    if stage < 3:
        assert re.search(r"ranks disagree about net/parameter/first\.weight, .*: rank\(s\) 0 against 1;", message)
    else:
        assert "on rank 1 net/parameter/first.weight is not what its fp32 masters say" in message
    assert _run(_flipped, 2, stage, precision, "") == ""


def _impossible(item: Trained) -> None:
    """The sign of a second moment, which no copy of another rank would tell."""
    moment = item.model.moments(item.model.fragments[-1])["exp_avg_sq"]
    with torch.no_grad():
        moment.view(-1)[-1].neg_()


def _infinite(item: Trained) -> None:
    """An average that a flipped exponent has made infinite, and back."""
    assert item.ema is not None
    value = item.ema.averages["ema"][0].view(-1)
    value[0] = 0.25 if value[0].isinf() else float("inf")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_divided_values_that_cannot_be(stage: int) -> None:
    found = _run(_faulty, 2, stage, "fp32", [1], {"moment": _impossible, "average": _infinite})
    assert found[""] == found["after"] == ""
    assert re.search(r"on rank 1 net/exp_avg_sq/last\.\w+ has values that cannot be \(-", found["moment"])
    assert re.search(r"on rank 1 net/ema/[\w.]+ has values that cannot be \(\S+ to inf\)", found["average"])


def _lost_piece(stage: int, shift: int | None) -> str:
    item = _start(stage, "fp32")
    if item.model.environment.rank == 1:
        last = item.model.fragments.pop()
        if shift is not None:
            moved = type(last)(last.name, last.shape, last.offset + shift, last.owner, last.start, last.length)
            item.model.fragments.append(moved)
    return _message(item)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_piece_that_no_rank_holds(stage: int) -> None:
    message = _run(_lost_piece, 2, stage, None)
    assert re.search(
        r"net/last\.\w+ is not divided among the ranks: at element \d+ the parameter's end leaves", message
    )


def test_a_piece_that_two_ranks_hold() -> None:
    message = _run(_lost_piece, 2, 3, -1)
    assert re.search(r"net/last\.weight .* at element 3 the piece of rank 1 begins before rank 0's piece ends", message)


def _batches(batches: list[RankBatch]) -> str:
    item = Trained(sharded(network(), 0))
    rank = item.model.environment.rank
    return _message(item, batches[rank])


def test_the_same_images_on_two_ranks() -> None:
    message = _run(_batches, 3, [_batch(0), _batch(1), _batch(1)])
    assert "ranks 1 and 2 both train on image 18 of the run; start each rank with its own RANK" in message


def test_the_same_samples_under_other_numbers() -> None:
    again = RankBatch([20, 21], _batch(0).keys, num_samples=100)
    assert "ranks 0 and 1 train on the same samples, s/0 ..." in _run(_batches, 2, [_batch(0), again])
    next_epoch = RankBatch([100, 101], _batch(0).keys, num_samples=100)
    assert _run(_batches, 2, [_batch(0), next_epoch]) == ""
