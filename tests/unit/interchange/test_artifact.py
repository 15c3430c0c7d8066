"""Artifacts come back as they were written, and notice when they are not what was written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_scale.config.schema import AutoencoderConfig
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange.artifact import (
    Artifact,
    DiffusionArtifact,
    artifact_format,
    make_artifact,
    read_artifact,
    read_diffusion_artifact,
    write_artifact,
    write_diffusion_artifact,
)
from ldm_scale.interchange.output_folder import published_folder
from ldm_scale.interchange.safetensors_io import (
    json_sha256,
    read_tensors,
    tensors_sha256,
    write_tensors,
)
from ldm_scale.models.autoencoder import OUTPUT_LOGVAR, LatentStatistics
from ldm_scale.models.half_precision import HalfPrecisionProbe
from tests.helpers.disks import full_disk


def write(directory: Path, artifact: Artifact) -> str:
    return write_artifact(
        directory, artifact.state, artifact.config, artifact.statistics, provenance=artifact.provenance
    )


def edit_config(directory: Path, change: Callable[[dict[str, Any]], None], rehash: bool = False) -> None:
    path = directory / "config.json"
    content = json.loads(path.read_text())
    written_hash = content.pop("content_sha256")
    change(content)
    path.write_text(json.dumps(content | {"content_sha256": json_sha256(content) if rehash else written_hash}))


def test_autoencoder_artifact_round_trip(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    content_hash = write(tmp_path / "artifact", autoencoder_artifact)
    found = read_artifact(tmp_path / "artifact")
    assert found.content_hash == content_hash == autoencoder_artifact.content_hash
    assert found.config == autoencoder_artifact.config
    assert found.statistics == autoencoder_artifact.statistics
    assert found.provenance["resolution"] == 16
    assert found.state.keys() == autoencoder_artifact.state.keys()
    assert all(torch.equal(found.state[name], tensor) for name, tensor in autoencoder_artifact.state.items())
    assert artifact_format(tmp_path / "artifact") == "ldm-scale-autoencoder"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact"]


def test_diffusion_artifact_round_trip(tmp_path: Path, diffusion_artifact: DiffusionArtifact) -> None:
    content_hash = write_diffusion_artifact(tmp_path / "model", diffusion_artifact)
    found = read_diffusion_artifact(tmp_path / "model")
    assert found.content_hash == content_hash
    assert (found.unet, found.conditioning) == (diffusion_artifact.unet, diffusion_artifact.conditioning)
    assert (found.diffusion, found.sampling) == (diffusion_artifact.diffusion, diffusion_artifact.sampling)
    assert found.autoencoder.content_hash == diffusion_artifact.autoencoder.content_hash
    assert all(torch.equal(found.state[name], tensor) for name, tensor in diffusion_artifact.state.items())


def test_changed_statistics_are_noticed(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    write(tmp_path, autoencoder_artifact)
    edit_config(tmp_path, lambda content: content["latent_statistics"].update(scale=0.8))
    with pytest.raises(CheckpointError, match=r"config\.json was changed after it was written"):
        read_artifact(tmp_path)


def test_one_changed_weight_is_noticed(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    write(tmp_path, autoencoder_artifact)
    state = load_file(tmp_path / "weights.safetensors")
    state["encoder.conv_in.bias"][0] += 1e-3
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is not what was written"):
        read_artifact(tmp_path)


def test_weights_of_another_artifact_are_noticed(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    write(tmp_path / "a", autoencoder_artifact)
    other = {name: tensor + 1.0 for name, tensor in autoencoder_artifact.state.items()}
    write_artifact(
        tmp_path / "b", other, autoencoder_artifact.config, autoencoder_artifact.statistics, {"resolution": 16}
    )
    shutil.copy(tmp_path / "b" / "weights.safetensors", tmp_path / "a" / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"a/weights\.safetensors is not what was written with config\.json"):
        read_artifact(tmp_path / "a")


def test_a_changed_architecture_is_noticed(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    write(tmp_path, autoencoder_artifact)
    edit_config(tmp_path, lambda content: content["autoencoder"].update(norm_groups=2))
    with pytest.raises(CheckpointError, match=r"config\.json was changed after it was written"):
        read_artifact(tmp_path)


def test_weights_that_are_cut_short_are_named(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    write(tmp_path, autoencoder_artifact)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors cannot be read .*cut short"):
        read_artifact(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_missing_files_are_named(tmp_path: Path, autoencoder_artifact: Artifact, name: str) -> None:
    write(tmp_path, autoencoder_artifact)
    (tmp_path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        read_artifact(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), r"version \('ldm-scale-autoencoder', 2\)"),
        (lambda c: c.update(half_precision={"fp16_safe": 1}), r"half_precision\.fp16_safe=1"),
        (lambda c: c.update(format="other"), r"format and version \('other', 1\)"),
        (lambda c: c.update(pixel_range=[0.0, 1.0]), r"pixel_range is \[0.0, 1.0\]"),
        (lambda c: c["autoencoder"].update(colour="red"), "colour"),
        (lambda c: c.pop("autoencoder"), "'autoencoder'"),
        (
            lambda c: c["latent_statistics"].update(scale=-1.0),
            r"latent_statistics\.scale=-1\.0: must be a finite",
        ),
        (lambda c: c["latent_statistics"].update(scale=0.0), r"latent_statistics\.scale=0\.0: must be a finite"),
        (lambda c: c["latent_statistics"].update(shift=float("nan")), r"latent_statistics\.shift=nan: must be finite"),
        (lambda c: c["latent_statistics"].update(channel_std=[1.0]), r"0 values of channel_mean and 1 of channel_std"),
        (
            lambda c: c["latent_statistics"].update(channel_mean=[0.0] * 3, channel_std=[1.0, 1.0, -1.0]),
            r"channel_std=\[1\.0, 1\.0, -1\.0\]",
        ),
        (lambda c: c["autoencoder"].update(base_channels=0), r"autoencoder\.base_channels=0: must be at least 1"),
        (lambda c: c.update(provenance={}), r"provenance\.resolution is missing"),
        (lambda c: c.update(provenance={"resolution": -16}), r"provenance\.resolution=-16: must be a whole number"),
        (
            lambda c: c["autoencoder"].update(latent_channels=5),
            r"encoder\.conv_out\.bias \(6,\) instead of \(10,\)",
        ),
    ],
)
def test_unusable_configurations_are_named(
    tmp_path: Path, autoencoder_artifact: Artifact, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    write(tmp_path, autoencoder_artifact)
    edit_config(tmp_path, change, rehash=True)
    with pytest.raises(CheckpointError, match=message):
        read_artifact(tmp_path)


def test_tensors_of_another_model_are_refused_and_nothing_is_left(
    tmp_path: Path, autoencoder_artifact: Artifact
) -> None:
    state = dict(autoencoder_artifact.state)
    del state["quant_conv.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing \(quant_conv\.bias\)"):
        write_artifact(
            tmp_path / "a", state, autoencoder_artifact.config, autoencoder_artifact.statistics, {"resolution": 16}
        )
    assert not list(tmp_path.iterdir())


def test_what_only_training_needs_is_left_out(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    a = autoencoder_artifact
    state = dict(a.state) | {OUTPUT_LOGVAR: torch.zeros(1)}
    assert write_artifact(tmp_path, state, a.config, a.statistics, a.provenance) == a.content_hash
    assert read_artifact(tmp_path).state.keys() == a.state.keys()


def test_the_float16_probe_is_kept_and_hashed(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    a = autoencoder_artifact
    probe = HalfPrecisionProbe(True, 812.5, "decoder.conv_in", 512, fp16_difference=0.001)
    digest = write_artifact(tmp_path, a.state, a.config, a.statistics, a.provenance, half_precision=probe)
    assert read_artifact(tmp_path).half_precision == probe
    assert a.half_precision is None
    assert digest != a.content_hash
    edit_config(tmp_path, lambda content: content["half_precision"].update(fp16_safe=False))
    with pytest.raises(CheckpointError, match=r"config\.json was changed after it was written"):
        read_artifact(tmp_path)


def test_pixel_space_is_an_artifact_without_tensors(tmp_path: Path) -> None:
    config = AutoencoderConfig(kind="identity", channel_multipliers=(1,), latent_channels=3)
    artifact = make_artifact({}, config, LatentStatistics(), {"resolution": 16})
    assert write(tmp_path, artifact) == artifact.content_hash
    found = read_artifact(tmp_path)
    assert (found.config, found.state, found.content_hash) == (config, {}, artifact.content_hash)


def test_statistics_of_each_channel_come_back(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    statistics = LatentStatistics(num_images=9, channel_mean=(0.1, -0.2, 0.3), channel_std=(1.0, 2.0, 0.5))
    artifact = make_artifact(autoencoder_artifact.state, autoencoder_artifact.config, statistics, {"resolution": 16})
    write(tmp_path, artifact)
    assert read_artifact(tmp_path).statistics == statistics


def test_another_autoencoder_beside_a_diffusion_model_is_refused(
    tmp_path: Path, diffusion_artifact: DiffusionArtifact
) -> None:
    write_diffusion_artifact(tmp_path, diffusion_artifact)
    edit_config(tmp_path / "autoencoder", lambda c: c["latent_statistics"].update(scale=0.5), rehash=True)
    with pytest.raises(CheckpointError, match="was trained on the autoencoder"):
        read_diffusion_artifact(tmp_path)


def test_an_older_artifact_is_replaced_and_other_folders_are_not(
    tmp_path: Path, autoencoder_artifact: Artifact
) -> None:
    write(tmp_path / "artifact", autoencoder_artifact)
    (tmp_path / "artifact" / "stale").touch()
    write(tmp_path / "artifact", autoencoder_artifact)
    assert sorted(p.name for p in (tmp_path / "artifact").iterdir()) == ["config.json", "weights.safetensors"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(CheckpointError, match="photos holds files that this command did not write"):
        write(tmp_path / "photos", autoencoder_artifact)
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file"):
        write(tmp_path / "file", autoencoder_artifact)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "file", "photos"]


def test_a_failure_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with published_folder(target, may_replace=bool) as folder:
        (folder / "old").touch()

    def fail() -> None:
        with published_folder(target, may_replace=bool) as folder:
            (folder / "new").touch()
            raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["target", "target/old"]


def test_a_failure_between_the_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    with published_folder(target, may_replace=bool) as folder:
        (folder / "old").touch()
    rename = Path.rename

    def rename_but_not_new(self: Path, destination: Path) -> Path:
        if self.name == "new":
            raise OSError("no more inodes")
        return rename(self, destination)

    monkeypatch.setattr(Path, "rename", rename_but_not_new)
    with pytest.raises(OSError, match="inodes"), published_folder(target, may_replace=bool):
        pass
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["target", "target/old"]


def test_content_hash_depends_on_names_shapes_types_and_values_only() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(1.0)
    reference = tensors_sha256({"a": a, "b": b})
    assert tensors_sha256({"b": b, "a": a.t().contiguous().t()}) == reference
    others = [
        {"a": a, "c": b},
        {"a": a.reshape(3, 2), "b": b},
        {"a": a.double(), "b": b},
        {"a": a.bfloat16(), "b": b},
        {"a": a + 1e-6, "b": b},
    ]
    hashes = {tensors_sha256(other) for other in others}
    assert len(hashes | {reference}) == len(others) + 1


def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be read"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "put",
    [
        lambda folder: write_tensors(folder / "weights", {"w": torch.ones(9)}),
        lambda folder: (folder / "config").write_text("{}"),
    ],
)
def test_a_full_disk_is_told_with_the_folder(tmp_path: Path, put: Callable[[Path], object]) -> None:
    model = tmp_path / "model"
    refused = pytest.raises((CheckpointError, OSError), match=re.escape(str(model)))
    with refused, full_disk(), published_folder(model, may_replace=bool) as folder:
        put(folder)
    assert list(tmp_path.iterdir()) == []
