"""Inception features of FID, from the torch-fidelity package and a file of weights: nothing is downloaded.

A Frechet distance is an FID only on these features, with the weights that everybody uses and their resize, which is
TensorFlow 1's and differs from torch's. With other weights the number keeps a name of its own.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ldm_scale.errors import ConfigError

WEIGHTS_FILE = "weights-inception-2015-12-05-6726825d.pth"
_STANDARD_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NUM_FEATURES = 2048


def usual_cache() -> Path:
    """Where torch-fidelity keeps the weights once it has downloaded them; here nothing is downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS_FILE


def _damaged(path: Path, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ConfigError(f"--features-weights {path} does not hold {WEIGHTS_FILE}'s tensors ({reason}): give that file")


class InceptionFeatures:
    """Turns images into the (2048,) vectors that FID is made of; without a path, with weights in the usual cache.

    Raises: ConfigError if torch-fidelity or the weights are missing, or do not fit together.
    """

    def __init__(self, weights_path: Path | None, device: torch.device | str = "cpu") -> None:
        if find_spec("torch_fidelity") is None:
            raise ConfigError(
                "--features inception_v3 needs torch-fidelity's network, which this environment lacks: "
                "pip install torch-fidelity (or 'ldm-scale[evaluation]'), or use --features efficientnet_lite0, which "
                "is installed"
            )
        if weights_path is None:
            weights_path = usual_cache()
            found = f"no file was named, and the usual cache has no {weights_path}"
        else:
            found = f"there is no file {weights_path}"
        if not weights_path.is_file():
            raise ConfigError(
                f"--features inception_v3 needs FID's weights, but {found}: give --features-weights the path of "
                f"torch-fidelity's {WEIGHTS_FILE} (from its releases page)"
            )
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        content = weights_path.read_bytes()  # once: hash, check and network are of the same bytes
        self.weights_hash = hashlib.sha256(content).hexdigest()
        try:
            tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # a mutilated pickle's are of many types
            raise _damaged(weights_path, error) from error
        # The package unpickles whatever its file holds. It is given a file that nobody else can write, made from the
        # tensors: what lies at the path may have become another file meanwhile.
        with tempfile.TemporaryDirectory(prefix="ldm-scale-") as folder:
            private = Path(folder) / WEIGHTS_FILE
            torch.save(tensors, private)
            try:
                net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(private))
            except (RuntimeError, TypeError, AttributeError, ValueError, LookupError) as error:
                raise _damaged(weights_path, error) from error
        self._device = torch.device(device)
        self._net = net.eval().to(self._device)

    @property
    def is_published(self) -> bool:
        """Whether the weights are those that everybody's FID is made with."""
        return self.weights_hash == _STANDARD_SHA256

    @property
    def network(self) -> str:
        """What reports call the network."""
        return "InceptionV3" if self.is_published else f"InceptionV3-{self.weights_hash[:8]}"

    @property
    def name(self) -> str:
        """What reports call a Frechet distance of reconstructions on these features."""
        return "rFID" if self.is_published else f"FD-{self.network}"

    @property
    def classifier(self) -> Tensor:
        """(1008, 2048) weights: features times them are the logits without bias, of which Inception scores are made."""
        weight: Tensor = self._net.fc.weight
        return weight.detach().cpu()

    @property
    def protocol(self) -> dict[str, str | int]:
        """What a number made from these features depends on, to be written beside it."""
        return {
            "features": "Inception v3 of 2015-12-05, 2048 activations averaged over space",
            "pixels": "clamped to [-1, 1], rounded to 8 bits",
            "resize": "TensorFlow 1 bilinear",
            "resolution": 299,
        }

    @torch.inference_mode()
    def extract(self, images: Tensor) -> Tensor:
        """Features of one batch. Shapes: (B, 3, H, W) in [-1, 1]; returns (B, 2048) fp32 on the CPU."""
        levels = ((images.to(self._device).float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        features: Tensor = self._net(levels)[0].float().cpu()
        return features
