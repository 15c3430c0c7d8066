"""Checkpoints as ranks leave them, without ranks."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config


def write_checkpoint(
    folder: Path, config: Config, model: str, kinds: Mapping[str, Mapping[str, Tensor]], autoencoder_hash: str = ""
) -> None:
    """A checkpoint as a run of two ranks leaves it: every tensor flat, its first element with the second rank."""
    folder.mkdir(parents=True)
    files: dict[str, dict[str, Tensor]] = {"rank-00000.safetensors": {}, "rank-00001.safetensors": {}}
    tensors: dict[str, dict[str, object]] = {}
    for kind, state in kinds.items():
        for name, tensor in state.items():
            flat = tensor.reshape(-1)
            files["rank-00001.safetensors"][f"{model}/{kind}/{name}"] = flat[:1].clone()
            files["rank-00000.safetensors"][f"{model}/{kind}/{name}"] = flat[1:].clone()
            tensors.setdefault(kind, {})[name] = {
                "shape": list(tensor.shape),
                "pieces": [
                    {"file": "rank-00001.safetensors", "offset": 0, "length": 1},
                    {"file": "rank-00000.safetensors", "offset": 1, "length": tensor.numel() - 1},
                ],
            }
    records = {}
    for name, content in files.items():
        save_file(content, folder / name)
        data = (folder / name).read_bytes()
        records[name] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    manifest = {
        "format": "ldm-scale-checkpoint",
        "version": 1,
        "images": 64,
        "world_size": 2,
        "files": records,
        "models": {model: {"optimizer_steps": 8, "zero_stage": 1, "tensors": tensors}},
        "state": {"autoencoder_hash": autoencoder_hash},
        "config": config_to_dict(config),
    }
    manifest["crc32"] = zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
    (folder / "manifest.json").write_text(json.dumps(manifest))
