"""The frozen tower against a forward pass written out and against our own encoder; contexts as a condition."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ldm_scale.conditioning.base import Conditioner, Conditions, Tools
from ldm_scale.conditioning.frozen_text import FrozenTextCondition, FrozenTextEncoder
from ldm_scale.conditioning.text import TextCondition
from ldm_scale.config.schema import FrozenTextConditioningConfig, TextConditioningConfig
from ldm_scale.errors import ConfigError
from tests.helpers.towers import TINY_MODEL, tiny_tower

WIDTH, TOKENS, DEPTH, HEADS = 16, 9, 3, 2  # of the tiny tower
CAPTIONS = ["a red apple", "", "a green pear", "a red apple"]
SIZE = (4, 4)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> FrozenTextConditioningConfig:
    return tiny_tower(tmp_path_factory.mktemp("open_clip"))


@pytest.fixture(scope="module")
def encoder(config: FrozenTextConditioningConfig) -> FrozenTextEncoder:
    return FrozenTextEncoder(config)


def written_out(config: FrozenTextConditioningConfig, captions: list[str], depth: int) -> Tensor:
    """The tower's forward pass from OpenCLIP's own parts, of which the first `depth` blocks run."""
    model: Any = open_clip.create_model(TINY_MODEL, pretrained=config.weights).eval()
    tokens = open_clip.get_tokenizer(TINY_MODEL)(captions)
    x = model.token_embedding(tokens) + model.positional_embedding
    for block in model.transformer.resblocks[:depth]:
        x = block(x, attn_mask=model.attn_mask)
    return model.ln_final(x)  # type: ignore[no-any-return]


def test_the_layers_are_those_of_a_forward_pass_written_out(
    config: FrozenTextConditioningConfig, encoder: FrozenTextEncoder
) -> None:
    last = FrozenTextEncoder(dataclasses.replace(config, layer="last"))
    with torch.no_grad():
        assert torch.allclose(encoder(CAPTIONS), written_out(config, CAPTIONS, DEPTH - 1), atol=1e-5)
        assert torch.allclose(last(CAPTIONS), written_out(config, CAPTIONS, DEPTH), atol=1e-5)
    assert not torch.allclose(last(CAPTIONS), encoder(CAPTIONS), atol=1e-2)


def test_our_encoder_with_the_same_weights_gives_the_same(
    config: FrozenTextConditioningConfig, encoder: FrozenTextEncoder
) -> None:
    ours = TextCondition(TextConditioningConfig(max_tokens=TOKENS, width=WIDTH, depth=DEPTH - 1, num_heads=HEADS))
    theirs = encoder.tower.state_dict()
    parts = {
        "norm1": "ln_1",
        "attention.to_qkv": "attn.in_proj_",
        "attention.to_out": "attn.out_proj",
        "norm2": "ln_2",
        "mlp_in": "mlp.c_fc",
        "mlp_out": "mlp.c_proj",
    }
    state = {
        "encoder.token_embedding.weight": theirs["token_embedding.weight"],
        "encoder.position_embedding": theirs["positional_embedding"],
        "encoder.norm_out.weight": theirs["ln_final.weight"],
        "encoder.norm_out.bias": theirs["ln_final.bias"],
    }
    for block in range(DEPTH - 1):
        for mine, other in parts.items():
            for leaf in ("weight", "bias"):
                name = f"transformer.resblocks.{block}.{other}{'' if other.endswith('_') else '.'}{leaf}"
                state[f"encoder.blocks.{block}.{mine}.{leaf}"] = theirs[name]
    ours.load_state_dict(state)
    tokens, _ = encoder.tokenizer(CAPTIONS, TOKENS)
    assert torch.allclose(ours(tokens, SIZE), encoder(CAPTIONS), atol=1e-5)


def test_a_frozen_tower_has_no_gradients_and_keeps_its_type(config: FrozenTextConditioningConfig) -> None:
    encoder = FrozenTextEncoder(config).to(torch.bfloat16)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    context = encoder(CAPTIONS)
    assert context.dtype == torch.bfloat16
    assert torch.allclose(context.float(), FrozenTextEncoder(config)(CAPTIONS), atol=0.1)


def test_what_is_cut_is_counted(config: FrozenTextConditioningConfig) -> None:
    encoder = FrozenTextEncoder(config)
    encoder(["red " * 20, "a", "red " * 20])
    assert encoder.truncated == 2


def test_a_condition_passes_contexts_on_and_its_null_is_the_empty_captions(
    config: FrozenTextConditioningConfig, encoder: FrozenTextEncoder
) -> None:
    condition = FrozenTextCondition(config)
    assert list(condition.state_dict()) == []
    tools = Tools(torch.device("cpu"), encode_text=encoder)
    inputs = condition.prepare(Conditions(captions=CAPTIONS), tools)
    assert torch.equal(condition(inputs, SIZE), encoder(CAPTIONS))
    given = condition.prepare(Conditions(text_contexts=inputs), Tools(torch.device("cpu")))
    assert torch.equal(given, inputs)
    assert not condition.has_null
    null = encoder([""])
    condition.set_null(null)
    assert torch.equal(condition.null(inputs)[2], null[0])
    # The one was encoded alone and the other beside two more: on some processors another order of sums.
    assert_close(null[0], inputs[1])
    assert not torch.allclose(condition.null(inputs)[0], inputs[0], atol=1e-2)
    dropped = Conditioner({"frozen_text": condition}).drop(
        {"frozen_text": inputs}, torch.tensor([[0.05], [0.5], [0.5], [0.5]])
    )["frozen_text"]
    assert torch.equal(dropped[0], null[0])
    assert torch.equal(dropped[1:], inputs[1:])


def test_contexts_keep_the_models_type_when_dropped(config: FrozenTextConditioningConfig) -> None:
    condition = FrozenTextCondition(config)
    condition.set_null(torch.zeros(1, TOKENS, WIDTH))
    assert condition.null(torch.ones(2, TOKENS, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_condition_without_what_it_needs_says_so(config: FrozenTextConditioningConfig) -> None:
    condition, tools = FrozenTextCondition(config), Tools(torch.device("cpu"))
    with pytest.raises(ConfigError, match="captions need the tower tiny-frozen-text"):
        condition.prepare(Conditions(captions=["a"]), tools)
    with pytest.raises(ConfigError, match="without that of the empty caption"):
        condition.null(torch.zeros(1, TOKENS, WIDTH))
    for contexts in (torch.zeros(1, TOKENS + 1, WIDTH), torch.zeros(1, TOKENS, WIDTH + 1), torch.zeros(TOKENS, WIDTH)):
        with pytest.raises(ConfigError, match=r"contexts of shape .* \(images, 9, 16\)"):
            condition.prepare(Conditions(text_contexts=contexts), tools)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "ViT-Z"}, "conditioning.frozen_text.model=ViT-Z: OpenCLIP has no architecture of that name"),
        ({"model": "ViT-B-16-SigLIP"}, "its text tower is not CLIP's own with byte pairs"),
        (
            {"weights": "no/such.pt"},
            "weights=no/such.pt: neither a file nor weights that OpenCLIP knows of tiny",
        ),
        ({"width": 32}, "has 9 tokens of width 16; set conditioning.frozen_text.max_tokens=9 conditioning.frozen_text"),
        (
            {"model": "ViT-L-14", "weights": "openai"},
            "trained with the other GELU; set conditioning.frozen_text.model=ViT-L-14-quickgelu",
        ),
    ],
)
def test_towers_that_cannot_be_are_one_line(
    config: FrozenTextConditioningConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        FrozenTextEncoder(dataclasses.replace(config, **change))
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_one_line(config: FrozenTextConditioningConfig, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name in ("w.pt", "text.pt"):
        with pytest.raises(ConfigError, match=rf"{name}: cannot be loaded into tiny-frozen-text") as caught:
            FrozenTextEncoder(dataclasses.replace(config, weights=str(tmp_path / name)))
        assert "\n" not in str(caught.value)
