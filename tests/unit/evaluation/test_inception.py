"""Inception features: refusals that say what to do, and the name a distance may have."""

import hashlib
import random
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ldm_scale.errors import ConfigError
from ldm_scale.evaluation import inception
from ldm_scale.evaluation.inception import InceptionFeatures
from tests.helpers.inception import write_inception


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
def test_without_weights_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=r"the usual cache has no .*/hub/checkpoints/weights-inception-2015"):
        InceptionFeatures(None)
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


@pytest.mark.usefixtures("torch_fidelity")
def test_weights_are_taken_from_the_usual_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / inception.WEIGHTS_FILE
    torch.save({}, path)
    assert InceptionFeatures(None).weights_hash == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    return path, write_inception(path)


def test_features_and_logits_are_the_networks_own(random_inception: tuple[Path, torch.nn.Module]) -> None:
    path, net = random_inception
    features = InceptionFeatures(path)
    levels = torch.randint(0, 256, (2, 3, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    expected, logits = net(levels)
    found = features.extract(levels / 127.5 - 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    made = found @ features.classifier.T
    torch.testing.assert_close(made, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())
    assert (expected[0] - expected[1]).abs().max() > 0.01 * expected.abs().max()
    assert not features.is_published


class Planted:
    """Unpickled, it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.usefixtures("torch_fidelity")
def test_what_is_opened_is_what_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody puts a pickle that runs code in the place of the file as soon as it was looked at."""
    path, load, opened = tmp_path / "weights.pth", torch.load, []
    torch.save({}, path)

    def look(file: object, **options: object) -> object:
        opened.append(file)
        found = load(file, **{"weights_only": False} | options)  # type: ignore[arg-type]
        torch.save({"x": Planted(tmp_path / "ran")}, path)
        return found

    monkeypatch.setattr(torch, "load", look)
    features = InceptionFeatures(path)
    assert not (tmp_path / "ran").exists()
    assert len(opened) == 2
    assert path not in map(Path, [name for name in opened if isinstance(name, str | Path)])
    assert features.weights_hash != hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("torch_fidelity")
def test_mutilated_pickles_are_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3), "b": [torch.ones(2)]}, tmp_path / "weights.pth")
    with zipfile.ZipFile(tmp_path / "weights.pth") as file:
        members = {name: file.read(name) for name in file.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    generator = random.Random(0)
    for _ in range(60):
        content = bytearray(members[name])
        for _ in range(3):
            content[generator.randrange(len(content))] = generator.randrange(256)
        with zipfile.ZipFile(tmp_path / "weights.pth", "w") as file:
            for member, value in (members | {name: bytes(content)}).items():
                file.writestr(member, value)
        with suppress(ConfigError):
            InceptionFeatures(tmp_path / "weights.pth")


def test_a_pickle_that_wants_more_than_tensors_is_not_opened(tmp_path: Path) -> None:
    torch.save({"Conv2d_1a_3x3.conv.weight": Planted(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"weights\.pth does not hold"):
        InceptionFeatures(tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()
