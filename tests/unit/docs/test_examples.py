"""Python in the documentation runs, block by block, against tiny models that lie where the pages say."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import ldm_scale.interchange.classifier
from ldm_scale import load_diffusion
from ldm_scale.config.schema import ClassifierConfig, ConditioningConfig, Config, InpaintingConditioningConfig
from ldm_scale.interchange.classifier import LoadedClassifier
from ldm_scale.models.build import build_seeded
from ldm_scale.models.classifier import LatentClassifier
from tests.helpers.documents import Block, blocks, pages
from tests.helpers.models import SIDE, tiny_model
from tests.helpers.runs import TEXT, UNET, tiny_artifact

BLOCKS = [block for path in pages() for block in blocks(path) if block.language == "python" and block.runs]
# Runs that pages speak of: what their models are conditioned on.
RUNS = {
    "runs/ldm": ConditioningConfig(text=TEXT),
    "runs/demo_text": ConditioningConfig(text=TEXT),
    "runs/inpaint": ConditioningConfig(text=TEXT, inpainting=InpaintingConditioningConfig()),
    "runs/faces": ConditioningConfig(),
}
AUTOENCODERS = ("runs/ae", "runs/demo_autoencoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/ as a reader of the documentation has it."""
    root = tmp_path_factory.mktemp("examples")
    (root / "runs").mkdir()
    for name, conditioning in RUNS.items():
        (root / name).symlink_to(tiny_model(root / "made" / name, conditioning))
    for name in AUTOENCODERS:
        tiny_artifact(root / name)
    return root


def _given(page: str) -> dict[str, Any]:
    """What the examples of a page take for granted."""
    if page.startswith("kernels/"):
        channels = torch.rand(3, 64)
        return {"x": torch.rand(2, 64, 4, 4), "weight": channels[0], "bias": channels[1], "time_shift": channels[1:]}
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 4:8, 4:8] = 1
    return {"x": torch.rand(1, 3, SIDE, SIDE) * 2 - 1, "m": mask}


@pytest.fixture
def a_classifier(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_classifier("runs/ages")` gives an untrained one of the artifact of runs/faces."""
    autoencoder = load_diffusion(folder / "runs/faces").autoencoder
    config = Config(
        stage="classifier",
        autoencoder=autoencoder.config,
        unet=dataclasses.replace(UNET, attention="self"),
        classifier=ClassifierConfig(num_classes=4, pool_head_dim=16),
    )
    channels = autoencoder.config.latent_channels
    network = build_seeded(lambda: LatentClassifier(config.unet, config.classifier, channels), 4)
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    classifier = LoadedClassifier(config, state, autoencoder.content_hash, ["child", "young", "old"], "runs/ages")
    monkeypatch.setattr(ldm_scale.interchange.classifier, "load_classifier", {"runs/ages": classifier}.__getitem__)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
@pytest.mark.usefixtures("a_classifier")
def test_an_example_runs(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    # Line numbers of a failure are those of the page.
    code = compile("\n" * (block.line - 1) + block.text, block.page, "exec")
    exec(code, _given(block.page))


def test_the_examples_are_found() -> None:
    assert {"README.md", "docs/quickstart.md", "docs/sampling.md", "kernels/README.md"} <= {b.page for b in BLOCKS}
    assert len(BLOCKS) >= 6


def test_an_example_that_is_not_run_says_why() -> None:
    left = [block for path in pages() for block in blocks(path) if block.language == "python" and not block.runs]
    assert "docs/data.md" in {block.page for block in left}
    assert all(block.language != "py" for path in pages() for block in blocks(path))
