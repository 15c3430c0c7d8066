"""A diffusion model as a folder of small files: an artifact whose weights are in half precision, in several files.

The artifact that is written is the rounded one, so that what others load is what the report's pictures were made
with: its hashes are of the rounded weights in single precision, however its files hold them. The files and their index
are Hugging Face's (`weights.safetensors.index.json`), which other programs read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from ldm_scale.errors import CheckpointError, NumericsError
from ldm_scale.interchange.artifact import (
    AUTOENCODER_FOLDER,
    CONFIG,
    CONTENT_HASH,
    Artifact,
    DiffusionArtifact,
    artifact_format,
    with_weights,
)
from ldm_scale.interchange.output_folder import published_folder
from ldm_scale.interchange.safetensors_io import tensors_sha256, write_json

MAX_FILE_BYTES = 16_000_000  # of any file of the results
SHARD_BYTES = 15_500_000  # of tensors in a file; its header comes on top
PATTERN = "weights{suffix}.safetensors"  # as `ldm_scale.interchange.artifact.WEIGHTS`


def rounded(artifact: DiffusionArtifact) -> DiffusionArtifact:
    """The model with its weights, and its autoencoder's, rounded to float16 and held in float32.

    Raises: NumericsError if a weight is beyond float16.
    """
    state, first = _rounded(artifact.state, "the diffusion model"), artifact.autoencoder
    first_state = _rounded(first.state, "the autoencoder")
    autoencoder = Artifact(with_weights(first.content, first_state), first_state)
    hashes = {"weights_sha256": tensors_sha256(state), "autoencoder_sha256": autoencoder.content_hash}
    # A new object, not `replace`: what it has derived from its content must not be carried over.
    return DiffusionArtifact(artifact.content | hashes, state, autoencoder, artifact.vocabulary)


def write(directory: Path, artifact: DiffusionArtifact) -> None:
    """Writes the artifact, which `rounded` made, as `ldm_scale.load_diffusion` reads it; an older one is replaced.

    Raises: CheckpointError if a tensor alone is too large for a file, or the directory holds something else.
    """
    assert artifact.vocabulary is None, "the demonstration's tokenizer brings its vocabulary along"
    with published_folder(directory, may_replace=artifact_format) as folder:
        _fill(folder, artifact)
        (folder / AUTOENCODER_FOLDER).mkdir()
        _fill(folder / AUTOENCODER_FOLDER, artifact.autoencoder)


def _fill(folder: Path, artifact: Artifact | DiffusionArtifact) -> None:
    halves = {name: x.half() if x.is_floating_point() else x for name, x in artifact.state.items()}
    for name, tensor in halves.items():
        if tensor.nbytes > SHARD_BYTES:
            raise CheckpointError(
                f"{name} has {tensor.nbytes / 1e6:.1f} MB in float16, a file of the results {SHARD_BYTES / 1e6:.1f} MB "
                "at most; take a narrower model"
            )
    save_torch_state_dict(
        halves, folder, filename_pattern=PATTERN, max_shard_size=SHARD_BYTES, metadata={"format": "pt"}
    )
    write_json(folder / CONFIG, artifact.content | {CONTENT_HASH: artifact.content_hash})


def _rounded(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    result = {name: x.half().float() if x.is_floating_point() else x for name, x in state.items()}
    for name, tensor in result.items():
        if not torch.isfinite(tensor).all():
            raise NumericsError(f"{what}: {name} is beyond float16 (65504); its weights cannot be written in halves")
    return result
