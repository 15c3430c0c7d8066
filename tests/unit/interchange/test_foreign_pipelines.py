"""Pipelines that diffusers wrote by itself, read as ours, compute and draw what diffusers does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm_scale.conditioning.base import Conditions
from ldm_scale.config.schema import DiffusionConfig, InpaintingConditioningConfig, LowResolutionConditioningConfig
from ldm_scale.diffusion.sampler import ImageNoise
from ldm_scale.interchange.artifact import DiffusionArtifact, read_diffusion_artifact, write_diffusion_artifact
from ldm_scale.interchange.diffusers_import import read_foreign_diffusers
from ldm_scale.interchange.load import LoadedDiffusion, read_source
from tests.helpers.foreign import CONTEXT, PIPELINES, edit, save

_diffusers: Any = diffusers
TOLERANCE = 1e-4  # of the outputs' norm
CAPTIONS = ["a red apple, on a plate", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(kind, tmp_path_factory.mktemp(kind)) for kind in PIPELINES}


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, Any]:
    found = {kind: _diffusers.DiffusionPipeline.from_pretrained(folder) for kind, folder in folders.items()}
    for pipeline in found.values():
        pipeline.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def artifacts(folders: dict[str, Path]) -> dict[str, DiffusionArtifact]:
    found = {kind: read_foreign_diffusers(folder) for kind, folder in folders.items()}
    assert all(isinstance(artifact, DiffusionArtifact) for artifact in found.values())
    return found  # type: ignore[return-value]


def assert_alike(theirs: Tensor, ours: Tensor, tolerance: float = TOLERANCE) -> None:
    assert theirs.shape == ours.shape
    assert ours.norm() > 0.1, "an output near zero proves nothing"
    assert (theirs - ours).norm() <= tolerance * ours.norm()


@pytest.mark.parametrize("kind", PIPELINES)
@torch.no_grad()
def test_unets_compute_the_same(kind: str, pipelines: dict[str, Any], artifacts: dict[str, DiffusionArtifact]) -> None:
    ours, theirs = LoadedDiffusion(artifacts[kind]), pipelines[kind].unet
    channels = theirs.config.in_channels
    x = torch.randn(2, channels, 8, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 871])
    context = [] if theirs.config.get("cross_attention_dim") is None else [torch.randn(2, 5, CONTEXT)]
    expected = theirs(x, t, *context).sample
    if kind == "inpainting":
        x = torch.cat([x[:, :4], x[:, 5:], x[:, 4:5]], dim=1)
    assert_alike(expected, ours.network.unet(x, t, *context))


@pytest.mark.parametrize("kind", PIPELINES)
@torch.no_grad()
def test_autoencoders_compute_the_same(
    kind: str, pipelines: dict[str, Any], artifacts: dict[str, DiffusionArtifact]
) -> None:
    ours, pipeline = LoadedDiffusion(artifacts[kind]).autoencoder, pipelines[kind]
    if kind == "pixels":
        assert ours.config.kind == "identity"
        return
    theirs = pipeline.vae if hasattr(pipeline, "vae") else pipeline.vqvae
    scale = 1.0 if kind == "super_resolution" else theirs.config.scaling_factor
    assert ours.latent_statistics.scale == scale
    x = torch.rand(1, 3, 16, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    encoded = theirs.encode(x)
    raw = encoded.latents if ours.config.kind == "vq" else encoded.latent_dist.mode()
    assert_alike(raw * scale, ours.encode(x))
    assert_alike(theirs.decode(raw).sample, ours.decode(raw * scale))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "text_to_image"])
@torch.no_grad()
def test_captions_give_the_same_context(
    kind: str, pipelines: dict[str, Any], artifacts: dict[str, DiffusionArtifact]
) -> None:
    pipeline = pipelines[kind]
    ids = pipeline.tokenizer(
        CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    encoder = pipeline.bert if kind == "text_to_image" else pipeline.text_encoder
    ours = LoadedDiffusion(artifacts[kind]).encode_conditioning(CAPTIONS)
    assert isinstance(ours, Tensor)
    assert_alike(encoder.eval()(ids)[0], ours)
    if kind == "sd2":
        assert ids[1, -1] == 0, "filled with another number than the end token"


def test_what_surrounds_the_networks(artifacts: dict[str, DiffusionArtifact]) -> None:
    sd1, sd2 = artifacts["sd1"], artifacts["sd2"]
    assert (sd1.unet.num_heads, sd1.unet.head_dim, sd1.unet.linear_projection) == (8, None, False)
    assert (sd2.unet.num_heads, sd2.unet.head_dim, sd2.unet.linear_projection) == (None, 8, True)
    assert sd1.diffusion == DiffusionConfig()
    assert sd2.diffusion == DiffusionConfig(prediction="v")
    assert artifacts["celebahq"].diffusion == DiffusionConfig(beta_start=0.0015, beta_end=0.0195)
    assert artifacts["pixels"].diffusion == DiffusionConfig(schedule="cosine", beta_start=0.0001, beta_end=0.02)
    assert (sd1.sampling.sampler, sd2.sampling.sampler) == ("plms", "ddim")
    # The script of the LDM text model guides less than Stable Diffusion's; CompVis' checkpoints say the same.
    guidance = {kind: artifacts[kind].sampling.guidance_scale for kind in ("sd1", "sd2", "text_to_image", "celebahq")}
    assert guidance == {"sd1": 7.5, "sd2": 7.5, "text_to_image": 5.0, "celebahq": 1.0}
    assert sd1.provenance["resolution"] == 16
    assert artifacts["inpainting"].conditioning.inpainting == InpaintingConditioningConfig()
    assert artifacts["super_resolution"].conditioning.low_resolution == LowResolutionConditioningConfig(factor=2)


def draw(artifact: DiffusionArtifact, captions: list[str] | None, shape: tuple[int, ...], **options: Any) -> Tensor:
    y = Conditions(captions=captions) if captions else Conditions()
    return LoadedDiffusion(artifact).sample(y, (5, 6), num_steps=10, eta=0.0, **options)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "text_to_image"])
def test_captions_give_the_same_pictures(
    kind: str, pipelines: dict[str, Any], artifacts: dict[str, DiffusionArtifact]
) -> None:
    pipeline = pipelines[kind]
    # The sampler that PNDM follows takes a step more; DDIM's are the same.
    pipeline.scheduler = _diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    theirs = pipeline(
        CAPTIONS,
        num_inference_steps=10,
        guidance_scale=3.0,
        latents=ImageNoise((5, 6), (4, 8, 8)).initial(),
        output_type="pt",
    ).images
    ours = draw(artifacts[kind], CAPTIONS, (4, 8, 8), sampler="ddim", guidance_scale=3.0, **_size(kind))
    assert theirs.std() > 0.01
    assert torch.allclose(theirs * 2 - 1, ours, atol=1e-3)


def _size(kind: str) -> dict[str, int]:
    return {"height": 64, "width": 64} if kind == "text_to_image" else {}


@pytest.mark.parametrize("kind", ["celebahq", "pixels"])
def test_pictures_without_condition_are_the_same(
    kind: str,
    pipelines: dict[str, Any],
    artifacts: dict[str, DiffusionArtifact],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = ImageNoise((5, 6), (3, 8, 8))
    pipeline = pipelines[kind]
    monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: noise.initial())
    theirs = pipeline(batch_size=2, num_inference_steps=10, output_type="np").images
    ours = draw(artifacts[kind], None, (3, 8, 8))
    assert theirs.std() > 0.01
    assert torch.allclose(torch.from_numpy(theirs).permute(0, 3, 1, 2) * 2 - 1, ours, atol=1e-3)


def test_small_pictures_are_enlarged_the_same(
    pipelines: dict[str, Any], artifacts: dict[str, DiffusionArtifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = ImageNoise((5, 6), (3, 8, 8))
    small = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    pipeline = pipelines["super_resolution"]
    monkeypatch.setattr(f"{type(pipeline).__module__}.randn_tensor", lambda *_, **__: noise.initial())
    theirs = pipeline(small, num_inference_steps=10, output_type="pt").images
    y = Conditions(low_resolution=small)
    ours = LoadedDiffusion(artifacts["super_resolution"]).sample(y, (5, 6), num_steps=10, eta=0.0)
    assert theirs.std() > 0.01
    assert torch.allclose(theirs * 2 - 1, ours, atol=1e-3)


def test_holes_are_filled_the_same(pipelines: dict[str, Any], artifacts: dict[str, DiffusionArtifact]) -> None:
    """With a hole of whole latents, and the picture encoded by its mode, as ours."""
    loaded, pipeline = LoadedDiffusion(artifacts["inpainting"]), pipelines["inpainting"]
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    hole = torch.zeros(2, 1, 16, 16)
    hole[:, :, 4:12, 2:10] = 1
    theirs = pipeline(
        CAPTIONS,
        image=picture,
        mask_image=hole,
        masked_image_latents=loaded.autoencoder.encode(picture * (1 - hole)),
        strength=1.0,
        num_inference_steps=10,
        guidance_scale=3.0,
        latents=ImageNoise((5, 6), (4, 8, 8)).initial(),
        height=16,
        width=16,
        output_type="pt",
    ).images
    y = Conditions(captions=CAPTIONS, images=picture, masks=hole)
    ours = loaded.sample(y, (5, 6), num_steps=10, eta=0.0, guidance_scale=3.0)
    filled = hole.expand_as(ours) == 1
    assert theirs[filled].std() > 0.01
    assert torch.allclose((theirs * 2 - 1)[filled], ours[filled], atol=1e-3)


@pytest.mark.parametrize("kind", PIPELINES)
def test_imported_models_are_artifacts(tmp_path: Path, kind: str, artifacts: dict[str, DiffusionArtifact]) -> None:
    artifact = artifacts[kind]
    write_diffusion_artifact(tmp_path / "model", artifact)
    back = read_diffusion_artifact(tmp_path / "model")
    assert back.content_hash == artifact.content_hash
    assert "/" not in str(artifact.content["conditioning"]), "no path of this machine in the hash"


def test_folders_open_without_an_import(folders: dict[str, Path], artifacts: dict[str, DiffusionArtifact]) -> None:
    assert read_source(folders["celebahq"]).content_hash == artifacts["celebahq"].content_hash


def test_an_old_configuration_without_a_scale(tmp_path: Path) -> None:
    """As the published ones of CelebA-HQ, which the default of today's diffusers spoils."""
    folder = save("celebahq", tmp_path)
    edit(folder / "vqvae" / "config.json", scaling_factor=None)
    artifact = read_foreign_diffusers(folder)
    assert isinstance(artifact, DiffusionArtifact)
    assert artifact.autoencoder.statistics.scale == 1.0
