"""All that a run remembers besides its tensors, in one place.

It is small because randomness and data order are functions of the seed and of `cur_images` (engine/seeding.py,
data/order.py), and learning rates of `cur_images` (training/optimizer.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ldm_scale.data.policy import LossAccount
from ldm_scale.engine.spikes import SpikeHistory
from ldm_scale.errors import CheckpointError

# Fields that earlier versions did not write, whose runs had the default.
_ADDED = {"init", "best", "judged_by", "judged_images", "measured_images"}


@dataclass
class TrainingState:
    """Progress of a run."""

    cur_images: int = 0  # images seen by all ranks
    step: int = 0  # optimizer steps
    evaluated_images: int = 0  # at which validation and pictures, where they fall due, were last made
    measured_images: int = 0  # at which an evaluation, where it falls due, was last made, or could not be
    losses: LossAccount = field(default_factory=LossAccount)  # samples that could not be used, over all ranks
    truncated: int = 0  # captions and layouts that were cut so far, over all ranks
    skipped: int = 0  # steps that were not made, whose images count as seen
    skipped_in_a_row: int = 0
    passed_over: list[list[int]] = field(default_factory=list)  # images [from, to) that a rollback left out
    spikes: SpikeHistory = field(default_factory=SpikeHistory)
    best: list[tuple[int, float]] = field(default_factory=list)  # images and figure of each that was the best so far
    judged_by: dict[str, Any] = field(default_factory=dict)  # what the best are the best by
    judged_images: int = 0  # at the last figure that was looked at for it
    training_s: float = 0.0  # seconds spent in training steps
    data_digest: str = ""  # of the training split's shards: what the position counts in
    autoencoder_hash: str = ""  # stage 2: content hash of the artifact that defines its latents
    labels: dict[str, list[str]] = field(default_factory=dict)  # names of classes, objects' classes and map labels
    init: dict[str, Any] = field(default_factory=dict)  # where the first weights come from; {} = they were random

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingState:
        """The state that `to_dict` wrote.

        Raises: CheckpointError if it was written by another version, with other fields.
        """
        known = {known_field.name for known_field in fields(cls)}
        if values.keys() | _ADDED != known:
            raise CheckpointError(
                f"the checkpoint's training state has {', '.join(sorted(values)) or 'nothing'}; this version reads "
                f"{', '.join(sorted(known))}: continue with the version that wrote it"
            )
        sections = {"losses": LossAccount(**values["losses"]), "spikes": SpikeHistory(**values["spikes"])}
        best = [(int(images), float(value)) for images, value in values.get("best", ())]
        return cls(**values | sections | {"best": best})
