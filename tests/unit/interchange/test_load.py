"""Models are found in everything that this program leaves on disk, and sampled one seed per image."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.testing import assert_close

from ldm_scale import load_autoencoder, load_diffusion
from ldm_scale.config.schema import AutoencoderConfig, Config, DataConfig
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import (
    Artifact,
    DiffusionArtifact,
    make_artifact,
    write_artifact,
    write_diffusion_artifact,
)
from ldm_scale.interchange.diffusers import fill_diffusers_folder
from ldm_scale.interchange.load import LoadedAutoencoder, LoadedDiffusion, read_source
from ldm_scale.models.autoencoder import OUTPUT_LOGVAR, LatentStatistics
from ldm_scale.models.half_precision import HalfPrecisionProbe
from ldm_scale.models.tiling import decode_raw_tiled, encode_moments_tiled
from tests.helpers.checkpoints import write_checkpoint


@pytest.fixture
def diffusion_run(tmp_path: Path, diffusion_artifact: DiffusionArtifact) -> Path:
    """A stage-2 run whose EMA weights are those of `diffusion_artifact`, and whose raw weights are twice them."""
    first = diffusion_artifact.autoencoder
    write_artifact(tmp_path / "artifact", first.state, first.config, first.statistics, first.provenance)
    config = Config(
        stage="diffusion",
        artifact=str(tmp_path / "artifact"),
        autoencoder=first.config,
        unet=diffusion_artifact.unet,
        conditioning=diffusion_artifact.conditioning,
        sampling=diffusion_artifact.sampling,
        data=DataConfig(resolution=16),
    )
    ema = diffusion_artifact.state
    kinds = {"weight": {name: 2 * tensor for name, tensor in ema.items()}, "ema": ema}
    folder = tmp_path / "run" / "checkpoints" / "images-0000000064"
    write_checkpoint(folder, config, "diffusion", kinds, first.content_hash)
    return tmp_path / "run"


def assert_same_model(loaded: LoadedDiffusion, artifact: DiffusionArtifact) -> None:
    # Copies: where weights lie in a file decides the order of a sum on some processors.
    loaded, expected = copy.deepcopy(loaded), copy.deepcopy(LoadedDiffusion(artifact))
    context = expected.encode_conditioning(["a cat"])
    z, t = torch.randn(1, 3, 8, 8), torch.tensor([500])
    weights = zip(loaded.network.state_dict().items(), expected.network.state_dict().items(), strict=True)
    for (name, one), (other_name, other) in weights:
        assert name == other_name
        assert torch.equal(one, other), name
    assert torch.equal(loaded.encode_conditioning(["a cat"]), context)
    assert torch.equal(loaded(z, t, context), expected(z, t, context))
    assert torch.equal(loaded.autoencoder.decode(z), expected.autoencoder.decode(z))


def test_autoencoder_of_an_artifact(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    a = autoencoder_artifact
    content_hash = write_artifact(tmp_path, a.state, a.config, a.statistics, a.provenance)
    loaded = load_autoencoder(tmp_path)
    assert loaded.content_hash == content_hash
    assert loaded.latent_statistics == a.statistics
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    z = loaded.encode(x)
    assert z.shape == (2, 3, 8, 8)
    assert loaded.decode(z).shape == x.shape
    assert not z.requires_grad
    mean, logvar = loaded.network.encode_moments(x)
    noise = torch.randn(z.shape)
    assert_close(z, 0.7 * mean)
    assert_close(loaded.encode(x, noise), 0.7 * (mean + (0.5 * logvar).exp() * noise))
    half = loaded.to("cpu", torch.bfloat16)
    latents = half.encode(x.bfloat16())
    assert latents.dtype == torch.float32, "latents are computed in fp32 from the half-precision moments"
    assert half.decode(latents).dtype == torch.bfloat16


def test_tiles_pass_through_the_statistics(autoencoder_artifact: Artifact) -> None:
    loaded, x = LoadedAutoencoder(autoencoder_artifact), torch.rand(2, 3, 48, 32) * 2 - 1
    noise = torch.randn(2, 3, 24, 16)
    assert_close(loaded.encode(x, noise, tile=48), loaded.encode(x, noise), rtol=1e-3, atol=1e-4)
    z = loaded.encode(x)
    assert_close(loaded.decode(z, tile=64, overlap=16), loaded.decode(z), rtol=1e-3, atol=1e-4)
    mean, _ = encode_moments_tiled(loaded.network, x, 32, 16)
    assert_close(loaded.encode(x, tile=32, overlap=16), 0.7 * mean)
    assert_close(loaded.decode(z, tile=32), decode_raw_tiled(loaded.network, z / 0.7, 32))
    assert loaded.to("cpu", torch.bfloat16).decode(z, tile=32).dtype == torch.bfloat16
    for call in (lambda: loaded.encode(x, overlap=8), lambda: loaded.decode(z, overlap=8)):
        with pytest.raises(ConfigError, match=r"^overlap=8 without tile"):
            call()


@pytest.mark.parametrize("safe", [None, False, True])
def test_float16_needs_an_artifact_that_says_it_is_safe(autoencoder_artifact: Artifact, safe: bool | None) -> None:
    a = autoencoder_artifact
    probe = None if safe is None else HalfPrecisionProbe(safe, 2e5, "decoder.levels.0.1", 512)
    loaded = LoadedAutoencoder(make_artifact(a.state, a.config, a.statistics, a.provenance, probe))
    if safe:
        assert loaded.to("cpu", torch.float16).network.quant_conv.weight.dtype == torch.float16
        return
    reason = "never been probed" if safe is None else r"decoder\.levels\.0\.1 reaches 2e\+05"
    with pytest.raises(ConfigError, match=rf"^float16 is not safe .*{reason}.*; keep float32 or bfloat16$"):
        loaded.to("cpu", torch.float16)
    assert loaded.network.quant_conv.weight.dtype == torch.float32
    loaded.to("cpu", torch.bfloat16)


def test_pixels_pass_through_pixel_space() -> None:
    config = AutoencoderConfig(kind="identity", channel_multipliers=(1,), latent_channels=3)
    loaded = LoadedAutoencoder(make_artifact({}, config, LatentStatistics(), {"resolution": 16}))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.to("cpu", torch.float16).encode(x), x)
    assert torch.equal(loaded.decode(x), x)


def test_diffusion_of_every_kind_of_folder(
    tmp_path: Path, diffusion_artifact: DiffusionArtifact, diffusion_run: Path
) -> None:
    write_diffusion_artifact(tmp_path / "safetensors", diffusion_artifact)
    (tmp_path / "diffusers").mkdir()
    fill_diffusers_folder(tmp_path / "diffusers", diffusion_artifact)
    checkpoint = diffusion_run / "checkpoints" / "images-0000000064"
    for folder in (tmp_path / "safetensors", tmp_path / "diffusers", diffusion_run, checkpoint):
        assert_same_model(load_diffusion(folder), diffusion_artifact)
    for folder in (tmp_path / "safetensors", tmp_path / "diffusers"):
        assert load_diffusion(folder).content_hash == diffusion_artifact.content_hash
        assert load_autoencoder(folder).content_hash == diffusion_artifact.autoencoder.content_hash


def test_raw_weights_of_a_run(diffusion_run: Path, diffusion_artifact: DiffusionArtifact) -> None:
    raw = read_source(diffusion_run, "raw")
    assert raw.provenance["weights"] == "raw"
    assert raw.provenance["images"] == 64
    name = "unet.conv_in.weight"
    assert torch.equal(raw.state[name], 2 * diffusion_artifact.state[name])


def test_weights_that_other_software_changed_are_taken_as_they_are(
    tmp_path: Path, diffusion_artifact: DiffusionArtifact
) -> None:
    fill_diffusers_folder(tmp_path, diffusion_artifact)
    model_class: Any = UNet2DConditionModel
    unet = model_class.from_pretrained(tmp_path / "unet")
    with torch.no_grad():
        unet.conv_out.bias += 1.0
    unet.save_pretrained(tmp_path / "unet")
    changed = read_source(tmp_path)
    assert changed.content_hash != diffusion_artifact.content_hash
    assert_close(changed.state["unet.conv_out.bias"], diffusion_artifact.state["unet.conv_out.bias"] + 1.0)


def test_a_float16_probe_is_dropped_with_the_weights_that_it_saw(
    tmp_path: Path, autoencoder_artifact: Artifact
) -> None:
    a = autoencoder_artifact
    probe = HalfPrecisionProbe(True, 12.0, "decoder.conv_in", 512)
    fill_diffusers_folder(tmp_path, make_artifact(a.state, a.config, a.statistics, a.provenance, probe))
    assert load_autoencoder(tmp_path).half_precision == probe
    model_class: Any = AutoencoderKL
    theirs = model_class.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs.decoder.conv_in.bias += 1e6
    theirs.save_pretrained(tmp_path)
    assert load_autoencoder(tmp_path).half_precision is None


def test_a_stage_1_run_stands_for_its_artifact_and_its_checkpoint_for_raw_latents(
    tmp_path: Path, autoencoder_artifact: Artifact
) -> None:
    a = autoencoder_artifact
    config = Config(stage="autoencoder", autoencoder=a.config, data=DataConfig(resolution=16))
    checkpoint = tmp_path / "checkpoints" / "images-0000000064"
    write_checkpoint(checkpoint, config, "autoencoder", {"weight": a.state | {OUTPUT_LOGVAR: torch.zeros(1)}})
    assert load_autoencoder(tmp_path).latent_statistics.num_images == 0
    write_artifact(tmp_path / "artifact", a.state, a.config, a.statistics, a.provenance)
    assert load_autoencoder(tmp_path).latent_statistics == a.statistics
    with pytest.raises(CheckpointError, match="has no EMA of autoencoder"):
        load_autoencoder(checkpoint, weights="ema")


def test_a_checkpoint_that_is_cut_short_is_named(diffusion_run: Path) -> None:
    checkpoint = diffusion_run / "checkpoints" / "images-0000000064"
    path = checkpoint / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors has .* cut short"):
        load_diffusion(diffusion_run)


def test_a_missing_autoencoder_is_named(tmp_path: Path, diffusion_run: Path) -> None:
    (tmp_path / "artifact").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"trained on the autoencoder artifact=.*artifact, which is not there"):
        load_diffusion(diffusion_run)


def test_folders_without_a_model_are_named(tmp_path: Path, autoencoder_artifact: Artifact) -> None:
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        load_diffusion(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no artifact, export or complete checkpoint"):
        load_diffusion(tmp_path)
    a = autoencoder_artifact
    write_artifact(tmp_path / "a", a.state, a.config, a.statistics, a.provenance)
    with pytest.raises(CheckpointError, match="a holds an autoencoder, expected a diffusion model"):
        load_diffusion(tmp_path / "a")


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_an_image_depends_on_its_caption_and_seed_only(
    diffusion_artifact: DiffusionArtifact, sampler: str, eta: float
) -> None:
    model = LoadedDiffusion(diffusion_artifact)
    options = {"sampler": sampler, "eta": eta}
    images = model.sample(["a cat", "a dog", "a cat"], [1, 2, 3], **options)  # type: ignore[arg-type]
    assert images.shape == (3, 3, 16, 16)
    assert images.abs().max() <= 1.0
    alone = model.sample(["a dog"], [2], **options)  # type: ignore[arg-type]
    # Not bit for bit: libraries choose another matrix product for another batch size.
    assert_close(alone[0], images[1], rtol=0, atol=1e-4)
    other_seed = model.sample(["a dog"], [4], **options)  # type: ignore[arg-type]
    other_caption = model.sample(["a house"], [2], **options)  # type: ignore[arg-type]
    assert (other_seed - alone).abs().max() > 0.01
    assert (other_caption - alone).abs().max() > 1e-3


def test_sampling_defaults_are_the_models(diffusion_artifact: DiffusionArtifact) -> None:
    model = LoadedDiffusion(diffusion_artifact)
    steps: list[int] = []
    images = model.sample(["a"], [0], progress=steps.append)
    assert steps == [1, 2, 3]
    explicit = model.sample(["a"], [0], num_steps=3, guidance_scale=2.0, eta=0.0, sampler="ddim")
    assert torch.equal(images, explicit)
    assert not torch.allclose(images, model.sample(["a"], [0], guidance_scale=1.0))
    with pytest.raises(ConfigError, match="2 rows of text and 1 seeds"):
        model.sample(["a", "b"], [0])


def test_latents_mean_what_they_meant_in_training(diffusion_artifact: DiffusionArtifact) -> None:
    """Samples pass through the statistics of the autoencoder on their way to pixels."""
    model = LoadedDiffusion(diffusion_artifact)
    other = LoadedDiffusion(diffusion_artifact)
    other.autoencoder.network.statistics = dataclasses.replace(model.autoencoder.latent_statistics, scale=7.0)
    assert not torch.allclose(model.sample(["a"], [0]), other.sample(["a"], [0]))
