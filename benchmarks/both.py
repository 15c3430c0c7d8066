"""The same weights in a network of ours and one of diffusers, for comparisons of speed and of outputs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ldm_scale.interchange.name_maps import NameMap, translate
from ldm_scale.interchange.verify import filled


def give_both(ours: nn.Module, theirs: Any, names: NameMap) -> None:
    """Nothing; both hold the weights of ours, with fixed random values where a tensor is zero throughout."""
    state = filled(ours.state_dict())
    theirs.load_state_dict(dict(translate(state, names, theirs.state_dict(), "the network")))
    ours.load_state_dict(dict(state))
