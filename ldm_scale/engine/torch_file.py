"""Files of torch.save, read without running anything that they contain.

Such a file is a pickle, of which torch's weights-only reader builds tensors and plain values alone. Trainers wrote more
beside the weights (Lightning the classes of its callbacks); that is read as an empty stand-in here, so that published
files open. Any other class or function is refused by name, with the command that makes a file of plain weights.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_scale.errors import CheckpointError, LdmScaleError

# What trainers wrote beside the weights. Nothing of it is needed, and nothing of it is imported or called.
_BYSTANDERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "numpy.", "omegaconf.")
_CODECS = "_codecs.encode"  # part of numpy's numbers
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # torch's messages are made for terminals
_WANTED = re.compile(r"GLOBAL (\S+)|[Cc]lass (\S+)")


class _StandIn:
    """Takes the place of every class and function of `_BYSTANDERS`, whatever it is called with."""

    def __new__(cls, *args: object) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        """Nothing is kept."""


def read_torch_file(path: Path) -> Any:
    """What the file holds, on the CPU: tensors (pages of the mapped file, where its format allows) and plain values.

    Raises: CheckpointError if the file is absent, damaged, or asks for anything to be run; OSError if it cannot be
    opened.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the folder is incomplete; copy it again")
    try:
        is_zip = zipfile.is_zipfile(path)  # files from before torch 1.6 are none, and cannot be mapped
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) if is_zip else []
        foreign = sorted(name for name in wanted if not name.startswith(_BYSTANDERS) and name != _CODECS)
        if foreign:
            raise _refused(path, ", ".join(foreign[:4]))
        with torch.serialization.safe_globals([(_StandIn, name) for name in wanted]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except LdmScaleError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # not the content: the path
        # A damaged pickle is a program with errors: it fails in whatever its reader does at its word.
        text = _COLOURS.sub("", str(error))
        if isinstance(error, pickle.UnpicklingError) and (found := _WANTED.search(text)):
            raise _refused(path, next(name for name in found.groups() if name)) from error
        raise damaged(path, error) from error


def damaged(path: Path, error: BaseException) -> CheckpointError:
    """The error of a file that a reader failed at."""
    reason = " ".join(_COLOURS.sub("", str(error)).split("\n")[0].split())[:200] or type(error).__name__
    return CheckpointError(f"{path} cannot be read ({reason}): it is damaged or cut short; copy it again")


def require_plain_tensors(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, detached, if each holds its values as the networks here take them.

    Raises: CheckpointError that names the first that is sparse, quantised or without values.
    """
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantised" if tensor.is_quantized else "without values" if tensor.is_meta else str(tensor.layout)
            raise CheckpointError(f"{path}: {name} is {kind}, expected plain values; save the model's own weights")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _refused(path: Path, wanted: str) -> CheckpointError:
    """The error of a file that asks for more than tensors, with how to make one that does not."""
    return CheckpointError(
        f"{path} is a pickle of more than tensors (it asks for {wanted} to be run) and is refused; if you trust its "
        'maker, make a plain one on a machine that has nothing to lose: python -c "import torch; from '
        f"safetensors.torch import save_file; c = torch.load('{path.name}', map_location='cpu', weights_only=False); "
        "save_file({n: x.detach().clone().contiguous() for n, x in c.get('state_dict', c).items() if "
        f"torch.is_tensor(x)}}, '{path.with_suffix('.safetensors').name}')\""
    )
