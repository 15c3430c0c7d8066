"""Models of every conditioning in diffusers' layout: verified, drawn with, and back by both readers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_scale.conditioning.base import Conditions
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import (
    AutoencoderConfig,
    ClassConditioningConfig,
    ConditioningConfig,
    DiffusionConfig,
    FrozenTextConditioningConfig,
    InpaintingConditioningConfig,
    LayoutConditioningConfig,
    LowResolutionConditioningConfig,
    SamplingConfig,
    SemanticMapConditioningConfig,
    TextConditioningConfig,
    UNetConfig,
)
from ldm_scale.diffusion.sampler import ImageNoise
from ldm_scale.errors import CheckpointError
from ldm_scale.interchange import verify
from ldm_scale.interchange.artifact import Artifact, DiffusionArtifact, make_artifact, make_diffusion_artifact
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from ldm_scale.interchange.diffusers_import import read_foreign_diffusers
from ldm_scale.interchange.folding import unfold
from ldm_scale.interchange.load import LoadedDiffusion, read_source
from ldm_scale.interchange.model_card import _CALLS, _INPUTS
from ldm_scale.interchange.publish import publish
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from tests.helpers.towers import tiny_tower
from tests.helpers.weights import random_state

_diffusers: Any = diffusers

KL = AutoencoderConfig(
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    latent_channels=4,
    norm_groups=4,
    attention_levels=(1,),
)
VQ = dataclasses.replace(KL, kind="vq", latent_channels=3, codebook_size=20, attention_levels=())
PIXELS = AutoencoderConfig(kind="identity", base_channels=1, channel_multipliers=(1,), latent_channels=3, norm_groups=1)
CONDITIONAL = UNetConfig(
    base_channels=16, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), head_dim=8, norm_groups=4
)
PLAIN = dataclasses.replace(CONDITIONAL, attention="self", linear_projection=False)
# One head on levels of several widths, scale and shift, resampling blocks.
RICH = dataclasses.replace(
    PLAIN,
    head_dim=None,
    num_heads=1,
    attention_levels=(0, 1),
    scale_shift_norm=True,
    residual_resampling=True,
)
TEXT = TextConditioningConfig(width=16, depth=1, num_heads=2)
INPAINTING = InpaintingConditioningConfig()
SMALL = LowResolutionConditioningConfig(factor=2)


def make_model(
    autoencoder: AutoencoderConfig,
    unet: UNetConfig,
    diffusion: DiffusionConfig = DiffusionConfig(),  # noqa: B008 (frozen)
    statistics: LatentStatistics = LatentStatistics(scale=0.7, num_images=3),  # noqa: B008 (frozen)
    **conditioning: Any,
) -> DiffusionArtifact:
    sections = ConditioningConfig(**conditioning)
    first = make_artifact(random_state(Autoencoder(autoencoder)), autoencoder, statistics, {"resolution": 16})
    return make_diffusion_artifact(
        random_state(LatentDiffusion(unet, sections, autoencoder.latent_channels)),
        first,
        unet=unet,
        conditioning=sections,
        diffusion=diffusion,
        sampling=SamplingConfig(guidance_scale=2.0),
        provenance={"resolution": 16},
    )


UNSCALED = LatentStatistics(num_images=3)
EDM = DiffusionConfig(prediction="edm")
PIPELINES: dict[str, tuple[str, DiffusionArtifact]] = {
    "unconditional vq": ("LDMPipeline", make_model(VQ, RICH)),
    "unconditional kl": ("LDMPipeline", make_model(KL, PLAIN, DiffusionConfig(prediction="x0", schedule="cosine"))),
    "unconditional edm": ("LDMPipeline", make_model(VQ, PLAIN, EDM)),
    "pixels": ("DDIMPipeline", make_model(PIXELS, PLAIN, statistics=UNSCALED)),
    "super-resolution": (
        "LDMSuperResolutionPipeline",
        make_model(VQ, PLAIN, statistics=UNSCALED, low_resolution=SMALL),
    ),
    "inpainting": ("StableDiffusionInpaintPipeline", make_model(KL, CONDITIONAL, text=TEXT, inpainting=INPAINTING)),
    "text": (
        "StableDiffusionPipeline",
        make_model(
            KL,
            dataclasses.replace(CONDITIONAL, head_dim=None, num_heads=4, linear_projection=False),
            DiffusionConfig(prediction="v", zero_terminal_snr=True),
            text=dataclasses.replace(TEXT, padding="zero"),
        ),
    ),
}
CLASSES = ClassConditioningConfig(num_classes=5, width=16)
PARTS: dict[str, tuple[str, DiffusionArtifact]] = {
    "classes": ("conditioned on classes", make_model(KL, CONDITIONAL, classes=CLASSES)),
    "shifted": (
        "conditioned on classes",
        make_model(KL, CONDITIONAL, EDM, statistics=LatentStatistics(shift=0.2, scale=0.7), classes=CLASSES),
    ),
    "text and classes": ("conditioned on text and classes", make_model(VQ, CONDITIONAL, text=TEXT, classes=CLASSES)),
    "inpainting": ("conditioned on inpainting", make_model(VQ, PLAIN, inpainting=INPAINTING)),
    "inpainting of 3": (
        "takes 4 channels of latents",
        make_model(dataclasses.replace(KL, latent_channels=3), CONDITIONAL, text=TEXT, inpainting=INPAINTING),
    ),
    "scaled super-resolution": ("has a scale of 0.7", make_model(VQ, PLAIN, low_resolution=SMALL)),
    "larger super-resolution": (
        "enlarges by the autoencoder's f=2, this model by 4",
        make_model(VQ, PLAIN, statistics=UNSCALED, low_resolution=LowResolutionConditioningConfig(factor=4)),
    ),
    "map": ("conditioned on semantic_map", make_model(KL, PLAIN, semantic_map=SemanticMapConditioningConfig(9, 2))),
    "layout": (
        "conditioned on layout",
        make_model(
            PIXELS,
            CONDITIONAL,
            layout=LayoutConditioningConfig(num_classes=4, num_tokens=21, max_objects=2, width=16, depth=1, head_dim=8),
        ),
    ),
    "frozen text and classes": (
        "conditioned on frozen_text and classes",
        make_model(KL, CONDITIONAL, frozen_text=FrozenTextConditioningConfig(max_tokens=9, width=16), classes=CLASSES),
    ),
}
PER_CHANNEL = LatentStatistics(channel_mean=(3.0, -0.7, 0.01, 0.0), channel_std=(9.0, 0.05, 1.3, 1.0), num_images=8)


def assert_same_tensors(found: DiffusionArtifact | Artifact, expected: DiffusionArtifact | Artifact) -> None:
    assert found.state.keys() == expected.state.keys()
    assert all(
        torch.equal(found.state[name], x) and found.state[name].dtype == x.dtype for name, x in expected.state.items()
    )


def without_our_description(folder: Path) -> Path:
    for name in ("ldm_scale.json", "README.md"):
        (folder / name).unlink()
    return folder


@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_are_verified_and_come_back_by_both_readers(tmp_path: Path, kind: str) -> None:
    name, artifact = PIPELINES[kind]
    published = publish(artifact, "diffusers", tmp_path / "out")
    assert published.differences["UNet"] < 1e-5
    assert max(published.differences.values()) < 1e-4
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"] == name
    assert read_source(tmp_path / "out").content_hash == artifact.content_hash

    back = read_foreign_diffusers(without_our_description(tmp_path / "out"))
    assert isinstance(back, DiffusionArtifact)
    assert_same_tensors(back, artifact)
    assert_same_tensors(back.autoencoder, artifact.autoencoder)
    statistics = artifact.autoencoder.statistics
    assert back.autoencoder.statistics == dataclasses.replace(statistics, num_images=0)
    assert back.autoencoder.config == artifact.autoencoder.config
    assert back.conditioning == artifact.conditioning
    assert back.diffusion == artifact.diffusion
    assert back.provenance["resolution"] == artifact.provenance["resolution"]


@pytest.mark.parametrize("kind", PARTS)
def test_other_models_are_parts(tmp_path: Path, kind: str) -> None:
    reason, artifact = PARTS[kind]
    published = publish(artifact, "diffusers", tmp_path / "out")
    assert max(published.differences.values()) < 1e-4
    back = read_source(tmp_path / "out")
    assert back.content_hash == artifact.content_hash
    assert_same_tensors(back, artifact)
    assert not (tmp_path / "out" / "model_index.json").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert reason in card
    # What the card shows runs.
    code = card.split("```python\n")[1].split("```")[0].replace("path/of/this/folder", str(tmp_path / "out"))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["unet"].config.in_channels == artifact.state["unet.conv_in.weight"].shape[1]
    with pytest.raises(CheckpointError, match=r"holds neither model_index\.json nor config\.json"):
        read_foreign_diffusers(without_our_description(tmp_path / "out"))


def test_a_damaged_conditioner_fails_the_export(tmp_path: Path) -> None:
    fill_diffusers_folder(tmp_path, PARTS["classes"][1])
    path = tmp_path / "conditioner" / "model.safetensors"
    save_file({name: x + 1 for name, x in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match="conditioner is read back with other values"):
        verify.measure_differences(tmp_path, PARTS["classes"][1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep_spacing": "trailing"}, "exported DDIMScheduler visits the timesteps"),
        ({"beta_end": 0.011}, "exported DDIMScheduler has other noise levels than ours"),
        ({"num_train_timesteps": 500}, "exported DDIMScheduler visits the timesteps"),
    ],
)
def test_a_scheduler_that_follows_another_process_fails_the_export(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    artifact = PIPELINES["unconditional vq"][1]
    fill_diffusers_folder(tmp_path, artifact)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        verify.measure_differences(tmp_path, artifact)


def test_a_mask_in_our_place_fails_the_export(tmp_path: Path) -> None:
    """The check of inpainting sees the order of the channels, which shapes do not show."""
    artifact = PIPELINES["inpainting"][1]
    fill_diffusers_folder(tmp_path, artifact)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["conv_in.weight"] = artifact.state["unet.conv_in.weight"].clone()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"conv_in\.weight is read back with other values"):
        verify.measure_differences(tmp_path, artifact)


@pytest.mark.parametrize("kind", ["unconditional vq", "unconditional edm", "pixels"])
def test_pipelines_draw_our_pictures(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = PIPELINES[kind][1]
    fill_diffusers_folder(tmp_path, artifact)
    pipeline = _diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    side = 16 // artifact.autoencoder.config.downsampling_factor
    noise = ImageNoise((5, 6), (3, side, side))
    monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: noise.initial())
    theirs = torch.from_numpy(pipeline(batch_size=2, num_inference_steps=10, output_type="np").images)
    ours = draw(artifact, Conditions(), sampler="euler" if "edm" in kind else "ddim")
    assert theirs.std() > 0.01
    assert torch.allclose(theirs.permute(0, 3, 1, 2) * 2 - 1, ours, atol=1e-3)


def test_the_inpainting_pipeline_fills_our_holes(tmp_path: Path) -> None:
    artifact = PIPELINES["inpainting"][1]
    fill_diffusers_folder(tmp_path, artifact)
    pipeline = _diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    hole = torch.zeros(2, 1, 16, 16)
    hole[:, :, 4:12, 2:10] = 1
    captions = ["a red apple", "a face"]
    theirs = pipeline(
        captions,
        image=picture,
        mask_image=hole,
        masked_image_latents=LoadedDiffusion(artifact).autoencoder.encode(picture * (1 - hole)),
        strength=1.0,
        num_inference_steps=10,
        guidance_scale=2.0,
        latents=ImageNoise((5, 6), (4, 8, 8)).initial(),
        height=16,
        width=16,
        output_type="pt",
    ).images
    ours = draw(artifact, Conditions(captions=captions, images=picture, masks=hole), sampler="ddim")
    filled = hole.expand_as(ours) == 1
    assert theirs[filled].std() > 0.01
    assert torch.allclose((theirs * 2 - 1)[filled], ours[filled], atol=1e-3)


def draw(artifact: DiffusionArtifact, y: Conditions, sampler: str) -> Tensor:
    return LoadedDiffusion(artifact).sample(y, (5, 6), num_steps=10, eta=0.0, sampler=sampler)


def test_folded_statistics_come_back_to_rounding(tmp_path: Path) -> None:
    artifact = make_model(KL, PLAIN, statistics=PER_CHANNEL)
    publish(artifact, "diffusers", tmp_path / "out")
    assert read_source(tmp_path / "out").content_hash == artifact.content_hash
    back = read_foreign_diffusers(without_our_description(tmp_path / "out"))
    assert isinstance(back, DiffusionArtifact)
    assert_same_tensors(back, artifact)
    assert back.autoencoder.statistics == LatentStatistics(), "its raw latents are our latents"
    for name, x in unfold(back.autoencoder.state, PER_CHANNEL).items():
        expected = artifact.autoencoder.state[name]
        assert (x - expected).norm() <= 1e-6 * expected.norm(), name


@pytest.mark.parametrize(
    ("artifact", "message"),
    [
        (make_model(KL, PLAIN, statistics=LatentStatistics(shift=0.1)), r"shift=0\.1: LDMPipeline only scales"),
        (make_model(PIXELS, PLAIN), r"latent_statistics\.scale=0\.7, shift=0\.0 of pixels: DDIMPipeline draws pixels"),
        (make_model(PIXELS, PLAIN, EDM, statistics=UNSCALED), r"prediction=edm: DDIMPipeline scales neither"),
        (make_model(VQ, PLAIN, DiffusionConfig(prediction="flow")), r"diffusion\.prediction=flow"),
        (
            make_model(VQ, CONDITIONAL, statistics=LatentStatistics(shift=0.1), classes=CLASSES),
            r"shift=0\.1: VQModel has a scaling_factor and no shift",
        ),
    ],
)
def test_what_diffusers_computes_otherwise_is_refused(
    tmp_path: Path, artifact: DiffusionArtifact, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        publish(artifact, "diffusers", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_frozen_tower_is_a_clip_text_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Stable Diffusion 2: OpenCLIP's tower up to its penultimate layer, with its last norm, filled with 0."""
    artifact = make_model(KL, CONDITIONAL, frozen_text=tiny_tower(tmp_path))
    publish(artifact, "diffusers", tmp_path / "out")
    back = read_source(tmp_path / "out")
    assert back.content_hash == artifact.content_hash
    assert json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())["num_hidden_layers"] == 2
    pipeline = _diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    pipeline.set_progress_bar_config(disable=True)
    captions = ["a red apple", "a face on a plate"]
    theirs = pipeline(
        captions,
        num_inference_steps=10,
        guidance_scale=2.0,
        latents=ImageNoise((5, 6), (4, 8, 8)).initial(),
        output_type="pt",
    ).images
    ours = draw(artifact, Conditions(captions=captions), sampler="ddim")
    assert theirs.std() > 0.01
    assert torch.allclose(theirs * 2 - 1, ours, atol=1e-3)

    # Without our description the tower is a text encoder like any other, and gives the same contexts.
    foreign = read_foreign_diffusers(without_our_description(tmp_path / "out"))
    assert isinstance(foreign, DiffusionArtifact)
    assert foreign.conditioning.text is not None
    contexts = [LoadedDiffusion(model).encode_conditioning(captions) for model in (artifact, foreign)]
    assert (contexts[0] - contexts[1]).norm() < 1e-5 * contexts[0].norm()  # type: ignore[operator, union-attr]


def test_a_tower_that_is_read_otherwise_fails_the_export(tmp_path: Path) -> None:
    artifact = make_model(KL, CONDITIONAL, frozen_text=tiny_tower(tmp_path))
    (tmp_path / "out").mkdir()
    fill_diffusers_folder(tmp_path / "out", artifact)
    path = tmp_path / "out" / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_act": "quick_gelu"}))
    with pytest.raises(CheckpointError, match="text encoder read back differs"):
        verify.measure_differences(tmp_path / "out", artifact)


def test_the_card_knows_every_pipeline_and_every_kind() -> None:
    assert {name for name, _ in PIPELINES.values()} <= set(_CALLS)
    assert set(_INPUTS) == {field.name for field in dataclasses.fields(ConditioningConfig)}
