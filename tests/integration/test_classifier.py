"""A classifier of latents from the command that trains it to the samples that it guides: pictures of four colours."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.__main__ import main
from ldm_scale.conditioning.base import Conditions
from ldm_scale.config.schema import AutoencoderConfig, ConditioningConfig, Config, DataConfig, UNetConfig
from ldm_scale.data.sources.image_folder import prepare_image_folder
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.engine import env
from ldm_scale.errors import LdmScaleError
from ldm_scale.interchange.artifact import write_artifact
from ldm_scale.interchange.classifier import load_classifier
from ldm_scale.interchange.load import load_diffusion
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.operations.train import train
from ldm_scale.sample import main as sample
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config
from tests.helpers.shards import png, write_tar

SIDE, BATCH = 8, 16
COLORS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40), "white": (240, 240, 240)}
PIXELS = AutoencoderConfig(kind="identity", channel_multipliers=(1,), latent_channels=3)
UNET = UNetConfig(
    base_channels=16,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_levels=(),
    attention="self",
    head_dim=16,
    norm_groups=8,
)


def _config(folder: Path, stage: str, **sections: Any) -> Config:
    return tiny_config(
        stage,
        folder / "data" / "manifest.json",
        folder / stage,
        autoencoder=PIXELS,
        conditioning=ConditioningConfig(),
        unet=UNET,
        classifier={"num_classes": 4, "pool_head_dim": 16},
        data=DataConfig(
            manifest=str(folder / "data" / "manifest.json"), validation_split="heldout", resolution=SIDE, num_workers=0
        ),
        diffusion={"beta_end": 0.03},  # ends in noise alone: with the default, 64 pixels of one colour still show
        optimizer={"lr": 3e-3, "warmup_images": 160},
        ema={"half_life_images": 64.0},
        sampling={"num_steps": 20, "guidance_scale": 1.0},
        **sections,
    )


def _train(config: Config) -> bool:
    return train(config, env.read_launch())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained unconditional model and a trained classifier of the same latents, which are the pixels."""
    folder = tmp_path_factory.mktemp("classifier")
    generator = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(24):
            pixels = np.array(color) + generator.normal(0, 12, (SIDE, SIDE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "pictures" / name / f"{number}.png")
    prepare_image_folder(folder / "pictures", folder / "data", SIDE, 25.0, 128)
    statistics = LatentStatistics(shift=0.2, scale=1.6, num_images=8)
    write_artifact(folder / "artifact", {}, PIXELS, statistics, {"images": 0, "resolution": SIDE, "weights": "raw"})
    for stage, steps in (("diffusion", 80), ("classifier", 100)):
        cadence = {"total_images": steps * BATCH, "global_batch": BATCH, "log_every_images": steps * BATCH}
        assert run_ranks(_train, 1, _config(folder, stage, train=cadence)) == [True]
    return folder


def test_it_knows_classes_where_there_is_little_noise_and_guesses_where_there_is_nothing_else(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "classifier" / "metrics.jsonl").read_text().splitlines()]
    figures = next(row for row in reversed(rows) if "validation/accuracy/raw/mean" in row)
    for weights in ("raw", "ema"):
        accuracies = [figures[f"validation/accuracy/{weights}/bin{i}"] for i in range(8)]
        assert accuracies[0] > 0.95
        assert accuracies[-1] < 0.5
        assert figures[f"validation/loss/{weights}/bin0"] < 0.5
        assert figures[f"validation/loss/{weights}/bin7"] > 0.7 * math.log(4)


def _nearest(images: np.ndarray) -> list[str]:
    """Name of the colour next to each image's mean. Shapes: (N, H, W, 3) in 0 .. 255."""
    colors = np.array(list(COLORS.values()))
    distances = np.linalg.norm(images.mean(axis=(1, 2))[:, None] - colors, axis=-1)
    return [list(COLORS)[i] for i in distances.argmin(axis=1)]


def _sampled(folder: Path, out: Path, *options: str) -> list[str]:
    arguments = [str(folder / "diffusion"), "--device", "cpu", "--out", str(out / "grid.png"), "--images-dir", str(out)]
    assert sample([*arguments, "--num-images", "8", *options]) == 0
    files = sorted(path for path in out.glob("0*.png"))
    return _nearest(np.stack([np.asarray(Image.open(file)) for file in files]))


def test_samples_are_of_the_class_that_is_asked_for(folder: Path, tmp_path: Path) -> None:
    assert len(set(_sampled(folder, tmp_path / "plain"))) > 1
    guide = ["--classifier", str(folder / "classifier"), "--guide-scale", "10"]
    assert _sampled(folder, tmp_path / "red", *guide, "--class", "red").count("red") >= 6  # 2 by chance
    mixed = _sampled(
        folder, tmp_path / "two", *guide, "--class", "0", "--class", "white", "--classifier-weights", "raw"
    )
    assert sum(found == wanted for found, wanted in zip(mixed, ["blue", "white"] * 4, strict=True)) >= 6


def test_guidance_raises_the_probability_of_the_class(folder: Path) -> None:
    model, classifier = load_diffusion(folder / "diffusion"), load_classifier(folder / "classifier")
    seeds, wanted = range(8), torch.tensor([classifier.names.index("green")] * 8)

    def probability(scale: float) -> float:
        images = model.sample(Conditions(), seeds=seeds, guide=classifier.guide(model, ["green"] * 8, scale))
        z = model.autoencoder.encode(images)
        return float(classifier.log_probability(z, torch.zeros(8, dtype=torch.int64), wanted).exp().mean())

    found = [probability(scale) for scale in (0.0, 2.0, 10.0)]
    assert found[0] < found[1] < found[2]
    assert found[2] > 0.7


def test_weights_are_chosen_and_the_average_is_the_default(folder: Path) -> None:
    raw, ema, given = (load_classifier(folder / "classifier", weights) for weights in ("raw", "ema", None))
    name = "head.weight"
    assert torch.equal(given.network.state_dict()[name], ema.network.state_dict()[name])
    assert not torch.equal(raw.network.state_dict()[name], ema.network.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--classifier", "RUN/classifier"], "--classifier needs classes: give --class"),
        (["--classifier", "RUN/classifier", "--class", "pink"], "--class 'pink': neither a name nor a number from 0"),
        (["--classifier", "RUN/classifier", "--class", "4"], "--class '4': neither a name nor a number from 0 to 3"),
        (["--classifier", "RUN/diffusion", "--class", "red"], "is of stage=diffusion: give the run_dir of a run with"),
        (["--classifier", "RUN/pictures", "--class", "red"], "pictures holds no complete checkpoint"),
        (["--classifier-weights", "raw"], "--classifier-weights belongs to --classifier RUN"),
        (["--guide-scale", "2"], "--guide-scale belongs to --clip-guidance, --imagenet-guidance or --classifier"),
        (
            ["--classifier", "RUN/classifier", "--class", "red", "--classifier-weights", "ema=0.1"],
            "ema=0.1 cannot be reconstructed",
        ),
        (["--class", "red"], "--class: the model is conditioned on nothing"),
    ],
)
def test_refusals(folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    given = [option.replace("RUN", str(folder)) for option in options]
    assert main(["sample", str(folder / "diffusion"), "--device", "cpu", *given]) != 0
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    "arguments", [["sample"], ["export", "--to", "diffusers", "--out", "OUT"], ["encode", "DATA", "--out", "OUT"]]
)
def test_a_classifier_is_no_model_to_sample_export_or_encode_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    places = {"OUT": str(tmp_path / "out"), "DATA": str(folder / "data" / "manifest.json")}
    command, *options = [places.get(word, word) for word in arguments]
    assert main([command, str(folder / "classifier"), *options]) != 0
    assert "holds a classifier of latents, which guides the sampling of a diffusion model" in capsys.readouterr().err


def _refused(config: Config) -> str:
    with pytest.raises(LdmScaleError) as caught:
        train(config, env.read_launch())
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(("num_classes", "data"), [(3, "data"), (4, "unnamed")])
def test_data_without_usable_classes_are_refused(folder: Path, num_classes: int, data: str) -> None:
    (folder / "unnamed").mkdir(exist_ok=True)
    samples = [(f"{n}", {"png": png(Image.new("RGB", (SIDE, SIDE)))}) for n in range(BATCH)]
    index_tars([write_tar(folder / "unnamed" / "s.tar", samples)], folder / "unnamed" / "manifest.json", "train")
    config = _config(folder, "classifier", train={"global_batch": BATCH})
    config = dataclasses.replace(
        config,
        run_dir=str(folder / f"without-{data}"),
        classifier=dataclasses.replace(config.classifier, num_classes=num_classes),
        data=dataclasses.replace(config.data, manifest=str(folder / data / "manifest.json"), validation_split=""),
    )
    (line,) = run_ranks(_refused, 1, config)
    if data == "data":
        assert "ConfigError: classifier.num_classes=3: data.manifest=" in line
        assert "lists 4 classes; set classifier.num_classes=4" in line
    else:
        assert re.search(r"DataError: s/\d+ has no class, classifier.num_classes=4 asks for one from 0 to 3", line)
