"""Every kind of conditioning is used: after a short training an image's own y does better than another's.

Pictures of 8 pixels, which are their own latents (f = 1), and a tiny UNet: seconds each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm_scale.config.schema import (
    AutoencoderConfig,
    ClassConditioningConfig,
    ConditioningConfig,
    Config,
    DataConfig,
    InpaintingConditioningConfig,
    LayoutConditioningConfig,
    LowResolutionConditioningConfig,
    SemanticMapConditioningConfig,
    TextConditioningConfig,
    UNetConfig,
)
from ldm_scale.data.sources.image_folder import prepare_image_folder
from ldm_scale.engine import env
from ldm_scale.interchange.artifact import write_artifact
from ldm_scale.models.autoencoder import LatentStatistics
from ldm_scale.operations.train import train
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config
from tests.helpers.towers import tiny_tower

SIDE = 8
STEPS = 200
BATCH = 16
LEAST_GAP = 0.01  # of the loss with the image's own y
ERRORS = 3.0  # standard errors of the difference

PIXELS = AutoencoderConfig(kind="identity", channel_multipliers=(1,), latent_channels=3)
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (30, 60, 220), "white": (240, 240, 240)}

WIDTH = 32
TEXT = TextConditioningConfig(width=WIDTH, depth=1, num_heads=2, max_tokens=6)
LAYOUT = LayoutConditioningConfig(
    num_classes=4, num_tokens=17, max_objects=2, width=WIDTH, depth=1, num_heads=2, head_dim=None
)
KINDS: dict[str, ConditioningConfig] = {
    "text": ConditioningConfig(text=TEXT),
    "frozen_text": ConditioningConfig(),  # its section comes with its tower, see `kinds`
    "classes": ConditioningConfig(classes=ClassConditioningConfig(num_classes=4, width=WIDTH)),
    "layout": ConditioningConfig(layout=LAYOUT),
    "semantic_map": ConditioningConfig(semantic_map=SemanticMapConditioningConfig(num_labels=5, channels=4)),
    "low_resolution": ConditioningConfig(low_resolution=LowResolutionConditioningConfig(factor=4)),
    "inpainting": ConditioningConfig(inpainting=InpaintingConditioningConfig()),
    "text and inpainting": ConditioningConfig(text=TEXT, inpainting=InpaintingConditioningConfig(masks="thick")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with all that can be said of them, and the artifact whose latents are their pixels."""
    folder = tmp_path_factory.mktemp("conditioning")
    generator = np.random.default_rng(0)
    for number in range(256):
        name, corner = list(COLOURS)[number % 4], generator.integers(2, size=2) * (SIDE // 2)
        _write_picture(folder / "pictures" / name / f"{number:03d}", name, corner, generator)
    prepare_image_folder(folder / "pictures", folder / "data", SIDE, 25.0, 128, tuple(COLOURS), ("ground", *COLOURS))
    statistics = LatentStatistics(shift=-0.2, scale=1.6, num_images=8)
    write_artifact(folder / "artifact", {}, PIXELS, statistics, {"images": 0, "resolution": SIDE, "weights": "raw"})
    return folder


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConditioningConfig]:
    """KINDS with a frozen tower, whose weights are random: it tells captions apart, and means nothing by them."""
    return KINDS | {"frozen_text": ConditioningConfig(frozen_text=tiny_tower(tmp_path_factory.mktemp("tower"), None))}


def _write_picture(path: Path, name: str, corner: np.ndarray, generator: np.random.Generator) -> None:
    """A square of a colour in one quarter of a dark picture, with its caption, box and map."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = SIDE // 2
    pixels = np.full((SIDE, SIDE, 3), 40.0)
    labels = np.zeros((SIDE, SIDE), dtype=np.uint8)
    quarter = (slice(corner[0], corner[0] + half), slice(corner[1], corner[1] + half))
    pixels[quarter], labels[quarter] = COLOURS[name], 1 + list(COLOURS).index(name)
    pixels += generator.normal(0, 12, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path.with_suffix(".png"))
    Image.fromarray(labels).save(path.with_suffix(".seg.png"))
    place = f"{'lower' if corner[0] else 'upper'} {'right' if corner[1] else 'left'}"
    path.with_suffix(".txt").write_text(f"{name} {place}")
    box = [int(corner[1]), int(corner[0]), half, half]
    path.with_suffix(".json").write_text(json.dumps({"objects": [{"class": name, "box": box}]}))


def _train(config: Config) -> bool:
    return train(config, env.read_launch())


def _last_validation(folder: Path, name: str, conditioning: ConditioningConfig, **sections: Any) -> dict[str, float]:
    """The figures at the end of a short training."""
    has_context = any((conditioning.text, conditioning.frozen_text, conditioning.classes, conditioning.layout))
    run_dir = folder / name.replace(" ", "_")
    config = tiny_config(
        "diffusion",
        folder / "data" / "manifest.json",
        run_dir,
        autoencoder=PIXELS,
        conditioning=conditioning,
        unet=UNetConfig(
            base_channels=32,
            channel_multipliers=(1, 2),
            num_res_blocks=1,
            attention_levels=(0, 1),
            attention="transformer" if has_context else "self",
            head_dim=16,
            norm_groups=8,
        ),
        data=DataConfig(
            manifest=str(folder / "data" / "manifest.json"), validation_split="heldout", resolution=SIDE, num_workers=0
        ),
        optimizer={"lr": 3e-3, "warmup_images": 320},
        train={"total_images": STEPS * BATCH, "global_batch": BATCH, "log_every_images": STEPS * BATCH},
        **sections,
    )
    (finished,) = run_ranks(_train, 1, config)
    assert finished
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "validation/true/mean" in row][-1]  # type: ignore[no-any-return]


@pytest.mark.rest
@pytest.mark.parametrize("name", KINDS)
def test_the_loss_is_lower_with_the_images_own_conditioning(
    folder: Path, kinds: dict[str, ConditioningConfig], name: str
) -> None:
    figures = _last_validation(folder, name, kinds[name])
    assert figures["validation/raw/mean"] < 0.6 * figures["validation/zero/mean"], "it has learnt something at all"
    own = figures["validation/true/mean"]
    for kind in name.split(" and "):
        gap, error = figures[f"validation/gap/{kind}"], figures[f"validation/gap_error/{kind}"]
        assert gap > LEAST_GAP * own, f"{kind}: {gap} of {own}"
        assert gap > ERRORS * error, f"{kind}: {gap} +- {error}"
