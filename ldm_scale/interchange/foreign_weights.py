"""Weights in folders that other software wrote: safetensors or torch's zip files, whole or in shards, any variant.

    STEM.safetensors | STEM.bin                      one file
    STEM.safetensors.index.json | STEM.bin.index.json     names the shard of each tensor
    STEM.VARIANT.safetensors, STEM.safetensors.index.VARIANT.json     the same in another precision, mostly fp16

Nothing that runs code is ever read: torch's files are opened with `weights_only`. Models here are float32, so other
floating types are widened, which is exact for float16 and bfloat16; it is said when it happens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm_scale.engine.lazy_tensors import LazyTensors, converted, deferred, without_values
from ldm_scale.engine.torch_file import read_torch_file, require_plain_tensors
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.safetensors_io import read_places, read_tensors
from ldm_scale.telemetry.log import get_logger

DIFFUSERS_STEMS = ("diffusion_pytorch_model",)
TRANSFORMERS_STEMS = ("model", "pytorch_model")
_ENDINGS = ("safetensors", "bin")


@dataclass(frozen=True)
class _Source:
    path: Path  # a file with tensors, or an index of such files
    variant: str  # "" of the plain one


def read_foreign_tensors(folder: Path, stems: tuple[str, ...]) -> LazyTensors:
    """All tensors of the model in `folder`, floating ones as float32, on the CPU, each when it is asked for.

    Safetensors go before torch's files, and a file without a variant before one with.
    Raises: CheckpointError if there are none, several variants to choose from, or a file that is damaged, incomplete or
    more than tensors.
    """
    source = _choose(folder, stems)
    state = _read_index(source.path) if source.path.suffix == ".json" else _read_file(source.path)
    held = {x.dtype for x in without_values(state).values() if x.is_floating_point()} - {torch.float32}
    types = sorted(str(dtype).removeprefix("torch.") for dtype in held)
    if types:
        get_logger().info(f"{source.path} holds {' and '.join(types)}: read as float32")
    return converted(state, lambda x: x.float() if x.is_floating_point() else x)


def _choose(folder: Path, stems: tuple[str, ...]) -> _Source:
    found = [source for ending in _ENDINGS for stem in stems for source in _sources(folder, stem, ending)]
    plain = [source for source in found if not source.variant]
    if plain:
        return plain[0]
    variants = list(dict.fromkeys(source.variant for source in found))
    if len(variants) > 1:
        raise CheckpointError(
            f"{folder} holds its weights as the variants {' and '.join(variants)}, none of them the plain one: move "
            "all but one away"
        )
    if not found:
        names = " or ".join(f"{stem}.{ending}" for stem, ending in zip(stems * 2, _ENDINGS, strict=False))
        raise CheckpointError(f"{folder} holds no weights ({names}): the folder is incomplete; download it again")
    get_logger().info(f"{folder} holds its weights as the variant {variants[0]} alone, which is taken")
    return found[0]


def _sources(folder: Path, stem: str, ending: str) -> list[_Source]:
    """Files and indices of that stem and ending, the plain ones first."""
    file = f"{stem}.{ending}"
    plain = [folder / file, folder / f"{file}.index.json"]
    found = [_Source(path, "") for path in plain if path.is_file()]
    for path in sorted(folder.glob(f"{stem}.*.{ending}")):
        variant = path.name[len(stem) + 1 : -len(ending) - 1]
        if "-of-" not in variant:
            found.append(_Source(path, variant))
    for path in sorted(folder.glob(f"{file}.index.*.json")):
        found.append(_Source(path, path.name[len(f"{file}.index.") : -len(".json")]))
    return found


def _read_index(index: Path) -> LazyTensors:
    return read_places(index, _read_file)


def _read_file(path: Path) -> LazyTensors:
    if path.suffix == ".safetensors":
        return read_tensors(path)
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected names and tensors; give a model's file"
        )
    return LazyTensors(deferred(require_plain_tensors({str(name): x for name, x in content.items()}, path)))
