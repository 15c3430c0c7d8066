"""Our models in the layout of CompVis: there and back, byte for byte, and what their code cannot hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ConditioningConfig,
    DiffusionConfig,
    InpaintingConditioningConfig,
    UNetConfig,
)
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange import comparison, compvis_folder
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact
from ldm_scale.interchange.compvis import ImportOptions, read_compvis
from ldm_scale.interchange.compvis_names import autoencoder_places, to_theirs, unet_places
from ldm_scale.interchange.folding import unfold
from ldm_scale.interchange.load import read_source
from ldm_scale.interchange.publish import publish
from ldm_scale.models.attention import ImageSelfAttention
from ldm_scale.models.autoencoder import LatentStatistics
from tests.helpers.compvis import AUTOENCODER, IDENTITY, KINDS, SELF, UNET, VQ, first_stage, second_stage, theirs
from tests.helpers.disks import full_disk
from tests.helpers.weights import random_state

NUM_CLASSES = {"classes": 7, "layout": 5}
PER_CHANNEL = LatentStatistics(channel_mean=(3.0, -0.7, 0.01, 0.0), channel_std=(9.0, 0.05, 1.3, 1.0), num_images=8)


def same_tensors(first: Artifact | DiffusionArtifact, second: Artifact | DiffusionArtifact) -> None:
    assert first.state.keys() == second.state.keys()
    assert [name for name, tensor in first.state.items() if not torch.equal(tensor, second.state[name])] == []


@pytest.mark.parametrize("name", KINDS)
def test_diffusion_models_there_and_back(tmp_path: Path, name: str) -> None:
    unet, conditioning = KINDS[name]
    ours = second_stage(unet, conditioning, diffusion=DiffusionConfig(prediction="v", beta_end=0.0195, loss="l1"))
    published = publish(ours, "compvis", tmp_path / "theirs")
    assert max(published.differences.values()) == 0.0
    assert read_source(tmp_path / "theirs").content_hash == ours.content_hash
    # As a stranger reads them: by the YAML alone.
    (tmp_path / "theirs" / "ldm_scale.json").unlink()
    back = read_compvis(tmp_path / "theirs", ImportOptions(num_classes=NUM_CLASSES.get(name))).artifact
    assert isinstance(back, DiffusionArtifact)
    same_tensors(back, ours)
    same_tensors(back.autoencoder, ours.autoencoder)
    assert back.autoencoder.statistics == LatentStatistics(scale=0.3)
    assert back.provenance["resolution"] == ours.provenance["resolution"]
    assert (back.diffusion.prediction, back.diffusion.beta_end, back.diffusion.loss) == ("v", 0.0195, "l1")
    shapes = {"linear_projection": True}  # only the shape in which an export writes them
    assert dataclasses.replace(back.unet, **shapes) == dataclasses.replace(ours.unet, **shapes)
    publish(back, "safetensors", tmp_path / "again", compute=True)
    assert read_source(tmp_path / "again").content_hash == back.content_hash


@pytest.mark.parametrize("config", [AUTOENCODER, VQ, dataclasses.replace(VQ, mid_attention=False, attention_levels=())])
def test_autoencoders_there_and_back(tmp_path: Path, config: AutoencoderConfig) -> None:
    ours = first_stage(config)
    publish(ours, "compvis", tmp_path / "theirs")
    assert read_source(tmp_path / "theirs").content_hash == ours.content_hash
    back = read_compvis(tmp_path / "theirs", ImportOptions(scale_factor=0.3)).artifact
    assert isinstance(back, Artifact)
    same_tensors(back, ours)
    assert (back.config, back.statistics.scale) == (ours.config, 0.3)


@pytest.mark.parametrize("first", [VQ, IDENTITY])
def test_other_first_stages(tmp_path: Path, first: AutoencoderConfig) -> None:
    ours = second_stage(SELF, ConditioningConfig(), first_stage(first, LatentStatistics()))
    publish(ours, "compvis", tmp_path / "theirs")
    back = read_compvis(tmp_path / "theirs", ImportOptions()).artifact
    assert isinstance(back, DiffusionArtifact)
    same_tensors(back, ours)
    assert back.autoencoder.config == first


def test_statistics_per_channel_are_folded(tmp_path: Path) -> None:
    ours = second_stage(SELF, ConditioningConfig(), first_stage(statistics=PER_CHANNEL))
    published = publish(ours, "compvis", tmp_path / "theirs")
    assert 0 < max(published.differences.values()) < 1e-4
    assert read_source(tmp_path / "theirs").content_hash == ours.content_hash
    back = read_compvis(tmp_path / "theirs", ImportOptions()).artifact
    assert isinstance(back, DiffusionArtifact)
    assert back.autoencoder.statistics == LatentStatistics()
    unfolded = unfold(back.autoencoder.state, PER_CHANNEL)
    for name, tensor in ours.autoencoder.state.items():
        assert (unfolded[name] - tensor).norm() <= 1e-6 * tensor.norm(), name
    model = yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())["model"]
    assert model["params"]["scale_factor"] == 1.0


def test_an_export_is_replaced_and_read_after_others_changed_it(tmp_path: Path) -> None:
    ours = first_stage()
    publish(ours, "compvis", tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.ckpt"
    state = theirs(path)
    state["quant_conv.bias"] += 1
    torch.save({"state_dict": state}, path)
    back = read_source(tmp_path / "theirs")
    assert torch.equal(back.state["quant_conv.bias"], ours.state["quant_conv.bias"] + 1)
    assert back.content_hash != ours.content_hash
    publish(ours, "compvis", tmp_path / "theirs")
    assert read_source(tmp_path / "theirs").content_hash == ours.content_hash


def test_single_attention_layers_order_rows_by_heads() -> None:
    """Against the layer as it is defined there: rows of all heads, each q, k and v (arXiv:2105.05233, its code)."""
    layer = ImageSelfAttention(64, 32, num_heads=4, eps=1e-5)
    state = random_state(layer)
    layer.load_state_dict(state)
    config = dataclasses.replace(SELF, base_channels=64, channel_multipliers=(1,), attention_levels=())
    named = {f"unet.middle.attention.{name}": tensor for name, tensor in state.items()}
    w = {
        name.removeprefix("model.diffusion_model.middle_block.1."): tensor
        for name, tensor in to_theirs(named, unet_places(config)).items()
    }
    x = torch.randn(2, 64, 3, 5)
    tokens = torch.nn.functional.group_norm(x, 32, w["norm.weight"], w["norm.bias"], 1e-5).flatten(2)
    qkv = torch.nn.functional.conv1d(tokens, w["qkv.weight"], w["qkv.bias"])
    q, k, v = qkv.reshape(2 * 4, 3 * 16, 15).split(16, dim=1)
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / 4, dim=-1)
    attended = torch.einsum("bts,bcs->bct", weights, v).reshape(2, 64, 15)
    expected = x + torch.nn.functional.conv1d(attended, w["proj_out.weight"], w["proj_out.bias"]).view_as(x)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-5)


def swapped(places: Any, name: str) -> tuple[str, ...]:
    names: tuple[str, ...] = places[name].names
    return names


def test_names_of_levels() -> None:
    places = autoencoder_places(AUTOENCODER, "first_stage_model.")
    assert swapped(places, "decoder.upsamples.0.conv.weight") == (
        "first_stage_model.decoder.up.1.upsample.conv.weight",
    )
    assert swapped(places, "encoder.downsamples.0.conv.weight") == (
        "first_stage_model.encoder.down.0.downsample.conv.weight",
    )


TEXTLESS = KINDS["classes"][1]


@pytest.mark.parametrize(
    ("unet", "first", "diffusion", "message"),
    [
        ({"norm_groups": 16}, {}, {}, r"unet\.norm_groups=16: every norm .* 32 groups; export with --to safetensors"),
        ({"channel_multipliers": (2, 2)}, {}, {}, r"unet\.channel_multipliers\[0\]=2"),
        ({}, {"norm_groups": 8}, {}, r"autoencoder\.norm_groups=8"),
        (
            {},
            {"mid_attention": False, "attention_levels": (1,)},
            {},
            r"mid_attention=false with attention_levels=\[1\]",
        ),
        ({}, {}, {"prediction": "flow"}, r"diffusion\.prediction=flow: their code predicts eps, x0 or v"),
        ({}, {}, {"prediction": "edm"}, r"diffusion\.prediction=edm"),
        ({}, {}, {"prediction": "v", "zero_terminal_snr": True}, r"diffusion\.zero_terminal_snr=true"),
    ],
)
def test_what_their_code_cannot_hold_is_refused(
    tmp_path: Path, unet: dict[str, Any], first: dict[str, Any], diffusion: dict[str, Any], message: str
) -> None:
    artifact = second_stage(
        dataclasses.replace(UNET, **unet),
        TEXTLESS,
        first_stage(dataclasses.replace(AUTOENCODER, **first)),
        DiffusionConfig(**diffusion),
    )
    with pytest.raises(CheckpointError, match=message):
        publish(artifact, "compvis", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def other_kinds() -> list[tuple[ConditioningConfig, UNetConfig, str]]:
    _, classes = KINDS["classes"]
    _, labels = KINDS["semantic map"]
    _, small = KINDS["small image"]
    assert small.low_resolution is not None
    larger = dataclasses.replace(small.low_resolution, factor=4)
    return [
        (
            dataclasses.replace(classes, semantic_map=labels.semantic_map),
            UNET,
            "classes and semantic_map: their Latent",
        ),
        (ConditioningConfig(inpainting=InpaintingConditioningConfig()), SELF, "inpainting alone: .* black holes"),
        (ConditioningConfig(low_resolution=larger), SELF, r"low_resolution\.factor=4: .* f=2"),
    ]


@pytest.mark.parametrize(("conditioning", "unet", "message"), other_kinds())
def test_other_conditioning_is_refused(
    tmp_path: Path, conditioning: ConditioningConfig, unet: UNetConfig, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        publish(second_stage(unet, conditioning), "compvis", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_parts_without_a_place_are_refused(tmp_path: Path) -> None:
    shifted = first_stage(statistics=LatentStatistics(shift=0.5))
    with pytest.raises(CheckpointError, match=r"latent_statistics\.shift=0\.5: their code has a scale_factor"):
        publish(second_stage(SELF, ConditioningConfig(), shifted), "compvis", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"kind=identity: their IdentityFirstStage has no weights"):
        publish(first_stage(IDENTITY, LatentStatistics()), "compvis", tmp_path / "out")
    ours = second_stage(*KINDS["semantic map"])
    ours.state["conditioner.semantic_map.projection.weight"][-1, 0] = 1.0
    with pytest.raises(CheckpointError, match="the row for unknown pixels is not zero"):
        publish(ours, "compvis", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_that_computes_otherwise_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = second_stage(SELF, ConditioningConfig())
    monkeypatch.setattr(comparison, "TOLERANCE", -1.0)
    with pytest.raises(CheckpointError, match=r"read back differs by 0\.00e\+00 of its norm"):
        publish(ours, "compvis", tmp_path / "out")
    monkeypatch.undo()

    def other(folder: Path, options: ImportOptions) -> Any:
        found = read_compvis(folder, options)
        found.artifact.state["unet.conv_in.bias"][0] += 1
        return found

    monkeypatch.setattr(compvis_folder, "read_compvis", other)
    with pytest.raises(CheckpointError, match=r"unet\.conv_in\.bias is read back with other values"):
        publish(ours, "compvis", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    ours = first_stage()
    ours.state["encoder.conv_in.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"with other values|read back differs by nan"):
        publish(ours, "compvis", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    ours = first_stage()
    with full_disk(100_000), pytest.raises((CheckpointError, OSError)):
        publish(ours, "compvis", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_deeper_transformers_are_written_as_convolutions(tmp_path: Path) -> None:
    """Stability's code, the one that has linear projections, gives the context to the first block alone."""
    unet, conditioning = KINDS["layout"]
    publish(second_stage(unet, conditioning), "compvis", tmp_path / "out")
    weight: Tensor = theirs(tmp_path / "out" / "model.ckpt")["model.diffusion_model.middle_block.1.proj_in.weight"]
    assert weight.shape == (64, 64, 1, 1)


def test_every_tensor_of_a_model_has_a_place() -> None:
    for unet, conditioning in KINDS.values():
        with torch.device("meta"):
            network = LatentDiffusion(unet, conditioning, 4)
        state = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("unet.")}
        written = to_theirs(state, unet_places(unet))
        assert sum(t.numel() for t in written.values()) == sum(t.numel() for t in state.values())
