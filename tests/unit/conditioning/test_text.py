"""Captions as a condition: the null, dropping, what is cut and counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditioner, Conditions, Tools
from ldm_scale.conditioning.text import TextCondition
from ldm_scale.config.schema import TextConditioningConfig
from ldm_scale.errors import ConfigError
from ldm_scale.telemetry import log
from tests.helpers.weights import random_state

CLIP = TextConditioningConfig(width=16, depth=2, num_heads=4, max_tokens=10)
BERT = dataclasses.replace(CLIP, encoder="bert", num_heads=2, head_dim=6)
TOOLS = Tools(torch.device("cpu"))
SIZE = (4, 4)


def make(config: TextConditioningConfig) -> TextCondition:
    condition = TextCondition(config)
    condition.load_state_dict(random_state(condition))
    return condition.eval()


def prepare(condition: TextCondition, *captions: str) -> Tensor:
    return condition.prepare(Conditions(captions=captions), TOOLS)


@pytest.mark.parametrize("config", [CLIP, BERT], ids=["clip", "bert"])
def test_a_caption_matters_and_the_null_is_the_empty_one(config: TextConditioningConfig) -> None:
    condition = make(config)
    inputs = prepare(condition, "a red apple", "", "a red apple")
    assert inputs.shape == (3, 10)
    null = condition.null(inputs)
    assert torch.equal(null, inputs[1].expand(3, -1))
    context = condition(inputs, SIZE)
    assert context.shape == (3, 10, 16)
    assert torch.equal(context[0], context[2])
    assert not torch.allclose(context[0], condition(null, SIZE)[0], atol=1e-2)


def test_dropped_rows_are_null_and_the_others_as_they_were() -> None:
    conditioner = Conditioner({"text": make(CLIP)})
    inputs = {"text": prepare(conditioner["text"], "a", "b", "c")}  # type: ignore[arg-type]
    dropped = conditioner.drop(inputs, torch.tensor([[0.05], [0.5], [0.0999]]))["text"]
    null = conditioner["text"].null(inputs["text"])  # type: ignore[operator]
    assert torch.equal(dropped[[0, 2]], null[:2])
    assert torch.equal(dropped[1], inputs["text"][1])
    assert torch.equal(conditioner.null_inputs(inputs)["text"], null)


@pytest.mark.parametrize("config", [CLIP, BERT], ids=["clip", "bert"])
def test_gradients_reach_every_parameter(config: TextConditioningConfig) -> None:
    condition = make(config)
    (condition(prepare(condition, "a red apple", "b"), SIZE).square() * torch.randn(16)).sum().backward()
    assert [name for name, p in condition.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_is_cut_is_said_once_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log, "_said", set())
    condition = make(CLIP)
    prepare(condition, "a", "red " * 20)
    prepare(condition, "red " * 20, "blue " * 20, "")
    assert condition.truncated == 3
    said = capsys.readouterr().err
    assert said.count("caption longer than the text encoder's 10 tokens") == 1
    assert "red red" in said


def test_captions_are_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    condition = make(CLIP)
    seen: list[str] = []
    tokenizer = condition.tokenizer
    monkeypatch.setattr(
        condition,
        "_tokenizer",
        dataclasses.replace(tokenizer, encode=lambda text: seen.append(text) or tokenizer.encode(text)),  # type: ignore[func-returns-value]
    )
    first = prepare(condition, "a", "b", "a")
    assert torch.equal(prepare(condition, "b", "a"), first[[1, 2]])
    assert seen == ["a", "b"]


def test_parameters_need_no_vocabulary_and_captions_do() -> None:
    condition = TextCondition(dataclasses.replace(BERT, tokenizer="wordpiece", vocabulary="nowhere/vocab.txt"))
    with pytest.raises(ConfigError, match=r"nowhere/vocab\.txt"):
        prepare(condition, "a")


def test_captions_are_needed() -> None:
    with pytest.raises(ConfigError, match="no captions"):
        make(CLIP).prepare(Conditions(classes=torch.tensor([1])), TOOLS)
