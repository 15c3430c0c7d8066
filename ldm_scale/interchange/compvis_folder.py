"""Our own folders in the layout of CompVis: read back by our description, and as a stranger reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm_scale.conditioning.frozen_text import FrozenTextEncoder
from ldm_scale.conditioning.text import TextCondition
from ldm_scale.config.schema import FrozenTextConditioningConfig, TextConditioningConfig
from ldm_scale.engine.lazy_tensors import LazyTensors, renamed
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import (
    VOCABULARY,
    Artifact,
    DiffusionArtifact,
    check_autoencoder_content,
    check_diffusion_content,
    expected_autoencoder_tensors,
    expected_diffusion_tensors,
    read_description,
    with_weights,
)
from ldm_scale.interchange.comparison import differences, relative_difference, require_small
from ldm_scale.interchange.compvis import ImportOptions, read_compvis
from ldm_scale.interchange.compvis_file import read_checkpoint
from ldm_scale.interchange.compvis_names import FIRST_STAGE, UNET, Places, autoencoder_places, to_ours
from ldm_scale.interchange.compvis_write import CHECKPOINT, ORIGINALS, diffusion_places
from ldm_scale.interchange.folding import FOLDED, unfold_kept
from ldm_scale.interchange.safetensors_io import passing, tensors_sha256

CAPTIONS = ("", "a red apple on a white plate")


def read_compvis_folder(folder: Path) -> Artifact | DiffusionArtifact:
    """The artifact that a folder of `fill_compvis_folder` was written from.

    Weights that other software has changed since are taken as they are; the content hash follows them.
    Raises: CheckpointError if the folder is incomplete or does not fit its description.
    """
    described, described_model = read_description(folder)
    path = folder / CHECKPOINT
    theirs = read_checkpoint(path)
    target = expected_autoencoder_tensors(described.config)
    if described_model is None:
        first_state: Mapping[str, Tensor] = to_ours(theirs, autoencoder_places(described.config), target, str(path))
        first = Artifact(with_weights(described.content, first_state), first_state)
        check_autoencoder_content(first, folder)
        return first
    prefixed = renamed(theirs, lambda name: name if name.startswith(FIRST_STAGE) else None)
    first_state = to_ours(prefixed, autoencoder_places(described.config, FIRST_STAGE), target, str(path))
    if described.statistics.channel_mean:
        first_state = unfold_kept(first_state, described.statistics, folder / ORIGINALS)
    first = Artifact(with_weights(described.content, first_state), first_state)
    check_autoencoder_content(first, folder)
    vocabulary = folder / VOCABULARY if (folder / VOCABULARY).is_file() else None
    model = replace(described_model, autoencoder=first, vocabulary=vocabulary)
    expected = expected_diffusion_tensors(model.unet, model.conditioning, first.config.latent_channels)
    places = diffusion_places(model)
    state = to_ours(_taken(theirs, places, expected), places, expected, str(path))
    artifact = replace(model, content=model.content | {"weights_sha256": tensors_sha256(state)}, state=state)
    check_diffusion_content(artifact, folder)
    return artifact


def measure_compvis(folder: Path, artifact: Artifact | DiffusionArtifact) -> dict[str, float]:
    """|theirs - ours| / |ours| of every part of a folder of `fill_compvis_folder`, read as a stranger's checkpoint.

    Raises: CheckpointError if one is too large, or a tensor is not what was written.
    """
    options = ImportOptions(num_classes=_num_classes(artifact), weights="raw")
    theirs = read_compvis(folder, options).artifact
    parts = [(theirs, artifact)]
    if isinstance(theirs, DiffusionArtifact) and isinstance(artifact, DiffusionArtifact):
        parts.append((theirs.autoencoder, artifact.autoencoder))
    for back, written in parts:
        folded = set(FOLDED) if isinstance(written, Artifact) and written.statistics.channel_mean else set()
        for name, tensor in passing(written.state, "comparing"):
            if name not in folded and not torch.equal(back.state[name], tensor):
                raise CheckpointError(
                    f"{folder / CHECKPOINT}: {name} is read back with other values than were written, so nothing was "
                    "written; is the disk sound?"
                )
    if isinstance(theirs, DiffusionArtifact) and isinstance(artifact, DiffusionArtifact):
        frozen, text = artifact.conditioning.frozen_text, theirs.conditioning.text
        if frozen is not None and text is not None:
            return _compare_towers(theirs, text, artifact, frozen)
    return differences(theirs, artifact)


def _compare_towers(
    theirs: DiffusionArtifact,
    text: TextConditioningConfig,
    ours: DiffusionArtifact,
    frozen: FrozenTextConditioningConfig,
) -> dict[str, float]:
    """As `differences`, where the text tower that is frozen here is a part of what is read back."""
    condition = TextCondition(text).eval()
    own = condition.state_dict()
    condition.load_state_dict({name: theirs.state[f"conditioner.text.{name}"] for name in own})
    with torch.no_grad():
        found: Tensor = condition(condition.tokens(CAPTIONS), (1, 1))
        context = {"text encoder": relative_difference(found, FrozenTextEncoder(frozen)(CAPTIONS))}
    require_small(context)
    names = set(ours.state)
    unet = renamed(theirs.state, lambda name: name if name in names else None)
    conditioning = {"conditioning": ours.content["conditioning"]}
    return context | differences(replace(theirs, content=theirs.content | conditioning, state=unet), ours)


def _num_classes(artifact: Artifact | DiffusionArtifact) -> int | None:
    """What a stranger has to say of the classes, because no tensor does."""
    if isinstance(artifact, Artifact):
        return None
    sections = (artifact.conditioning.classes, artifact.conditioning.layout)
    return next((section.num_classes for section in sections if section is not None), None)


def _taken(state: Mapping[str, Tensor], places: Places, target: Mapping[str, Tensor]) -> LazyTensors:
    """The tensors of the UNet and the conditioner in an export of ours."""
    wanted = {name for ours in target for name in places[ours].names}
    return renamed(state, lambda name: name if name in wanted or name.startswith(UNET) else None)
