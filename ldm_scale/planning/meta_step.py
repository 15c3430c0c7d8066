"""A micro-batch of training as something to run on the meta device: what it trains, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import nn

# In the order of a micro-batch. Stage 1 alone has "losses", from pixels to the gradient at the decoder's output, and
# "discriminator", that network's own forward and backward pass.
Phase = Literal["forward", "losses", "backward", "discriminator"]


class MetaStep(NamedTuple):
    """A network, and forward and backward pass of a micro-batch through it.

    `run` begins in phase "forward" and tells its argument of every other phase that begins. It may run again.
    """

    network: nn.Module
    run: Callable[[Callable[[Phase], None]], None]
