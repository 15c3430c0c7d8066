"""Strangers' checkpoints: what is taken, left out, refused, and that nothing in them is ever run."""

from __future__ import annotations

import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm_scale.config.schema import ConditioningConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.compvis import ImportOptions, read_compvis
from ldm_scale.interchange.compvis_write import fill_compvis_folder
from tests.helpers.compvis import (
    SELF,
    VQ,
    changed,
    first_stage,
    reconfigured,
    second_stage,
    strangers_folder,
    theirs,
)

NONE = ImportOptions()


@pytest.fixture(scope="module")
def model() -> DiffusionArtifact:
    return second_stage(SELF, ConditioningConfig())


@pytest.fixture
def folder(tmp_path: Path, model: DiffusionArtifact) -> Path:
    return strangers_folder(tmp_path, model)


def flat(name: str) -> str:
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def test_averages_are_taken_where_they_are(folder: Path, model: DiffusionArtifact) -> None:
    state = theirs(folder / "model.ckpt")
    unet = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    averages: dict[str, Tensor | None] = {flat(name): tensor + 1 for name, tensor in unet.items()}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    averages |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    path = changed(folder, averages)
    name = "unet.conv_in.weight"
    for weights, shift in (("raw", 0), ("ema", 1), (None, 1)):
        imported = read_compvis(path, ImportOptions(weights=weights))
        assert imported.artifact.provenance["weights"] == (weights or "ema")
        assert torch.equal(imported.artifact.state[name], model.state[name] + shift)
        assert imported.left_out["averages of the weights (model_ema)"] == len(averages)
    changed(folder, {flat("model.diffusion_model.out.2.bias"): None})
    with pytest.raises(CheckpointError, match=r"lacks 1 of \d+ averages \(model_ema\.diffusion_modelout2bias\)"):
        read_compvis(path, NONE)
    read_compvis(path, ImportOptions(weights="raw"))


def test_averages_that_are_not_there(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks \d+ of \d+ averages .* give --weights raw"):
        read_compvis(folder, ImportOptions(weights="ema"))


def test_an_autoencoder_with_averages_and_a_discriminator(tmp_path: Path) -> None:
    ours = first_stage(VQ)
    fill_compvis_folder(tmp_path, ours)
    state = theirs(tmp_path / "model.ckpt")
    averages: dict[str, Tensor | None] = {f"model_ema.{n.replace('.', '')}": 2 * t for n, t in state.items()}
    losses = {"loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(3)}
    path = changed(tmp_path, averages | losses)
    imported = read_compvis(path, NONE)
    assert isinstance(imported.artifact, Artifact)
    assert torch.equal(imported.artifact.state["quantizer.codebook"], 2 * ours.state["quantizer.codebook"])
    assert imported.left_out == {
        "averages of the weights (model_ema)": len(averages),
        "discriminator and losses": 2,
    }
    assert imported.artifact.provenance["imported"]["left_out"] == imported.left_out


def test_halves_and_safetensors(folder: Path, model: DiffusionArtifact) -> None:
    state = {name: tensor.half() for name, tensor in theirs(folder / "model.ckpt").items()}
    save_file(state, folder / "half.safetensors")
    read = read_compvis(folder / "half.safetensors", NONE).artifact
    assert {tensor.dtype for tensor in read.state.values()} == {torch.float32}
    assert torch.equal(read.state["unet.conv_in.weight"], model.state["unet.conv_in.weight"].half().float())


def test_a_measured_scale_stands_above_the_yaml(folder: Path) -> None:
    path = changed(folder, {"scale_factor": torch.tensor(0.25)})
    for options, expected in ((NONE, 0.25), (ImportOptions(scale_factor=2.0), 2.0)):
        artifact = read_compvis(path, options).artifact
        assert isinstance(artifact, DiffusionArtifact)
        assert artifact.autoencoder.statistics.scale == expected
    changed(folder, {"scale_factor": None})
    reconfigured(folder, "scale_by_std", True)
    with pytest.raises(CheckpointError, match="lacks scale_factor, which scale_by_std=true has measured"):
        read_compvis(path, NONE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale_factor", torch.tensor(-1.0), r"model\.ckpt: the tensor scale_factor is -1: must be one finite number"),
        ("scale_factor", torch.tensor(0.0), r"the tensor scale_factor is 0: .* give the scale with --scale-factor"),
        ("scale_factor", torch.tensor(float("nan")), r"model\.ckpt: the tensor scale_factor is nan"),
        ("scale_factor", torch.ones(3), r"the tensor scale_factor is of shape \(3,\)"),
        ("alphas_cumprod", torch.tensor(0.5), r"another noise schedule .*\(alphas_cumprod is no row"),
        ("alphas_cumprod", torch.empty(0), r"another noise schedule .*\(alphas_cumprod is no row"),
    ],
)
def test_numbers_beside_the_weights_are_looked_at(folder: Path, name: str, value: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_compvis(changed(folder, {name: value}), NONE)


UNET_WEIGHT = "model.diffusion_model.input_blocks.2.0.op.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (UNET_WEIGHT, None, rf"1 missing \({UNET_WEIGHT}\)"),
        (
            "model.diffusion_model.label_emb.weight",
            torch.zeros(3),
            r"1 not expected \(model\.diffusion_model\.label_emb",
        ),
        ("control_model.x", torch.zeros(3), r"1 not expected \(control_model\.x\)"),
        (
            "model.diffusion_model.time_embed.0.weight",
            torch.zeros(32, 128),
            r"1 of another shape \(model\.diffusion_model\.time_embed\.0\.weight \(32, 128\) instead of \(128, 32\)\)",
        ),
        ("first_stage_model.quant_conv.bias", torch.zeros(7), r"the first stage in .* 1 of another shape"),
        (UNET_WEIGHT, torch.zeros(32, 32, 3, 3, dtype=torch.int64), r"is of type torch\.int64, expected floating"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, name: str, change: Tensor | None, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_compvis(changed(folder, {name: change}), NONE)


def test_lightnings_callbacks_are_passed_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sd-v1-4.ckpt has them: a class as a key, and an instance."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    instance = callback()
    instance.monitor = "val/loss"
    path = changed(folder, {}, callbacks={callback: {"best_model_score": torch.tensor(1.0)}}, last=[instance])
    monkeypatch.undo()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert "unet.conv_in.weight" in read_compvis(path, NONE).artifact.state
    assert name not in sys.modules


class _Canary:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (subprocess.call, (["touch", str(self._path)],))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_wants_to_run_something_is_refused(folder: Path, is_zip: bool) -> None:
    state = theirs(folder / "model.ckpt")
    content = {"state_dict": state, "callbacks": _Canary(folder / "canary")}
    torch.save(content, folder / "model.ckpt", _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"call.*make a plain one .* torch\.load\('model\.ckpt', .*weights_only"):
        read_compvis(folder, NONE)
    assert not (folder / "canary").exists()


def test_the_older_format_is_read(folder: Path, model: DiffusionArtifact) -> None:
    content = {"state_dict": theirs(folder / "model.ckpt")}
    torch.save(content, folder / "model.ckpt", _use_new_zipfile_serialization=False)
    read = read_compvis(folder, NONE).artifact
    assert torch.equal(read.state["unet.conv_in.weight"], model.state["unet.conv_in.weight"])


def test_files_that_cannot_be_read(folder: Path) -> None:
    path = folder / "model.ckpt"
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"not a checkpoint at all"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.ckpt cannot be read"):
            read_compvis(path, NONE)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        read_compvis(path, NONE)
    (folder / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(CheckpointError, match=r"cut\.safetensors cannot be read"):
        read_compvis(folder / "cut.safetensors", NONE)
    with pytest.raises(CheckpointError, match=r"nothing\.ckpt is no file: give a checkpoint"):
        read_compvis(folder / "nothing.ckpt", NONE)
    with pytest.raises(CheckpointError, match=r"config\.yaml: the name does not say which format"):
        read_compvis(folder / "config.yaml", NONE)
    path.rename(folder / "one.ckpt")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints \(cut\.safetensors, one\.ckpt\): give the file"):
        read_compvis(folder, NONE)
