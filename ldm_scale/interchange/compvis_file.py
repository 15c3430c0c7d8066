"""Tensors and YAML of other people's checkpoints, read without running anything that they contain."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldm_scale.engine.lazy_tensors import LazyTensors, deferred
from ldm_scale.engine.torch_file import read_torch_file, require_plain_tensors
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.safetensors_io import read_tensors

ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


def read_checkpoint(path: Path) -> LazyTensors:
    """All tensors of a checkpoint (of its `state_dict`, where it has one), on the CPU, mapped where the format allows.

    Raises: CheckpointError if the file is absent, damaged, no checkpoint, or asks for code to run.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: give a checkpoint ({', '.join(ENDINGS)})")
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path}: the name does not say which format it has; it must end in {', '.join(ENDINGS)}")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    content = read_torch_file(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no tensors by name, neither at its top nor under state_dict: give weights")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    return LazyTensors(deferred(require_plain_tensors(tensors, path)))


def read_yaml(path: Path) -> dict[str, Any]:
    """`model` of a configuration of theirs.

    Raises: CheckpointError if the file is absent, no YAML of plain values, or says nothing of a model.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: give the YAML that belongs to the checkpoint")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is no YAML of plain values ({reason}); give theirs as it was published"
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("params"), dict):
        raise CheckpointError(f"{path} has no model.params: give the YAML that the model was trained or published with")
    return model


def yaml_beside(path: Path) -> Path | None:
    """The YAML of a checkpoint where programs look for it: of its own name, or config.yaml beside it."""
    candidates = (path.with_suffix(".yaml"), path.with_name("config.yaml"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)
