"""All that a run remembers besides its tensors, in one place.

It is small because randomness and data order are functions of the seed and of `cur_images` (engine/seeding.py,
data/order.py), and learning rates of `cur_images` (training/optimizer.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainingState:
    """Progress of a run."""

    cur_images: int = 0  # images seen by all ranks
    step: int = 0  # optimizer steps
    bad_samples: int = 0  # undecodable samples replaced so far, over all ranks
    training_s: float = 0.0  # seconds spent in training steps
    data_digest: str = ""  # of the training split's shards: what the position counts in
    autoencoder_hash: str = ""  # stage 2: content hash of the artifact that defines its latents

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingState:
        """The state that `to_dict` wrote."""
        return cls(**values)
