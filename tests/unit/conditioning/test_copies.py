"""What a model is conditioned on goes to the device by `put_on` alone, and in its own type: nobody waits for a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_scale.conditioning import base, text
from ldm_scale.conditioning.base import Condition, Conditioner, Conditions, Tools
from ldm_scale.conditioning.classes import ClassCondition
from ldm_scale.conditioning.frozen_text import FrozenTextCondition
from ldm_scale.conditioning.inpainting import InpaintingCondition
from ldm_scale.conditioning.layout import LayoutCondition
from ldm_scale.conditioning.semantic_map import SemanticMapCondition
from ldm_scale.conditioning.super_resolution import LowResolutionCondition
from ldm_scale.conditioning.text import TextCondition
from ldm_scale.config import schema
from ldm_scale.data.annotations import Layout, SceneObject
from ldm_scale.engine.copies import put_on

HOST, DEVICE = torch.device("cpu"), torch.device("meta")  # meta: a device that the host's tensors must be copied to
WHOLE = (0.0, 0.0, 1.0, 1.0)
IMAGES = torch.rand(2, 3, 8, 8, dtype=torch.float64)


def _frozen_text() -> FrozenTextCondition:
    condition = FrozenTextCondition(schema.FrozenTextConditioningConfig(max_tokens=3, width=4, drop_probability=0.5))
    condition.set_null(torch.zeros(1, 3, 4, device=DEVICE))
    return condition


def _cases() -> dict[str, tuple[Condition, Conditions, int]]:
    """A condition, what it is given, and how many tensors that is."""
    small: dict[str, Any] = {"width": 8, "depth": 1, "num_heads": 2, "drop_probability": 0.5}
    layouts = [Layout((SceneObject(1, WHOLE),), WHOLE)] * 2
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    masks[..., :4] = 1
    return {
        "frozen_text": (_frozen_text(), Conditions(text_contexts=torch.rand(2, 3, 4).half()), 1),
        "text": (TextCondition(schema.TextConditioningConfig(max_tokens=6, **small)), Conditions(["a", "b"]), 1),
        "classes": (
            ClassCondition(schema.ClassConditioningConfig(num_classes=4, width=8, drop_probability=0.5)),
            Conditions(classes=torch.tensor([1, -1], dtype=torch.int32)),
            1,
        ),
        "layout": (
            LayoutCondition(schema.LayoutConditioningConfig(num_classes=4, num_tokens=30, max_objects=2, **small)),
            Conditions(layouts=layouts),
            1,
        ),
        "semantic_map": (
            SemanticMapCondition(schema.SemanticMapConditioningConfig(num_labels=4, drop_probability=0.5)),
            Conditions(maps=torch.zeros(2, 8, 8, dtype=torch.uint8)),
            1,
        ),
        "low_resolution": (
            LowResolutionCondition(schema.LowResolutionConditioningConfig(drop_probability=0.5)),
            Conditions(low_resolution=IMAGES),
            1,
        ),
        "inpainting": (
            InpaintingCondition(schema.InpaintingConditioningConfig(drop_probability=0.5), latent_channels=4),
            Conditions(images=IMAGES, masks=masks),
            2,
        ),
    }


class _Moves(TorchDispatchMode):
    """Notes every copy from the host to the device: the tensor's type there, and here."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[tuple[torch.dtype, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        source = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}.get(func)
        if source is not None and found.device == DEVICE and args[source].device == HOST:
            self.types.append((args[source].dtype, found.dtype))
        return found


@pytest.mark.parametrize("name", list(_cases()))
def test_every_copy_is_queued(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    condition, y, given = _cases()[name]
    queued: list[Tensor] = []

    def recording(device: torch.device, x: Tensor) -> Tensor:
        queued.extend([x] if x.device != device else [])
        return put_on(device, x)

    for module in (base, text):
        monkeypatch.setattr(module, "put_on", recording)
    with _Moves() as moves:
        tools = Tools(DEVICE, encode=lambda x: torch.zeros(len(x), 4, 4, 4, device=x.device))
        inputs = condition.prepare(y, tools)
        assert len(queued) == given
        Conditioner({name: condition}).drop({name: inputs}, torch.tensor([[0.1], [0.9]]))
    assert inputs.device == DEVICE
    assert len(queued) == given + 1 + (name == "text"), "which rows are dropped, and the empty caption's tokens"
    assert moves.types == [(x.dtype, x.dtype) for x in queued]


def test_contexts_of_a_cache_are_fp32_afterwards() -> None:
    condition, y, _ = _cases()["frozen_text"]
    assert y.text_contexts is not None
    found = condition.prepare(y, Tools(HOST))
    assert found.dtype == torch.float32
    assert torch.equal(found, y.text_contexts.to(torch.float32))
