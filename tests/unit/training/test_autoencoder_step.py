"""One step of stage 1 against plain torch.autograd: adaptive weight, both networks' gradients, the perceptual part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import Config
from ldm_scale.data import Batch
from ldm_scale.engine import env
from ldm_scale.models.autoencoder import AutoencoderOutput, kl_divergence
from ldm_scale.models.build import build_autoencoder
from ldm_scale.models.discriminator import PatchDiscriminator
from ldm_scale.models.perceptual import build_perceptual
from ldm_scale.training.autoencoder_step import AutoencoderTask
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import tiny_config

RESOLUTION = 32


def _config(**loss: Any) -> Config:
    defaults = {"chroma_weight": 0.3, "perceptual_weight": 0.7, "reconstruction_weight": 0.9}
    return tiny_config(
        "autoencoder",
        Path("unused"),
        Path("unused"),
        data={"resolution": RESOLUTION},
        autoencoder_loss=defaults | loss,
    )


def _task(config: Config) -> AutoencoderTask:
    launch = env.read_launch()
    environment = env.start(launch, config.train)
    return AutoencoderTask(config, batch_plan(config, launch.world_size), environment)


def _batch(task: AutoencoderTask) -> Batch:
    """Smooth images, so that the perceptual net sees something."""
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(task.plan.micro_batch, 3, 4, 4, generator=generator) * 2 - 1
    images = nn.functional.interpolate(coarse, size=RESOLUTION, mode="bilinear")
    numbers = torch.arange(task.plan.micro_batch) + 1_000
    count = len(images)
    return Batch(images, [""] * count, torch.full((count,), -1), ["x"] * count, numbers, [])


def _gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def _step(config: Config, images: int) -> dict[str, Any]:
    """Metrics and gradients of one step at ZeRO stage 0, whose gradients are plain ones; the weights before it."""
    task = _task(config)
    assert task.discriminator is not None
    networks = {"autoencoder": task.network, "discriminator": task.discriminator.module}
    states = {name: {k: v.clone() for k, v in n.state_dict().items()} for name, n in networks.items()}
    batch = _batch(task)
    metrics = {name: float(value) for name, value in task.accumulate([batch], images).items()}
    gradients = {name: _gradients(network) for name, network in networks.items()}
    noise = task.posterior_noise(batch.image_numbers.tolist(), "posterior")
    return {"metrics": metrics, "gradients": gradients, "states": states, "x": batch.images, "noise": noise}


def _plain(config: Config, report: dict[str, Any]) -> dict[str, Any]:
    """The same step as eq. 7 of arXiv:2012.09841 writes it: autograd.grad through the whole network."""
    loss = config.autoencoder_loss
    network = build_autoencoder(config.autoencoder)
    network.load_state_dict(report["states"]["autoencoder"])
    discriminator = PatchDiscriminator(loss.discriminator_base_channels, loss.discriminator_layers)
    discriminator.load_state_dict(report["states"]["discriminator"])
    x = report["x"]
    output = AutoencoderOutput(*network(x, report["noise"]))
    y = output.reconstruction
    perceptual = build_perceptual(loss)(y, x).mean()
    reconstruction = (
        loss.reconstruction_weight * (y - x).abs().mean()
        + loss.chroma_weight * ((y - x) - (y - x).mean(dim=1, keepdim=True)).square().mean()
        + loss.perceptual_weight * perceptual
    )
    adversarial = -discriminator(y).mean()
    last = network.decoder.conv_out.weight
    of_reconstruction, of_adversarial = (
        torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, adversarial)
    )
    weight = loss.adversarial_weight * (of_reconstruction / (of_adversarial + 1e-4)).clamp(max=loss.adaptive_weight_max)
    kl = kl_divergence(output.mean, output.logvar).mean() / y[0].numel()
    total = reconstruction + weight.detach() * adversarial + loss.kl_weight * kl
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True)
    real, fake = discriminator(x), discriminator(y.detach())
    hinge = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    discriminator_parameters = dict(discriminator.named_parameters())
    of_discriminator = torch.autograd.grad(hinge, list(discriminator_parameters.values()))
    return {
        "weight": float(weight.detach()),
        "perceptual": float(perceptual.detach()),
        "gradients": {
            "autoencoder": dict(zip(parameters, gradients, strict=True)),
            "discriminator": dict(zip(discriminator_parameters, of_discriminator, strict=True)),
        },
    }


def _assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    floor = 1e-7 * torch.nn.utils.get_total_norm(list(expected.values()))  # some gradients cancel to nothing
    for name, gradient in expected.items():
        error = torch.linalg.vector_norm(actual[name] - gradient)
        assert error <= tolerance * torch.linalg.vector_norm(gradient) + floor, name


@pytest.mark.parametrize("weight_max", [1e4, 0.01])
def test_adaptive_weight_and_gradients_are_those_of_plain_autograd(weight_max: float) -> None:
    config = _config(adaptive_weight_max=weight_max)
    report = run_ranks(_step, 1, config, 0)[0]
    plain = _plain(config, report)
    clamped = weight_max * config.autoencoder_loss.adversarial_weight
    assert (plain["weight"] == pytest.approx(clamped)) == (weight_max == 0.01), "the clamp must act in one case only"
    assert report["metrics"]["adaptive_weight"] == pytest.approx(plain["weight"], rel=1e-5)
    assert report["metrics"]["loss/perceptual"] == pytest.approx(plain["perceptual"], rel=1e-5)
    gradients = report["gradients"]
    _assert_same_gradients(gradients["autoencoder"], plain["gradients"]["autoencoder"], 1e-5)
    # Real and fake images pull in opposite directions: what is left has fewer digits.
    _assert_same_gradients(gradients["discriminator"], plain["gradients"]["discriminator"], 1e-4)


def test_before_its_start_the_discriminator_is_neither_felt_nor_trained() -> None:
    report = run_ranks(_step, 1, _config(discriminator_start_images=8), 0)[0]
    assert "adaptive_weight" not in report["metrics"]
    assert "loss/discriminator" not in report["metrics"]
    assert set(report["gradients"]["discriminator"].values()) == {None}


def _generator_part_alone(config: Config) -> list[str]:
    """Names of the discriminator's parameters that have a gradient after the generator's backward pass."""
    task = _task(config)
    assert task.discriminator is not None
    seen: list[str] = []

    def look(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        assert task.discriminator is not None
        parameters = task.discriminator.module.named_parameters()
        seen.extend(name for name, parameter in parameters if parameter.grad is not None)
        assert all(parameter.grad is not None for parameter in task.network.parameters())
        return {}

    task._backward_discriminator = look  # type: ignore[method-assign]
    task.accumulate([_batch(task)], 0)
    return seen


def test_the_generators_part_leaves_the_discriminators_gradients_alone() -> None:
    assert run_ranks(_generator_part_alone, 1, _config()) == [[]]


def test_the_perceptual_part_alone_reaches_encoder_and_decoder() -> None:
    only = {"reconstruction_weight": 0.0, "chroma_weight": 0.0, "kl_weight": 0.0, "discriminator_start_images": 8}
    gradients = run_ranks(_step, 1, _config(**only), 0)[0]["gradients"]["autoencoder"]
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
    for part in ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"):
        assert float(gradients[part].abs().max()) > 0, part
