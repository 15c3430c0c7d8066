from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_scale.__main__ import main
from ldm_scale.conditioning.latent_diffusion import LatentDiffusion
from ldm_scale.config.schema import DiffusionConfig, SamplingConfig
from ldm_scale.interchange.artifact import make_diffusion_artifact, read_artifact, write_diffusion_artifact
from ldm_scale.models.build import build_seeded
from tests.helpers.runs import AUTOENCODER, TEXT, UNET, set_random_outputs, tiny_artifact


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    autoencoder = read_artifact(tiny_artifact(folder / "autoencoder"))
    network = build_seeded(lambda: LatentDiffusion(UNET, TEXT, AUTOENCODER.latent_channels), seed=1)
    set_random_outputs(network, seed=2)
    artifact = make_diffusion_artifact(
        {name: tensor.detach() for name, tensor in network.state_dict().items()},
        autoencoder,
        unet=UNET,
        conditioning=TEXT,
        diffusion=DiffusionConfig(),
        sampling=SamplingConfig(num_steps=3, guidance_scale=2.0),
        provenance={"images": 0, "resolution": 16, "weights": "raw"},
    )
    write_diffusion_artifact(folder / "model", artifact)
    return folder / "model"


def _images(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


@pytest.mark.parametrize("options", [[], ["--eta", "1"], ["--sampler", "ddpm"]])
def test_image_i_depends_on_its_own_seed_and_prompt_only(model: Path, tmp_path: Path, options: list[str]) -> None:
    common = ["sample", str(model), "--device", "cpu", *options]
    together = ["--prompt", "red", "--prompt", "a blue thing", "--num-images", "3", "--seed", "7", "--batch", "2"]
    assert main([*common, *together, "--out", str(tmp_path / "a.png"), "--images-dir", str(tmp_path / "a")]) == 0
    alone = ["--prompt", "a blue thing", "--seed", "8"]
    assert main([*common, *alone, "--out", str(tmp_path / "b.png"), "--images-dir", str(tmp_path / "b")]) == 0
    first, second, third = _images(tmp_path / "a")
    (single,) = _images(tmp_path / "b")
    assert np.abs(second - single).max() <= 1  # a batch of another size may round differently
    assert np.abs(first - third).max() > 1, "same prompt, other seed: the images should differ"
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.width > grid.height


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt given"),
        (["--prompt", "x", "--batch", "0"], "--batch 0"),
        (["--prompt", "x", "--num-images", "0"], "--num-images 0"),
        (["--prompt", "x", "--steps", "2000"], "num_steps = 2000"),
        (["--prompts-file", "/no/such/file"], "cannot be read"),
    ],
)
def test_bad_arguments_are_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["sample", str(model), *arguments, "--out", str(tmp_path / "x.png")]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "x.png").exists()


def test_an_autoencoder_is_not_sampled(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["sample", str(model / "autoencoder"), "--prompt", "x", "--out", str(tmp_path / "x.png")])
    assert status == 4
    assert "holds an autoencoder" in capsys.readouterr().err


def test_prompts_come_from_a_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("eins\n\nzwei\n", encoding="utf-8")
    arguments = ["--prompts-file", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "g.png")]
    assert main(["sample", str(model), *arguments, "--images-dir", str(tmp_path / "i"), "--steps", "1"]) == 0
    assert [path.stem.partition("-")[2] for path in sorted((tmp_path / "i").glob("*.png"))] == ["eins", "zwei"]
    assert torch.is_grad_enabled()
