from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale import load_diffusion
from ldm_scale.__main__ import main
from ldm_scale.config.schema import (
    ClassifierConfig,
    Config,
)
from ldm_scale.interchange.classifier import LoadedClassifier
from ldm_scale.interchange.load import LoadedDiffusion
from ldm_scale.models.build import build_seeded
from ldm_scale.models.classifier import LatentClassifier
from tests.helpers.models import SIDE
from tests.helpers.runs import UNET, set_random_outputs
from tests.helpers.sampling import LABELS, make_models, refusal, sampled, write_inputs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(models: dict[str, Path]) -> Path:
    return models["text"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("options", [[], ["--eta", "1"], ["--sampler", "ddpm"], ["--sampler", "plms"]])
def test_image_i_depends_on_its_own_seed_and_prompt_only(model: Path, tmp_path: Path, options: list[str]) -> None:
    together = ["--prompt", "red", "--prompt", "a blue thing", "--num-images", "3", "--seed", "7", "--batch", "2"]
    first, second, third = sampled(model, tmp_path / "a", *options, *together)
    (single,) = sampled(model, tmp_path / "b", *options, "--prompt", "a blue thing", "--seed", "8")
    assert np.abs(second - single).max() <= 1  # a batch of another size may round differently
    assert np.abs(first - third).max() > 1, "same prompt, other seed: the images should differ"
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.width > grid.height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "conditioned on text: give --prompt TEXT"),
        (["--prompt", "x", "--batch", "0"], "--batch 0"),
        (["--prompt", "x", "--num-images", "0"], "--num-images 0"),
        (["--prompt", "x", "--prompt", "y", "--num-images", "1"], "--num-images 1: must be at least 2"),
        (
            ["--prompt", "x", "--guidance", "1", "--guidance-rescale", "0.7"],
            "guidance_rescale with a guidance scale",
        ),
        (["--prompt", "x", "--steps", "2000"], "num_steps=2000"),
        (["--prompts-file", "/no/such/file"], "cannot be read"),
        (["--prompt", "x", "--class", "red"], "--class: the model is conditioned on text; leave it out"),
        (["--prompt", "x", "--map", "m.png"], "--map: the model is conditioned on text"),
        (["--prompt", "x", "--size", "16"], "--size 16: must be height and width"),
        (["--prompt", "x", "--size", "18x16"], "an image of 18 x 16 pixels: both sides must be multiples of 4"),
        (["--prompt", "x", "--tile", "18"], "tile=18: must be a multiple of 4 pixels"),
        (["--prompt", "x", "--tile", "16", "--tile-overlap", "16"], "overlap=16: must be"),
        (["--prompt", "x", "--tile-overlap", "8"], "belong to tile"),
        (["--prompt", "x", "--strength", "0.5"], "strength=0.5 without an image"),
        (["--prompt", "x", "--init-image", "/no/such.png"], "cannot be read"),
        (["--prompt", "x", "--guidance", "1", "--negative-prompt", "y"], "guidance scale of 1"),
        (["--prompt", "x", "--guidance-interval", "2", "1"], "--guidance-interval 2 1"),
        (["--prompt", "x", "--guidance-rescale", "2"], "--guidance-rescale 2"),
        (["--prompt", "x", "--sampler", "heun"], "sampling.sampler=heun"),
        (["--prompt", "x", "--sampler", "plms", "--eta", "1"], "eta belongs to"),
        (["--prompt", "x", "--guide-scale", "2"], "--guide-scale belongs to"),
        (["--prompt", "x", "--clip-model", "ViT-B-32"], "belong to --clip-guidance"),
        (["--prompt", "x", "--imagenet-guidance", "goldfis"], "neither a name nor a number.*'goldfish'"),
        (["--prompt", "x", "--clip-guidance", "y", "--clip-model", "ViT-Z"], "--clip-model=ViT-Z: OpenCLIP has no"),
        (["--prompt", "x", "--clip-guidance", "y", "--clip-weights", "no.pt"], "--clip-weights=no.pt: neither a file"),
    ],
)
def test_bad_arguments_are_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert re.search(message, refusal(capsys, model, tmp_path, *arguments))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("nothing", ["--prompt", "x"], "--prompt: the model is conditioned on nothing: it takes --num-images alone"),
        ("nothing", ["--guidance", "2"], "guidance_scale=2: the model was never trained without"),
        ("classes", [], "conditioned on classes: give --class"),
        ("classes", ["--class", "3"], "--class '3': neither a name nor a number from 0 to 2"),
        ("classes", ["--class", "gren"], "'green'"),
        ("layout", ["--layout", "outside.json"], "is not within the picture of 64 x 64"),
        ("layout", ["--layout", "flat.json"], "has no area"),
        ("layout", ["--layout", "dog.json"], "class 'dog': neither a name"),
        ("layout", ["--layout", "list.json"], "must be JSON like"),
        ("layout", ["--layout", "/no/such.json"], "cannot be read"),
        ("map", ["--map", "unknown.png"], "semantic map with label 7"),
        ("map", ["--map", "picture.png"], "8 bits and one channel"),
        ("map", ["--map", "layout.json"], "label map does not decode"),
        ("small", ["--image", "small.png", "--size", "32x32"], "enlarges to 16 x 16 (4 times)"),
        ("fill", ["--prompt", "x", "--image", "picture.png"], "conditioned on inpainting: give --mask"),
        ("fill", ["--prompt", "x", "--image", "wide.png", "--mask", "mask.png"], "mask of 16x16 pixels for an image"),
        ("fill", ["--prompt", "x", "--image", "odd.png", "--mask", "odd.png"], "take 20 or 24 for 21"),
        (
            "fill",
            ["--prompt", "x", "--image", "picture.png", "--image", "wide.png", "--mask", "mask.png"],
            "must have one size; give --size HxW",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(
    models: dict[str, Path],
    files: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    arguments: list[str],
    message: str,
) -> None:
    given = [files.get(argument, argument) for argument in arguments]
    assert message in refusal(capsys, models[kind], tmp_path, *given)


def test_an_autoencoder_is_not_sampled(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["sample", str(model / "autoencoder"), "--prompt", "x", "--out", str(tmp_path / "x.png")])
    assert status == 4
    assert "holds an autoencoder" in capsys.readouterr().err


def test_prompts_come_from_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("eins\n\nzwei\n", encoding="utf-8")
    images = sampled(model, tmp_path, "--prompts-file", str(tmp_path / "prompts.txt"), "--steps", "1")
    assert len(images) == 2
    assert [path.stem.partition("-")[2] for path in sorted((tmp_path / "images").glob("*.png"))] == ["eins", "zwei"]
    assert torch.is_grad_enabled()


def test_json_says_what_was_made(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "word " * 40
    arguments = ["--prompt", "x", "--prompt", long, "--steps", "4", "--guidance", "3", "--guidance-interval", "0", "1"]
    sampled(model, tmp_path, *arguments, "--json", "--seed", "5")
    document = json.loads(capsys.readouterr().out)
    assert [image["seed"] for image in document["images"]] == [5, 6]
    assert all(Path(image["path"]).is_file() for image in document["images"])
    assert document["truncated"] == 1
    assert (document["sampler"], document["num_steps"], document["guidance_scale"]) == ("ddim", 4, 3.0)
    # Timesteps 999, 749, 499, 249: sigma / alpha is below 1 at the last one alone, which takes two passes an image.
    assert document["unet_passes"] == 2 * (3 * 1 + 1 * 2)
    capsys.readouterr()
    sampled(model, tmp_path, "--prompt", "x", "--guidance", "0", "--steps", "1", "--json")
    document = json.loads(capsys.readouterr().out)
    assert (document["unet_passes"], document["truncated"]) == (1, 0)


def test_guidance_that_cannot_be_is_neither_told_nor_taken(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    sampled(models["nothing"], tmp_path, "--steps", "2", "--json")
    assert json.loads(capsys.readouterr().out)["guidance_scale"] == 1.0
    line = refusal(capsys, models["nothing"], tmp_path / "b", "--guidance-interval", "0.1", "2")
    assert "guidance_interval with a guidance scale of 1" in line


def test_each_kind_is_heard(models: dict[str, Path], files: dict[str, str], tmp_path: Path) -> None:
    calls = {
        "classes": (["--class", "green"], ["--class", "2"], ["--class", "none"]),
        "layout": (["--layout", files["layout.json"]], ["--layout", files["fractions.json"]]),
        "map": (["--map", files["map.png"]], ["--map", files["mask.png"], "--size", "16x16"]),
    }
    # A mask's 255 is "unknown", its 0 the first label: another map.
    for kind, variants in calls.items():
        images = [sampled(models[kind], tmp_path / f"{kind}{i}", *given)[0] for i, given in enumerate(variants)]
        for other in images[1:]:
            assert np.abs(images[0] - other).max() > 0, kind
    named = sampled(models["classes"], tmp_path / "named", "--class", "GREEN")
    numbered = sampled(models["classes"], tmp_path / "numbered", "--class", "1")
    assert np.array_equal(named, numbered)
    assert len(sampled(models["nothing"], tmp_path / "nothing", "--num-images", "3")) == 3


def test_inpainting_keeps_what_is_known(models: dict[str, Path], files: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--image", files["picture.png"], "--mask", files["mask.png"]]
    red, blue = sampled(models["fill"], tmp_path, *arguments, "--prompt", "red", "--prompt", "blue")
    picture = np.asarray(Image.open(files["picture.png"])).astype(int)
    known = np.asarray(Image.open(files["mask.png"])) == 0
    assert np.array_equal(red[known], picture[known])
    assert np.abs(red[~known] - picture[~known]).max() > 1
    assert np.array_equal(blue[known], picture[known])


def test_super_resolution_enlarges(models: dict[str, Path], files: dict[str, str], tmp_path: Path) -> None:
    (image,) = sampled(models["small"], tmp_path, "--image", files["small.png"])
    assert image.shape == (SIDE, SIDE, 3)
    (large,) = sampled(models["small"], tmp_path / "large", "--image", files["wide.png"], "--tile", "32")
    assert large.shape == (4 * SIDE, 8 * SIDE, 3)


def test_little_strength_stays_near_the_image(model: Path, files: dict[str, str], tmp_path: Path) -> None:
    arguments = ["--prompt", "x", "--init-image", files["picture.png"], "--steps", "10"]
    little = sampled(model, tmp_path / "little", *arguments, "--strength", "0.1")[0]
    much = sampled(model, tmp_path / "much", *arguments, "--strength", "1")[0]
    opened = load_diffusion(model)
    pixels = torch.from_numpy(np.asarray(Image.open(files["picture.png"])).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    kept = opened.autoencoder.decode(opened.autoencoder.encode(pixels)).clamp(-1, 1)[0].permute(1, 2, 0).numpy()
    kept = (kept + 1) * 127.5
    assert np.abs(little - kept).mean() < 0.5 * np.abs(much - kept).mean()


def test_sizes_and_tiles(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (whole,) = sampled(model, tmp_path / "whole", "--prompt", "x", "--size", "32x48")
    assert whole.shape == (32, 48, 3)
    (one,) = sampled(model, tmp_path / "one", "--prompt", "x", "--size", "32x48", "--tile", "48")
    assert np.abs(whole - one).max() <= 1
    capsys.readouterr()
    tiled = ["--size", "32x48", "--tile", "16", "--tile-batch", "3", "--steps", "1", "--guidance", "1"]
    sampled(model, tmp_path / "tiled", "--prompt", "x", *tiled, "--json")
    document = json.loads(capsys.readouterr().out)
    # Windows of 8 latents, 2 of overlap, on 16 x 24: 3 x 4 of them.
    assert (document["height"], document["width"], document["unet_passes"]) == (32, 48, 12)


def test_a_batch_beyond_the_memory_says_what_fits(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LoadedDiffusion.sample

    def limited(self: LoadedDiffusion, y: Any, seeds: Any, **options: Any) -> torch.Tensor:
        if len(seeds) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if len(seeds) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return plain(self, y, seeds, **options)

    monkeypatch.setattr(LoadedDiffusion, "sample", limited)
    line = refusal(capsys, model, tmp_path, "--prompt", "x", "--num-images", "20", "--batch", "12")
    assert "a batch of 12 does not fit in memory, one of 1 does: give --batch 1" in line
    assert len(sampled(model, tmp_path, "--prompt", "x", "--num-images", "3", "--batch", "2", "--steps", "1")) == 3

    def none(self: LoadedDiffusion, y: Any, seeds: Any, **options: Any) -> torch.Tensor:
        raise MemoryError

    monkeypatch.setattr(LoadedDiffusion, "sample", none)
    assert "not even one image" in refusal(capsys, model, tmp_path, "--prompt", "x", "--batch", "2")


def test_a_classifier_of_latents_guides_towards_each_images_class(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    autoencoder = load_diffusion(models["nothing"]).autoencoder
    config = Config(
        stage="classifier",
        autoencoder=autoencoder.config,
        unet=dataclasses.replace(UNET, attention="self"),
        classifier=ClassifierConfig(num_classes=3, pool_head_dim=16),
    )
    network = build_seeded(
        lambda: LatentClassifier(config.unet, config.classifier, autoencoder.config.latent_channels), 4
    )
    set_random_outputs(network, seed=2)
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    known = LoadedClassifier(config, state, autoencoder.content_hash, LABELS["classes"], "run")
    monkeypatch.setattr("ldm_scale.operations.sample_guides.load_classifier", lambda path, weights: known)
    arguments = ["--classifier", "run", "--guide-scale", "300", "--num-images", "2", "--batch", "1", "--seed", "3"]
    mixed = sampled(models["nothing"], tmp_path / "mixed", *arguments, "--class", "red", "--class", "blue")
    blue = sampled(models["nothing"], tmp_path / "blue", *arguments, "--class", "blue")
    assert np.array_equal(mixed[1], blue[1])
    assert np.abs(mixed[0] - blue[0]).max() > 1
    assert "--classifier needs classes: give --class" in refusal(capsys, models["nothing"], tmp_path, *arguments)
    known.autoencoder_hash = "another"
    line = refusal(capsys, models["nothing"], tmp_path, *arguments, "--class", "red")
    assert "knows latents of the autoencoder another" in line


def test_a_classifier_of_pictures_guides_an_unconditional_model(models: dict[str, Path], tmp_path: Path) -> None:
    plain = sampled(models["nothing"], tmp_path / "plain")[0]
    guide = ["--imagenet-guidance", "goldfish", "--guide-scale", "20"]
    guided = sampled(models["nothing"], tmp_path / "guided", *guide)[0]
    off = sampled(models["nothing"], tmp_path / "off", "--imagenet-guidance", "1", "--guide-scale", "0")[0]
    assert np.array_equal(plain, off)
    assert np.abs(plain - guided).max() > 1
