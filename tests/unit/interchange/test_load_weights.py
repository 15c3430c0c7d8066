"""The choice of weights: kept averages, reconstructed ones against closed forms, and what an artifact cannot give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldm_scale import __main__ as program
from ldm_scale.config.convert import config_to_dict
from ldm_scale.config.schema import Config, DataConfig
from ldm_scale.engine.folder_write import write_folder
from ldm_scale.engine.power_profiles import exponent_of
from ldm_scale.engine.rank_files import Piece
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.artifact import Artifact, read_artifact, write_artifact
from ldm_scale.interchange.load import load_autoencoder, read_source
from ldm_scale.models.autoencoder import OUTPUT_LOGVAR

KEPT = (0.05, 0.1)
TOTAL, EVERY = 6400, 400


def _growth(std: float, images: int) -> float:
    """The average of t / TOTAL up to `images`: the weights of these runs grow in proportion to the images seen."""
    gamma = exponent_of(std)
    return images / TOTAL * (gamma + 1) / (gamma + 2)


@pytest.fixture
def run(tmp_path: Path, autoencoder_artifact: Artifact) -> Path:
    """A stage-1 run whose weights at t images are t / TOTAL of the artifact's."""
    a = autoencoder_artifact
    config = Config(stage="autoencoder", autoencoder=a.config, data=DataConfig(resolution=16))
    state = a.state | {OUTPUT_LOGVAR: torch.ones(1)}
    content = {"models": {"autoencoder": {"optimizer_steps": 8}}, "state": {}, "config": config_to_dict(config)}

    def write(folder: str, images: int, kinds: dict[str, float]) -> None:
        pieces = [
            Piece("autoencoder", kind, name, tuple(tensor.shape), 0, scale * tensor.flatten())
            for kind, scale in kinds.items()
            for name, tensor in state.items()
        ]
        write_folder(tmp_path / "run" / folder, images, 0, pieces, content)

    averages = [(images, {f"ema={std}": _growth(std, images) for std in KEPT}) for images in range(EVERY, 8000, EVERY)]
    for images, kinds in averages:
        write("snapshots", images, kinds)
        if images == TOTAL:
            write("checkpoints", images, {"weight": 1.0} | kinds)
    return tmp_path / "run"


def _scale(loaded: dict[str, Tensor], artifact: Artifact) -> float:
    """How much of the artifact's weights these are; the same share of all of them."""
    name = next(name for name, tensor in artifact.state.items() if tensor.dim() > 1)
    return float((loaded[name] / artifact.state[name]).median())


@pytest.mark.parametrize(
    ("weights", "held", "expected"),
    [
        (None, "ema=0.05", _growth(0.05, TOTAL)),
        ("raw", "raw", 1.0),
        ("ema=0.10", "ema=0.1", _growth(0.1, TOTAL)),
        ("ema=0.07", "ema=0.07", _growth(0.07, TOTAL)),
        ("ema=.03", "ema=0.03", _growth(0.03, TOTAL)),
        ("ema=0.2", "ema=0.2", _growth(0.2, TOTAL)),
    ],
)
def test_weights_by_name(
    run: Path, autoencoder_artifact: Artifact, weights: str | None, held: str, expected: float
) -> None:
    artifact = read_source(run, weights)
    assert artifact.provenance["weights"] == held
    assert _scale(artifact.state, autoencoder_artifact) == pytest.approx(expected, abs=2e-3)
    assert load_autoencoder(run, weights).content_hash == artifact.content_hash


def test_names_and_averages_that_are_not_there_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no EMA of autoencoder .*; use raw or ema=0.05 or ema=0.1 weights"):
        load_autoencoder(run, "ema")
    with pytest.raises(CheckpointError, match=r"ema=0.004 cannot be reconstructed"):
        load_autoencoder(run, "ema=0.004")
    with pytest.raises(ConfigError, match=r"weights average: must be raw, ema or ema=STD"):
        load_autoencoder(run, "average")
    a = read_source(run, "ema=0.07")
    assert isinstance(a, Artifact)
    write_artifact(tmp_path / "artifact", a.state, a.config, a.statistics, a.provenance)
    assert load_autoencoder(tmp_path / "artifact", "ema=0.070").content_hash == a.content_hash
    with pytest.raises(ConfigError, match=r"--weights raw: .*artifact holds ema=0.07 weights alone"):
        load_autoencoder(tmp_path / "artifact", "raw")


def test_an_export_of_reconstructed_weights(
    run: Path, tmp_path: Path, autoencoder_artifact: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "out"), "--json"]
    assert program.main([*arguments, "--weights", "ema=0.07"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "autoencoder"
    exported = read_artifact(tmp_path / "out")
    assert exported.provenance["weights"] == "ema=0.07"
    assert _scale(exported.state, autoencoder_artifact) == pytest.approx(_growth(0.07, TOTAL), abs=2e-4)
    assert program.main([*arguments, "--weights", "ema=2"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "weights ema=2: must be raw, ema or ema=STD with STD above 0 and at most 0.28" in line
