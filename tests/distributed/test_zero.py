"""At every ZeRO stage a sharded model trains, is averaged and is put back as a plain torch model would be.

Each case runs once, in ranks of its own, and reports everything; the tests then look at one promise each.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from ldm_scale.config.schema import EmaConfig
from ldm_scale.engine import gradients
from ldm_scale.engine.collectives import barrier
from ldm_scale.engine.ema import ShardedEma
from ldm_scale.engine.zero import MOMENTS, ShardedModel
from ldm_scale.errors import NumericsError
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded import (
    BATCH,
    OPTIMIZER,
    Network,
    data,
    masters,
    max_difference,
    moments,
    network,
    predict,
    sharded,
    squared_error,
    train_step,
    whole,
)

RATES = (1e-2, 5e-3, 2e-2)  # of the three steps
LOSS_SCALES = (30.0, 0.05, 1.0)  # gradients far above the clipping norm, below it, between
EMA = EmaConfig(half_life_images=10.0, warmup_ratio=0.9, power_stds=(0.05, 0.2))
STEPS_SET = 40


def _exercise(stage: int, precision: str) -> dict[str, Any]:
    model = sharded(network(), stage, precision)
    ema = ShardedEma(model, EMA)
    report: dict[str, Any] = {"initial": masters(model), "trajectory": [], "norms": [], "averages": []}
    report["coverage"] = whole(model, [fragment.master for fragment in model.fragments])[1]
    for step, (lr, scale) in enumerate(zip(RATES, LOSS_SCALES, strict=True)):
        report["norms"].append(train_step(model, step, lr, scale))
        ema.update((step + 1) * BATCH, BATCH)
        report["trajectory"].append(masters(model))
        report["averages"].append({name: whole(model, values)[0] for name, values in ema.averages.items()})
    report["steps"] = model.optimizer_steps
    report["prediction"] = predict(model)
    report |= _replace(model, ema)

    model.set_optimizer_steps(STEPS_SET)
    report["steps_set"] = model.optimizer_steps
    report["moments"] = {key: moments(model, key) for key in MOMENTS}
    report["late_norm"] = train_step(model, 7, RATES[0])
    report["after_late_step"] = masters(model)
    return report


def _replace(model: ShardedModel, ema: ShardedEma) -> dict[str, Any]:
    """What is computed with the average's weights, with constant ones, and after them."""
    report: dict[str, Any] = {}
    report["prediction_of_average"] = {}
    for name in ema.names:
        with ema.active(name):
            report["prediction_of_average"][name] = predict(model)
    with ema.active():
        report["prediction_of_first_average"] = predict(model)
    with model.masters_replaced_by([torch.full((f.length,), 0.1) for f in model.fragments]):
        report["replaced"] = masters(model)
        report["prediction_of_constant"] = predict(model)
    report["restored"] = masters(model)
    report["prediction_restored"] = predict(model)
    return report


def _refuse(stage: int, precision: str, value: float) -> dict[str, Any]:
    """What a step does whose gradient is not finite on the last rank alone."""
    model = sharded(network(), stage, precision)
    is_last = model.environment.rank == model.environment.world_size - 1
    train_step(model, 0, RATES[0])
    report: dict[str, Any] = {"before": masters(model), "prediction_before": predict(model), "refusal": ""}
    try:
        train_step(model, 1, RATES[1], value if is_last else 1.0)
    except NumericsError as error:
        report["refusal"] = str(error)
    return report | {"after": masters(model), "prediction_after": predict(model), "steps": model.optimizer_steps}


@dataclass
class Case:
    """What the ranks of one case reported."""

    ranks: int
    stage: int
    dtype: torch.dtype
    reports: list[dict[str, Any]]

    def __getitem__(self, key: str) -> Any:
        return self.reports[0][key]

    def prediction(self, weights: dict[str, Tensor]) -> Tensor:
        """What plain torch computes with these weights, in the type that the case computes in."""
        plain = network()
        plain.load_state_dict(weights)
        with torch.no_grad():
            return plain.to(self.dtype)(data(0)[0].to(self.dtype)).float()  # type: ignore[no-any-return]


FP32 = [(ranks, stage, "fp32") for ranks in (1, 2) for stage in range(4)]
BF16 = [(2, stage, "bf16") for stage in range(4)]


@pytest.fixture(scope="module", params=FP32 + BF16, ids=lambda p: f"{p[0]}ranks-stage{p[1]}-{p[2]}")
def case(request: pytest.FixtureRequest) -> Case:
    ranks, stage, precision = request.param
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Case(ranks, stage, dtype, run_ranks(_exercise, ranks, stage, precision))


@dataclass
class Plain:
    """The same three steps by torch alone."""

    network: Network = field(default_factory=network)
    trajectory: list[dict[str, Tensor]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(), betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, weight_decay=OPTIMIZER.weight_decay
    )


def _plain_step(module: nn.Module, adam: torch.optim.AdamW, step: int, lr: float, scale: float) -> float:
    adam.param_groups[0]["lr"] = lr
    x, target = data(step)
    adam.zero_grad()
    torch.autograd.backward(scale * squared_error(module(x), target))
    assert OPTIMIZER.gradient_clip is not None
    norm = nn.utils.clip_grad_norm_(module.parameters(), OPTIMIZER.gradient_clip)
    adam.step()
    return float(norm)


@pytest.fixture(scope="module")
def plain() -> Plain:
    result = Plain()
    adam = _adamw(result.network)
    for step, (lr, scale) in enumerate(zip(RATES, LOSS_SCALES, strict=True)):
        result.norms.append(_plain_step(result.network, adam, step, lr, scale))
        result.trajectory.append(_weights(result.network))
    return result


def test_steps_equal_plain_adamw_with_clipping(case: Case, plain: Plain) -> None:
    initial = {name: weight.to(case.dtype).float() for name, weight in _weights(network()).items()}
    assert max_difference(case["initial"], initial) == 0
    clipped = [norm > (OPTIMIZER.gradient_clip or 0.0) for norm in plain.norms]
    assert clipped == [True, False, True], "clipping must act in some steps and not in others"
    if case.dtype == torch.float32:
        assert case["norms"] == pytest.approx(plain.norms, rel=1e-5)
        for actual, expected in zip(case["trajectory"], plain.trajectory, strict=True):
            assert max_difference(actual, expected) <= 1e-6
    else:  # gradients are rounded to 8 bits, and Adam amplifies the small ones
        assert case["norms"] == pytest.approx(plain.norms, rel=0.05)
        assert max_difference(case["trajectory"][-1], plain.trajectory[-1]) <= 0.2 * sum(RATES)


def test_ranks_agree(case: Case) -> None:
    for report in case.reports:
        assert report["norms"] == case["norms"]
        assert report["steps"] == case["steps"]
        assert torch.equal(report["prediction"], case["prediction"])


def test_fragments_cover_every_parameter_once(case: Case) -> None:
    times = case.ranks if case.stage == 0 else 1
    shapes = {name: parameter.shape for name, parameter in network().named_parameters()}
    assert {name: count.shape for name, count in case["coverage"].items()} == shapes
    for name, count in case["coverage"].items():
        assert torch.equal(count, torch.full_like(count, times)), name


def test_computes_with_its_masters(case: Case) -> None:
    expected = case.prediction(case["trajectory"][-1])
    assert torch.allclose(case["prediction"], expected, rtol=0, atol=1e-6)


def test_replaced_masters_compute_and_go_back_bit_for_bit(case: Case) -> None:
    assert all(torch.equal(value, torch.full_like(value, 0.1)) for value in case["replaced"].values())
    expected = case.prediction(case["replaced"])
    assert not torch.allclose(expected, case["prediction"], atol=1e-2), "the replacement makes no difference"
    assert torch.allclose(case["prediction_of_constant"], expected, rtol=0, atol=1e-6)
    assert max_difference(case["restored"], case["trajectory"][-1]) == 0
    assert torch.equal(case["prediction_restored"], case["prediction"])


def _decay(name: str, step: int) -> float:
    """Share that the step keeps, by the definitions: half-lives; (1 - 1/t)^(gamma + 1) for a width of gamma."""
    if name == "ema":
        return float(0.5 ** (BATCH / min(10.0, 0.9 * (step + 1) * BATCH)))
    variance = float(name.removeprefix("ema=")) ** 2
    gamma = scipy.optimize.brentq(lambda g: (g + 1) / ((g + 2) ** 2 * (g + 3)) - variance, 0.0, 1e4)
    return float((1 - 1 / (step + 1)) ** (gamma + 1))


@pytest.mark.parametrize("name", ["ema", "ema=0.05", "ema=0.2"])
def test_averages_equal_dense_ones(case: Case, name: str) -> None:
    average = {key: weight.double() for key, weight in case["initial"].items()}
    for step, (weights, actual) in enumerate(zip(case["trajectory"], case["averages"], strict=True)):
        decay = _decay(name, step)
        average = {key: decay * average[key] + (1 - decay) * weights[key].double() for key in average}
        assert max_difference(actual[name], average) <= 1e-6
    assert max_difference(average, case["trajectory"][-1]) > 1e-6, "the average is the weights themselves"
    expected = case.prediction(case["averages"][-1][name])
    assert torch.allclose(case["prediction_of_average"][name], expected, rtol=0, atol=1e-6)


def test_the_first_average_is_the_one_that_is_shown(case: Case) -> None:
    assert torch.equal(case["prediction_of_first_average"], case["prediction_of_average"]["ema"])
    assert not torch.equal(case["prediction_of_first_average"], case["prediction_of_average"]["ema=0.2"])


def _update_on_rank_0_alone(stage: int) -> bool:
    model = sharded(network(), stage)
    ema = ShardedEma(model, EMA)
    train_step(model, 0, RATES[0])
    if model.environment.is_main:  # a collective in here would wait for the other rank until the test's time is up
        ema.update(BATCH, BATCH)
    barrier()
    return all(torch.equal(a, f.master) for a, f in zip(ema.averages["ema=0.05"], model.fragments, strict=True))


@pytest.mark.parametrize("stage", range(4))
def test_an_update_needs_no_other_rank(stage: int) -> None:
    assert run_ranks(_update_on_rank_0_alone, 2, stage, timeout_s=30.0) == [True, False]


def test_adam_goes_on_from_moments_and_a_step_count_that_were_set(case: Case) -> None:
    assert case["steps"] == len(RATES)
    assert case["steps_set"] == STEPS_SET
    module = network()
    module.load_state_dict(case["trajectory"][-1])
    adam = _adamw(module)
    for name, parameter in module.named_parameters():
        values = {key: value[name].clone() for key, value in case["moments"].items()}
        adam.state[parameter] = {"step": torch.tensor(float(STEPS_SET)), **values}
    norm = _plain_step(module, adam, 7, RATES[0], 1.0)
    assert case["late_norm"] == pytest.approx(norm, rel=1e-5 if case.dtype == torch.float32 else 0.05)
    limit = 1e-6 if case.dtype == torch.float32 else 0.02 * RATES[0]
    assert max_difference(case["after_late_step"], _weights(module)) <= limit


@pytest.mark.parametrize(("precision", "value"), [("fp32", math.inf), ("fp32", math.nan), ("bf16", math.nan)])
@pytest.mark.parametrize("stage", range(4))
def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(stage: int, precision: str, value: float) -> None:
    for report in run_ranks(_refuse, 2, stage, precision, value):
        assert "the step was not applied" in report["refusal"]
        assert max_difference(report["after"], report["before"]) == 0
        assert torch.equal(report["prediction_after"], report["prediction_before"])
        assert report["steps"] == 1


def _judged_and_not(stage: int, precision: str) -> dict[str, Any]:
    """Steps whose gradient is looked at before, and the same steps without."""
    plain, judged = sharded(network(), stage, precision), sharded(network(), stage, precision)
    squares: list[Tensor] = []
    norms = [
        train_step(plain, step, lr, scale) for step, (lr, scale) in enumerate(zip(RATES, LOSS_SCALES, strict=True))
    ]
    optimizer = judged.engine.optimizer
    read = getattr(optimizer, "get_grad_norm_direct", None)  # not at stage 0
    with mock.patch.object(optimizer, "get_grad_norm_direct", side_effect=read, create=True) as counted:
        for step, (lr, scale) in enumerate(zip(RATES, LOSS_SCALES, strict=True)):
            assert train_step(judged, step, lr, scale, squares) == norms[step]
    return {
        "norms": norms,
        "squares": [float(square) for square in squares],
        "difference": max_difference(masters(judged), masters(plain)),
        "reads": counted.call_count,
    }


def _one_norm_and_each(num_steps: int) -> dict[str, Any]:
    """Steps in bf16 at stage 0 by the one norm, and by DeepSpeed's own checks of every parameter."""
    from deepspeed.runtime.utils import CheckOverflow

    ours, theirs = sharded(network(), 0, "bf16"), sharded(network(), 0, "bf16")
    report: dict[str, Any] = {"norms": [], "searches": []}
    search = CheckOverflow.has_overflow_serial
    for step in range(num_steps):
        for model, patched in ((ours, nullcontext()), (theirs, mock.patch.object(gradients, "_checks_each", _never))):
            with patched, mock.patch.object(CheckOverflow, "has_overflow_serial", autospec=True) as counted:
                counted.side_effect = search
                norm = train_step(model, step, RATES[step % 3], LOSS_SCALES[step % 3])
            own = float(model.engine.optimizer._global_grad_norm)
            report["norms"].append((norm, own))
            report["searches"].append(counted.call_count)
    report["difference"] = max_difference(masters(ours), masters(theirs))
    report["size"] = max(float(master.abs().max()) for master in masters(ours).values())
    return report


def _never(engine: Any) -> bool:
    return False


def test_stage_0_in_bf16_steps_by_one_norm_as_by_each_parameters() -> None:
    for report in run_ranks(_one_norm_and_each, 2, 20, timeout_s=60.0):
        assert report["searches"] == [0, 1] * 20, "DeepSpeed asked the device about each parameter"
        for (norm, handed), (_, theirs) in zip(report["norms"][::2], report["norms"][1::2], strict=True):
            assert norm == pytest.approx(handed, rel=1e-6)
            assert norm == pytest.approx(theirs, rel=1e-4), "also after steps that differ by rounding"
        assert report["difference"] <= 1e-5 * report["size"]


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (0, "bf16")]
)
def test_a_gradient_that_was_looked_at_makes_the_same_step(stage: int, precision: str) -> None:
    reports = run_ranks(_judged_and_not, 2, stage, precision, timeout_s=30.0)
    assert [report["difference"] for report in reports] == [0.0, 0.0]
    squares = torch.tensor([report["squares"] for report in reports], dtype=torch.float64).mean(dim=0)
    norms = torch.tensor(reports[0]["norms"], dtype=torch.float64)
    torch.testing.assert_close(squares.sqrt(), norms, rtol=1e-6, atol=0.0)
    assert [report["reads"] for report in reports] == [0 if stage == 0 else len(RATES)] * 2, "DeepSpeed read it again"


def _start_where_shared_memory_could_be_used() -> bool:
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    def load(builder: Any) -> None:
        raise AssertionError("the op would be compiled, and messages would go around the network")

    ShareMemCommBuilder.load = load
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = True
    sharded(network(), 1)
    return deepspeed.comm.comm.cdb.shm_comm_op is None


def test_deepspeed_sends_its_messages_over_the_network() -> None:
    assert run_ranks(_start_where_shared_memory_could_be_used, 2) == [True, True]
