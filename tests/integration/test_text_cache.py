"""Contexts of a frozen text encoder in a latent cache: what is stored, read and trained on, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_scale.conditioning.frozen_text import FrozenTextEncoder
from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import ConditioningConfig, Config, FrozenTextConditioningConfig
from ldm_scale.data import Batch, build_loader
from ldm_scale.data.sources.tars import index_tars
from ldm_scale.engine import env
from ldm_scale.errors import ConfigError, DataError
from ldm_scale.training.diffusion_step import DiffusionTask
from tests.helpers.latents import array, encode, npy, read_tar, rewrite
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import set_random_outputs, tiny_artifact, tiny_config
from tests.helpers.shards import broken_png, make_sample, write_tar
from tests.helpers.towers import tiny_tower

TEXT = frozenset({"text"})


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> FrozenTextConditioningConfig:
    return tiny_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, section: FrozenTextConditioningConfig) -> Path:
    """16 samples in two shards, one unusable, one of two captions, one with none, one too long; caches of them."""
    path = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    samples = [(f"{n:03d}", make_sample(n, 20, rng)) for n in range(16)]
    samples[5][1]["png"] = broken_png()
    samples[2][1]["json"] = b'{"captions": ["a red apple", "a green pear"]}'
    del samples[3][1]["txt"]
    samples[4][1]["txt"] = b"one " * 20
    (path / "data").mkdir()
    tars = [write_tar(path / "data" / f"s{n}.tar", samples[8 * n : 8 * n + 8]) for n in range(2)]
    index_tars(tars, path / "data" / "manifest.json", "train")
    tiny_artifact(path / "artifact")
    report = encode(path, "--dtype", "float32", *tower(section), out="whole")
    assert report["truncated_captions"] == 1
    assert report["contexts"]["layer"] == "penultimate"
    encode(path, "--dtype", "float32", *tower(section), "--max-shards", "1", out="mixed")
    encode(path, "--dtype", "float32", *tower(section), "--text-layer", "last", out="last")
    encode(path, "--dtype", "float32", out="none")
    return path


def tower(section: FrozenTextConditioningConfig) -> list[str]:
    return ["--text-encoder", section.model, "--text-weights", section.weights]


def make_config(folder: Path, manifest: str, section: FrozenTextConditioningConfig) -> Config:
    config = tiny_config("diffusion", folder / manifest / "manifest.json", folder / "run")
    return dataclasses.replace(
        config, artifact=str(folder / "artifact"), conditioning=ConditioningConfig(frozen_text=section)
    )


def read(config: Config, augment: bool = True, annotations: frozenset[str] = TEXT) -> list[Batch]:
    loader = build_loader(
        config.data,
        seed=0,
        global_batch=4,
        micro_batch=4,
        rank=0,
        world_size=1,
        augment=augment,
        num_epochs=3,
        accept_latents=True,
        annotations=annotations,
    )
    return list(loader)


def test_a_batch_has_the_contexts_of_its_captions(folder: Path, section: FrozenTextConditioningConfig) -> None:
    encoder = FrozenTextEncoder(section)
    batches = read(make_config(folder, "whole", section))
    seen = set()
    for batch in batches:
        assert batch.text_contexts is not None
        assert batch.text_contexts.dtype == torch.float16
        assert torch.allclose(batch.text_contexts.float(), encoder(batch.captions), atol=5e-3)
        seen |= set(batch.captions)
    assert seen >= {"a green pear", ""}


def test_contexts_are_read_where_they_are_asked_for_and_complete(
    folder: Path, section: FrozenTextConditioningConfig
) -> None:
    assert all(b.text_contexts is None for b in read(make_config(folder, "whole", section), annotations=frozenset()))
    assert all(b.text_contexts is None for b in read(make_config(folder, "none", section)))
    mixed = read(make_config(folder, "mixed", section))
    given = {None if b.cached is None else int(b.cached.sum()): b.text_contexts is not None for b in mixed}
    assert given == {held: held == 4 for held in given}
    assert any(0 < (held or 0) < 4 for held in given)


def test_members_are_one_context_a_caption(folder: Path) -> None:
    samples = read_tar(folder / "whole" / "s0.tar")
    assert array(samples["002"]["text.npy"]).shape == (2, 9, 16)
    assert array(samples["003"]["text.npy"]).shape == (1, 9, 16)
    assert "text.npy" not in samples["005"]
    assert "text.npy" not in read_tar(folder / "none" / "s0.tar")["002"]


def _train(config: Config) -> tuple[list[float], int]:
    """Losses, and how many captions went through the tower."""
    launch = env.read_launch()
    task = DiffusionTask(config, batch_plan(config, launch.world_size), env.start(launch, config.train))
    set_random_outputs(task.network, seed=3)
    assert task.tools.encode_text is not None
    encoded = 0
    encode_text = task.tools.encode_text

    def counted(captions: Any) -> torch.Tensor:
        nonlocal encoded
        encoded += len(captions)
        return encode_text(captions)

    task.tools = dataclasses.replace(task.tools, encode_text=counted)
    loader = build_loader(
        config.data,
        seed=0,
        global_batch=8,
        micro_batch=8,
        rank=0,
        world_size=1,
        accept_latents=True,
        annotations=config.conditioning.annotations,
    )
    losses = []
    for step, batch in enumerate(itertools.islice(loader, 4)):
        losses.append(float(task.accumulate([batch], 8 * step)["loss"]))
        task.update(8 * step)
    return losses, encoded


def test_training_on_contexts_is_training_on_captions(folder: Path, section: FrozenTextConditioningConfig) -> None:
    on_the_fly, from_cache = (run_ranks(_train, 1, make_config(folder, name, section))[0] for name in ("none", "whole"))
    assert on_the_fly[1] == 32
    assert from_cache[1] == 0
    assert on_the_fly[0] == pytest.approx(from_cache[0], abs=1e-3)


def _refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        _train(config)
    return str(caught.value)


def test_contexts_of_another_encoder_are_refused(folder: Path, section: FrozenTextConditioningConfig) -> None:
    config = make_config(folder, "last", section)
    message = r"holds contexts of tiny-frozen-text \(weights .{12}, last layer, 9 x 16\), conditioning\.frozen_text is"
    (refusal,) = run_ranks(_refusal, 1, config)
    assert re.search(message, refusal)
    with pytest.raises(DataError, match=r"contexts of tiny-frozen-text .* layer.* asked for is .*choose another --out"):
        encode(folder, "--dtype", "float32", *tower(section), out="last")


def test_an_architecture_without_weights_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--text-encoder ViT-H-14 with --text-weights None"):
        encode(folder, "--text-encoder", "ViT-H-14", out="half")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda good: None, "no member text.npy"),
        (lambda good: b"junk", "cannot be read"),
        (lambda good: npy(array(good)[:, :4]), "has shape"),
        (lambda good: npy(array(good).astype(np.float32)), "of float32"),
        (lambda good: npy(array(good) * np.float16("nan")), "NaN"),
    ],
)
def test_spoilt_contexts_are_named(
    folder: Path, section: FrozenTextConditioningConfig, tmp_path: Path, damage: Any, message: str
) -> None:
    (tmp_path / "data").symlink_to(folder / "data")
    (tmp_path / "artifact").symlink_to(folder / "artifact")
    encode(tmp_path, "--dtype", "float32", *tower(section))

    def change(samples: dict[str, dict[str, bytes]]) -> None:
        spoilt = damage(samples["001"].pop("text.npy"))
        if spoilt is not None:
            samples["001"]["text.npy"] = spoilt

    rewrite(tmp_path / "cache" / "manifest.json", change)
    with pytest.raises(DataError, match=rf"^s0/001: .*{message}"):
        read(make_config(tmp_path, "cache", section))
