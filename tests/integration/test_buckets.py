"""Pictures of several shapes train together, in batches of one shape."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_scale.data.sources.tars import index_tars
from ldm_scale.engine import env
from ldm_scale.errors import ConfigError
from ldm_scale.operations.train import train
from ldm_scale.prepare import main
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_artifact, tiny_config
from tests.helpers.shards import png, write_tar

pytestmark = pytest.mark.timeout(240)


def _bucketed(folder: Path, step: int) -> Path:
    rng = np.random.default_rng(0)
    samples = []
    for number in range(48):
        size = [(40, 40), (64, 32), (32, 64)][number % 3]
        picture = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        samples.append((f"{number:03d}", {"png": png(picture), "txt": b"red bar"}))
    index_tars([write_tar(folder / "s.tar", samples)], folder / "manifest.json", "train")
    out = folder / f"buckets{step}.json"
    arguments = ["--resolution", "32", "--step", str(step), "--workers", "1"]
    assert main(["buckets", str(folder / "manifest.json"), "--out", str(out), *arguments]) == 0
    return out


def _train(config: object) -> bool:
    return train(config, env.read_launch())  # type: ignore[arg-type]


def test_both_stages_train_on_buckets(tmp_path: Path) -> None:
    manifest = _bucketed(tmp_path, 8)
    sections = {"train": {"total_images": 48}, "data": {"resolution": 32}}
    for stage in ("autoencoder", "diffusion"):
        config = tiny_config(stage, manifest, tmp_path / stage, **sections)
        if stage == "diffusion":
            tiny_artifact(Path(config.artifact))
        assert run_ranks(_train, 2, config) == [True, True]


def test_a_bucket_that_the_networks_cannot_halve_is_refused_at_the_start(tmp_path: Path) -> None:
    config = tiny_config("autoencoder", _bucketed(tmp_path, 5), tmp_path / "run", data={"resolution": 32})
    with pytest.raises(ConfigError, match=r"a bucket of \d+ x \d+ pixels, and both must be multiples of 2"):
        train(config, env.read_launch())
