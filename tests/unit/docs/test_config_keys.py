"""Every key of the configuration is described, and what the site says of it is true."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import pytest

from ldm_scale.config.compose import list_experiments, load_config
from ldm_scale.config.ranges import _RANGES, bounds
from ldm_scale.config.schema import Config
from ldm_scale.config.validate import validate
from ldm_scale.errors import ConfigError
from tests.helpers.documents import ROOT, generator
from tests.helpers.sizes import measured

KEYS = generator("config_keys")
PAGE = (ROOT / "docs" / "configuration.md").read_text("utf-8")
GIVEN = ("data.manifest=data/mine/manifest.json", "artifact=runs/ae/artifact")
REFUSED = re.findall(r"^\| .* \| `(experiment=[^`]*)` \|$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("key", KEYS.all_keys(), ids=lambda key: key.name)
def test_every_key_has_a_description(key: object) -> None:
    text = key.description  # type: ignore[attr-defined]
    assert len(text.split()) > 1, f"write what {key.name} means behind it in schema.py"  # type: ignore[attr-defined]


def test_every_key_is_on_the_page() -> None:
    text = KEYS.every_key()
    names = [key.name for key in KEYS.all_keys()]
    assert len(names) > 150
    assert re.findall(r"^### `(.+?)` \{ #(\S+) .*\}$", text, flags=re.MULTILINE) == [(name, name) for name in names]


def test_a_comment_is_found_behind_a_field_and_above_it() -> None:
    text = {key.name: key.description for key in KEYS.all_keys()}
    assert text["train.global_batch"] == "images per optimizer step over all ranks"
    assert text["diffusion.prediction"].startswith("What the network's output means: the noise, v, the clean latents")
    assert text["diffusion.prediction"].endswith("rectified flow (arXiv:2209.03003).")
    assert text["data.crop_scale_min"].startswith("smallest side of the random square crop")  # of several lines


@pytest.mark.parametrize(
    "name", ["sd1", "kl_f8", "openmoji_layout_small", "inpaint_ldm4_big", "openmoji_classifier_small"]
)
def test_experiments_are_composed_as_by_hydra(name: str) -> None:
    composed = dataclasses.replace(load_config([f"experiment={name}"]), experiment="", run_dir="")
    assert KEYS.experiment_config(name) == composed


def test_bounds_are_those_that_are_checked() -> None:
    assert bounds("sampling.guidance_rescale") == "at least 0 and at most 1"
    assert bounds("train.device") == ""
    names = {key.name for key in KEYS.all_keys()}
    assert {key for rule in _RANGES for key in rule.keys} <= names


def test_units_are_those_of_the_names() -> None:
    units = {key.name: KEYS.unit_of(key) for key in KEYS.all_keys()}
    assert units["train.checkpoint_every_s"] == "seconds"
    assert units["train.global_batch"] == units["ema.half_life_images"] == "images"
    assert units["train.async_checkpoints"] == units["optimizer.lr"] == units["sampling.guidance_scale"] == ""
    assert units["data.resolution"] == "pixels"
    assert set(KEYS.UNITS.values()) == set(units.values()) - {""}


def test_stages_read_sections_that_exist() -> None:
    sections = {field.name for field in dataclasses.fields(Config)}
    assert set(KEYS.UNREAD) == {"autoencoder", "diffusion", "classifier"}
    assert all(unread <= sections for unread in KEYS.UNREAD.values())


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_the_page_says_is_refused_is_refused(overrides: str) -> None:
    experiment, *breach = overrides.split()
    _accepted(experiment)  # so that it is the rest which is refused
    with pytest.raises(ConfigError):
        validate(load_config([*GIVEN, experiment, *breach]), world_size=1)


@cache
def _accepted(experiment: str) -> None:
    validate(load_config([*GIVEN, experiment]), world_size=1)


def test_the_table_of_refusals_is_read() -> None:
    assert len(REFUSED) > 12


def test_the_table_of_autoencoders_is_what_the_experiments_say() -> None:
    text = (ROOT / "docs" / "stage1.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (\d+) \| (\d*) ?\| ([\d.]+)M \|", text, flags=re.MULTILINE)
    assert {row[0] for row in rows} == {name for name in list_experiments() if re.match(r"(kl|vq|vqgan)_f\d", name)}
    for name, latents, fewer, codes, millions in rows:
        autoencoder = KEYS.experiment_config(name).autoencoder
        c, f = autoencoder.latent_channels, autoencoder.downsampling_factor
        assert latents == f"{c} x {256 // f} x {256 // f}", name
        assert int(fewer) == 3 * f * f // c, name
        assert codes == str(autoencoder.codebook_size or ""), name
        if name in ("kl_f2", "vq_f4_noattn", "vqgan_f16"):  # the networks of all take a while to count
            assert float(millions) == round(measured(f"experiment={name}").trained.parameters / 1e6, 2), name
