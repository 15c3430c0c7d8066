"""Tensors and YAML of other people's checkpoints, read without running anything that they contain.

safetensors hold nothing but tensors. A .ckpt is a pickle, of which torch's weights-only reader builds tensors and plain
values alone. Lightning wrote the classes of its callbacks beside the weights; they are read as an empty stand-in here,
so that published files open. Any other class or function is refused by name, with the command that makes a plain file.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ldm_scale.engine.lazy_tensors import LazyTensors, deferred
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.safetensors_io import read_tensors

ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# What trainers wrote beside the weights. Nothing of it is needed, and nothing of it is imported or called.
_BYSTANDERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "numpy.", "omegaconf.")
_CODECS = "_codecs.encode"  # part of numpy's numbers


class _StandIn:
    """Takes the place of every class and function of `_BYSTANDERS`, whatever it is called with."""

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Nothing is kept."""


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
    content = _unpickled(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} holds no tensors by name, neither at its top nor under state_dict: give weights")
    return LazyTensors(deferred({str(n): value.detach() for n, value in state.items() if isinstance(value, Tensor)}))


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


def _unpickled(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    wanted: list[str] = []
    try:
        if is_zip:
            wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        foreign = sorted(name for name in wanted if not name.startswith(_BYSTANDERS) and name != _CODECS)
        if foreign:
            raise CheckpointError(
                f"{path} asks for {', '.join(foreign[:4])} to be run, which is refused; {_plain(path)}"
            )
        with torch.serialization.safe_globals([(_StandIn, name) for name in wanted]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        lines = str(error).split("\n")
        reason = next((line.strip() for line in lines if "GLOBAL" in line), lines[0])
        raise CheckpointError(f"{path} cannot be read as plain weights ({reason}); {_plain(path)}") from error
    except (RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} cannot be read ({reason}): it is damaged or cut short; copy it again") from error


def _plain(path: Path) -> str:
    """How to make a file that opens without running anything."""
    return (
        'if you trust its maker, make a plain one on a machine that has nothing to lose: python -c "import torch; '
        f"c = torch.load('{path.name}', map_location='cpu', weights_only=False); torch.save({{'state_dict': "
        "c.get('state_dict', c)}, 'plain.ckpt')\""
    )
