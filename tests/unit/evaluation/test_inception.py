"""Inception features: refusals that say what to do, and the name a distance may have."""

import hashlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ldm_scale.errors import ConfigError
from ldm_scale.evaluation import inception
from ldm_scale.evaluation.inception import InceptionFeatures


@pytest.fixture
def torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the package's interface: per-channel means of the bytes."""

    class Network(torch.nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str) -> None:
            super().__init__()
            assert features_list == ["2048"]
            self.load_state_dict(torch.load(feature_extractor_weights_path))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            assert x.dtype == torch.uint8
            return (x.float().mean(dim=(2, 3)),)

    package, module = ModuleType("torch_fidelity"), ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    monkeypatch.setattr(inception, "find_spec", lambda name: object())


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install torch-fidelity"):
        InceptionFeatures(Path("weights.pth"))


@pytest.mark.usefixtures("torch_fidelity")
def test_without_weights_nothing_is_downloaded(tmp_path: Path) -> None:
    for path in (None, tmp_path / "absent.pth"):
        with pytest.raises(ConfigError, match="--features-weights the path of"):
            InceptionFeatures(path)
    (tmp_path / "other.pth").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"other.pth does not hold"):
        InceptionFeatures(tmp_path / "other.pth")


@pytest.mark.usefixtures("torch_fidelity")
def test_only_the_standard_weights_make_an_rfid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    features = InceptionFeatures(path)
    assert features.weights_hash == digest
    assert features.name == f"FD-InceptionV3-{digest[:8]}"
    monkeypatch.setattr(inception, "_STANDARD_SHA256", digest)
    assert features.name == "rFID"
    images = torch.tensor([-2.0, 0.105, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    assert features.extract(images)[:, 0].tolist() == [0, 141, 255]
