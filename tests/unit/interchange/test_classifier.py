"""A loaded classifier: its gradient, what it fits and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm_scale.conditioning.base import Conditions
from ldm_scale.config.schema import ClassifierConfig, ConditioningConfig, Config, DiffusionConfig
from ldm_scale.errors import CheckpointError, ConfigError
from ldm_scale.interchange.classifier import LoadedClassifier, load_classifier
from ldm_scale.interchange.load import LoadedDiffusion, load_diffusion
from ldm_scale.models.build import build_seeded
from ldm_scale.models.classifier import LatentClassifier
from tests.helpers.models import tiny_model
from tests.helpers.runs import AUTOENCODER, UNET, set_random_outputs

NAMES = ("1", "0", "blue")  # numbers as names: names go first
NUM_CLASSES = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedDiffusion:
    return load_diffusion(tiny_model(tmp_path_factory.mktemp("classifier"), ConditioningConfig()))


def _classifier(content_hash: str, **diffusion: Any) -> LoadedClassifier:
    config = Config(
        stage="classifier",
        autoencoder=AUTOENCODER,
        unet=dataclasses.replace(UNET, attention="self"),
        classifier=ClassifierConfig(num_classes=NUM_CLASSES, pool_head_dim=8),
        diffusion=DiffusionConfig(**diffusion),
    )
    network = build_seeded(lambda: LatentClassifier(config.unet, config.classifier, 3), seed=1)
    set_random_outputs(network, seed=2)
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    return LoadedClassifier(config, state, content_hash, NAMES, "runs/known")


@pytest.mark.parametrize("prediction", ["eps", "edm", "flow"])
def test_the_gradient_is_that_of_finite_differences(prediction: str) -> None:
    classifier = _classifier("hash", prediction=prediction)
    classifier.network.double()
    classes = torch.tensor([2, 0])
    t = classifier.process.evaluation_times(torch.tensor([0.3, 0.8]))
    generator = torch.Generator().manual_seed(0)
    z, direction = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    log_p = classifier.log_probability(z, t, classes)
    assert log_p.shape == (2,)
    (gradient,) = torch.autograd.grad(log_p.sum(), z)
    # log_probability ends in float32.
    step = 1e-2
    ahead, behind = (classifier.log_probability(z + sign * step * direction, t, classes) for sign in (1, -1))
    expected = (ahead - behind).detach().double() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(dim=(1, 2, 3)), expected, rtol=1e-2, atol=1e-4)


def test_probabilities_of_all_classes_sum_to_one() -> None:
    classifier = _classifier("hash")
    z, t = torch.randn(NUM_CLASSES, 3, 4, 4)[:1].expand(NUM_CLASSES, 3, 4, 4), torch.full((NUM_CLASSES,), 300)
    log_p = classifier.log_probability(z, t, torch.arange(NUM_CLASSES))
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(log_p.std()) > 1e-4


def test_classes_are_named_or_numbered() -> None:
    classifier = _classifier("hash")
    assert classifier.class_numbers(["Blue", "0", "3", 0]).tolist() == [2, 1, 3, 0]
    with pytest.raises(ConfigError, match="--class 'green': neither a name nor a number from 0 to 3"):
        classifier.class_numbers(["green"], "--class")
    with pytest.raises(ConfigError, match="class 4: the classifier runs/known has 0 to 3"):
        classifier.class_numbers([4])


def test_a_guide_pulls_every_image_towards_its_own_class(model: LoadedDiffusion) -> None:
    classifier = _classifier(model.autoencoder.content_hash)
    both = model.sample(Conditions(), seeds=[0, 1], guide=classifier.guide(model, ["blue", 0], 200.0))
    one = model.sample(Conditions(), seeds=[1], guide=classifier.guide(model, torch.tensor([0]), 200.0))
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)
    plain = model.sample(Conditions(), seeds=[0, 1])
    assert (plain - both).abs().amax(dim=(1, 2, 3)).min() > 1e-2
    with pytest.raises(ConfigError, match="1 classes to guide towards and 2 images: give one per image"):
        model.sample(Conditions(), seeds=[0, 1], guide=classifier.guide(model, [0], 1.0))


def test_a_classifier_fits_latents_and_noise_whatever_is_predicted(model: LoadedDiffusion) -> None:
    content_hash = model.autoencoder.content_hash
    for prediction in ("eps", "v", "x0"):
        _classifier(content_hash, prediction=prediction).check_fits(model)
    _classifier(content_hash, weighting="min_snr", noise_offset=0.1).check_fits(model)
    with pytest.raises(ConfigError, match=r"runs/known knows latents of the autoencoder another, the model's is"):
        _classifier("another").check_fits(model)
    for other in (
        {"prediction": "edm"},
        {"prediction": "flow"},
        {"beta_end": 0.0121},
        {"schedule": "cosine"},
        {"num_timesteps": 500},
    ):
        with pytest.raises(ConfigError, match="trained with another forward process than the model"):
            _classifier(content_hash, **other).guide(model, [0])


@pytest.mark.parametrize(("prediction", "changes"), [("edm", {"sigma_data": 0.4, "sigma_max": 40.0}), ("flow", {})])
def test_without_timesteps_the_process_has_no_parameter(
    tmp_path: Path, prediction: str, changes: dict[str, Any]
) -> None:
    diffusion = DiffusionConfig(prediction=prediction)  # type: ignore[arg-type]
    model = load_diffusion(tiny_model(tmp_path, ConditioningConfig(), diffusion=diffusion, sampler="euler"))
    _classifier(model.autoencoder.content_hash, prediction=prediction, **changes).check_fits(model)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint: give the run_dir of a run with stage=cla"):
        load_classifier(tmp_path)
