"""One step of stage 1 against plain torch.autograd: adaptive weight, both networks' gradients, every loss term."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_scale.config.fit import batch_plan
from ldm_scale.config.schema import AutoencoderConfig, Config
from ldm_scale.data import Batch
from ldm_scale.engine import env
from ldm_scale.models.autoencoder import AutoencoderOutput, kl_divergence
from ldm_scale.models.build import build_autoencoder
from ldm_scale.models.discriminator import PatchDiscriminator
from ldm_scale.models.perceptual import build_perceptual
from ldm_scale.training import adversary
from ldm_scale.training.autoencoder_step import AutoencoderTask
from tests.helpers.batches import make_batch
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import AUTOENCODER, tiny_config

RESOLUTION = 32
VQ = dataclasses.replace(AUTOENCODER, kind="vq", codebook_size=12)


def _config(autoencoder: AutoencoderConfig = AUTOENCODER, train: dict[str, Any] | None = None, **loss: Any) -> Config:
    defaults = {"chroma_weight": 0.3, "perceptual_weight": 0.7, "reconstruction_weight": 0.9}
    config = tiny_config(
        "autoencoder",
        Path("unused"),
        Path("unused"),
        data={"resolution": RESOLUTION},
        autoencoder_loss=defaults | loss,
        train=train or {},
    )
    return dataclasses.replace(config, autoencoder=autoencoder)


def _task(config: Config) -> AutoencoderTask:
    launch = env.read_launch()
    environment = env.start(launch, config.train)
    return AutoencoderTask(config, batch_plan(config, launch.world_size), environment)


def _batch(task: AutoencoderTask, start: int = 0) -> Batch:
    """Smooth images, so that the perceptual net sees something."""
    generator = torch.Generator().manual_seed(4 + start)
    coarse = torch.rand(task.plan.micro_batch, 3, 4, 4, generator=generator) * 2 - 1
    return make_batch(nn.functional.interpolate(coarse, size=RESOLUTION, mode="bilinear"), first_number=1_000 + start)


def _gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def _step(config: Config, images: int) -> dict[str, Any]:
    """Metrics and gradients of one step at ZeRO stage 0, whose gradients are plain ones; the weights before it."""
    task = _task(config)
    assert task.adversary is not None
    networks = {"autoencoder": task.network, "discriminator": task.adversary.model.module}
    if task.network.output_logvar is not None:
        with torch.no_grad():
            task.network.output_logvar.fill_(0.4)
    task.adversary._health[:4] = torch.tensor([100.0, 0.5, 0.3, -0.2])  # what LeCam pulls to
    states = {name: {k: v.clone() for k, v in n.state_dict().items()} for name, n in networks.items()}
    batch = _batch(task)
    metrics = {name: float(value) for name, value in task.accumulate([batch], images).items()}
    gradients = {name: _gradients(network) for name, network in networks.items()}
    noise = task.posterior_noise(batch.image_numbers.tolist(), "posterior")
    return {"metrics": metrics, "gradients": gradients, "states": states, "x": batch.images, "noise": noise}


def _plain(config: Config, report: dict[str, Any], ramp: float = 1.0) -> dict[str, Any]:
    """The same step as eq. 7 of arXiv:2012.09841 writes it: autograd.grad through the whole network."""
    loss = config.autoencoder_loss
    network = build_autoencoder(config.autoencoder)
    if loss.learned_variance:
        network.learn_output_variance()
    network.load_state_dict(report["states"]["autoencoder"])
    norm = loss.discriminator_norm
    discriminator = PatchDiscriminator(loss.discriminator_base_channels, loss.discriminator_layers, norm=norm)
    discriminator.load_state_dict(report["states"]["discriminator"])
    x = report["x"]
    output = AutoencoderOutput(*network(x, report["noise"]))
    y = output.reconstruction
    perceptual = build_perceptual(loss)(y, x).mean()
    error = F.l1_loss(y, x) if loss.reconstruction == "l1" else F.mse_loss(y, x)
    reconstruction = (
        loss.reconstruction_weight * error
        + loss.chroma_weight * ((y - x) - (y - x).mean(dim=1, keepdim=True)).square().mean()
        + loss.perceptual_weight * perceptual
    )
    if network.output_logvar is not None:
        reconstruction = reconstruction / network.output_logvar.exp() + network.output_logvar
        reconstruction = reconstruction.sum()
    logits = discriminator(y)
    adversarial = -logits.mean() if loss.adversarial_loss == "hinge" else -F.logsigmoid(logits).mean()
    last = network.decoder.conv_out.weight
    of_reconstruction, of_adversarial = (
        torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, adversarial)
    )
    weight = loss.adversarial_weight * (of_reconstruction / (of_adversarial + 1e-4)).clamp(max=loss.adaptive_weight_max)
    total = reconstruction + ramp * weight.detach() * adversarial + _plain_regularization(config, output)
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True)
    of_discriminator = _plain_discriminator(config, discriminator, x, y.detach())
    return {
        "weight": ramp * float(weight.detach()),
        "perceptual": float(perceptual.detach()),
        "gradients": {"autoencoder": dict(zip(parameters, gradients, strict=True)), "discriminator": of_discriminator},
    }


def _plain_regularization(config: Config, output: AutoencoderOutput) -> Tensor:
    loss = config.autoencoder_loss
    if output.logvar is not None:
        kl = kl_divergence(output.mean, output.logvar).mean()
        return loss.kl_weight * kl / output.reconstruction[0].numel()
    assert output.codes is not None
    to_codes = F.mse_loss(output.mean, output.codes.detach())
    of_codes = F.mse_loss(output.codes, output.mean.detach())
    return loss.commitment_weight * to_codes + loss.codebook_weight * of_codes


def _plain_discriminator(config: Config, discriminator: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    loss = config.autoencoder_loss
    x = x.clone().requires_grad_()
    real, fake = discriminator(x), discriminator(y)
    if loss.adversarial_loss == "hinge":
        total = 0.5 * ((1 - real).relu().mean() + (1 + fake).relu().mean())
    else:
        total = 0.5 * -(F.logsigmoid(real).mean() + F.logsigmoid(-fake).mean())
    if loss.r1_weight:
        per_image = [torch.autograd.grad(real[i].mean(), x, create_graph=True)[0].square().sum() for i in range(len(x))]
        total = total + loss.r1_weight / 2 * torch.stack(per_image).mean()
    if loss.lecam_weight:
        total = total + loss.lecam_weight * ((real + 0.2).square().mean() + (fake - 0.3).square().mean())
    parameters = dict(discriminator.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))


def _assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    floor = 1e-7 * torch.nn.utils.get_total_norm(list(expected.values()))  # some gradients cancel to nothing
    for name, gradient in expected.items():
        error = torch.linalg.vector_norm(actual[name] - gradient)
        assert error <= tolerance * torch.linalg.vector_norm(gradient) + floor, name


CASES: dict[str, tuple[AutoencoderConfig, dict[str, Any]]] = {
    "kl": (AUTOENCODER, {}),
    "clamped": (AUTOENCODER, {"adaptive_weight_max": 0.01}),
    "squared error, learned variance": (AUTOENCODER, {"reconstruction": "l2", "learned_variance": True}),
    "non-saturating": (AUTOENCODER, {"adversarial_loss": "non_saturating"}),
    "penalties": (AUTOENCODER, {"r1_weight": 3.0, "lecam_weight": 0.5}),
    "batch norm": (AUTOENCODER, {"discriminator_norm": "batch"}),
    "vq": (VQ, {"codebook_weight": 0.6, "commitment_weight": 0.8}),
}


@pytest.mark.parametrize("case", CASES)
def test_adaptive_weight_and_gradients_are_those_of_plain_autograd(case: str) -> None:
    autoencoder, loss = CASES[case]
    config = _config(autoencoder, **loss)
    report = run_ranks(_step, 1, config, 0)[0]
    plain = _plain(config, report)
    metrics = report["metrics"]
    assert metrics["adaptive_weight_saturated"] == (case == "clamped")
    if case == "clamped":
        assert plain["weight"] == pytest.approx(0.01 * config.autoencoder_loss.adversarial_weight)
    assert metrics["adaptive_weight"] == pytest.approx(plain["weight"], rel=1e-5)
    assert metrics["loss/perceptual"] == pytest.approx(plain["perceptual"], rel=1e-5)
    gradients = report["gradients"]
    # Batch statistics of near-constant features amplify the last bit.
    tolerance = 1e-4 if case == "batch norm" else 1e-5
    _assert_same_gradients(gradients["autoencoder"], plain["gradients"]["autoencoder"], tolerance)
    # Real and fake images pull in opposite directions: what is left has fewer digits.
    _assert_same_gradients(gradients["discriminator"], plain["gradients"]["discriminator"], 1e-4)


def test_before_it_trains_the_discriminator_is_neither_felt_nor_trained() -> None:
    report = run_ranks(_step, 1, _config(discriminator_start_images=8), 0)[0]
    assert "adaptive_weight" not in report["metrics"]
    assert "loss/discriminator" not in report["metrics"]
    assert set(report["gradients"]["discriminator"].values()) == {None}


def test_before_its_start_it_trains_without_being_felt() -> None:
    pretrained = {"discriminator_start_images": 16, "discriminator_pretrain_images": 8}
    report = run_ranks(_step, 1, _config(**pretrained), 8)[0]
    assert "adaptive_weight" not in report["metrics"]
    assert all(gradient is not None for gradient in report["gradients"]["discriminator"].values())
    alone = run_ranks(_step, 1, _config(adversarial_weight=0.5, discriminator_start_images=64), 8)[0]
    for name, gradient in alone["gradients"]["autoencoder"].items():
        assert torch.equal(report["gradients"]["autoencoder"][name], gradient), name


def test_the_weight_rises_from_the_start() -> None:
    config = _config(discriminator_start_images=16, adversarial_ramp_images=32)
    for images, ramp in ((16, 0.0), (24, 0.25), (48, 1.0), (80, 1.0)):
        report = run_ranks(_step, 1, config, images)[0]
        plain = _plain(config, report, ramp)
        assert report["metrics"]["adaptive_weight"] == pytest.approx(plain["weight"], rel=1e-5)
        _assert_same_gradients(report["gradients"]["autoencoder"], plain["gradients"]["autoencoder"], 1e-5)


def _generator_part_alone(config: Config) -> list[str]:
    """Names of the discriminator's parameters that have a gradient after the generator's backward pass."""
    task = _task(config)
    assert task.adversary is not None
    seen: list[str] = []

    def look(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        assert task.adversary is not None
        parameters = task.adversary.model.module.named_parameters()
        seen.extend(name for name, parameter in parameters if parameter.grad is not None)
        assert all(parameter.grad is not None for parameter in task.network.parameters())
        return {}

    task.adversary.backward = look  # type: ignore[method-assign]
    task.accumulate([_batch(task)], 0)
    return seen


@pytest.mark.parametrize("autoencoder", [AUTOENCODER, VQ])
def test_the_generators_part_leaves_the_discriminators_gradients_alone(autoencoder: AutoencoderConfig) -> None:
    assert run_ranks(_generator_part_alone, 1, _config(autoencoder)) == [[]]


def test_the_perceptual_part_alone_reaches_encoder_and_decoder() -> None:
    only = {"reconstruction_weight": 0.0, "chroma_weight": 0.0, "kl_weight": 0.0, "discriminator_start_images": 8}
    gradients = run_ranks(_step, 1, _config(**only), 0)[0]["gradients"]["autoencoder"]
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
    for part in ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"):
        assert float(gradients[part].abs().max()) > 0, part


def _train(config: Config, steps: int) -> list[dict[str, float]]:
    task = _task(config)
    reports = []
    for step in range(steps):
        images = step * task.plan.global_batch
        metrics = {name: float(value) for name, value in task.accumulate([_batch(task, images)], images).items()}
        reports.append(metrics | task.update(images))
    return reports


def test_the_learned_variance_is_learned() -> None:
    # With all other rates at zero effect it would sit still in peers' code: here it follows the reconstruction loss.
    config = _config(learned_variance=True, discriminator_start_images=10**6)
    reports = run_ranks(
        _train, 1, dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=0.02)), 30
    )[0]
    loss, logvar = reports[-1]["loss/reconstruction"], reports[-1]["output_logvar"]
    # The optimum of L exp(-s) + s is s = log L.
    assert logvar != 0
    assert abs(logvar - torch.tensor(loss).log()) < abs(torch.tensor(loss).log())


def _train_held(config: Config, steps: int) -> list[dict[str, float]]:
    adversary.HEALTH_HALF_LIFE_IMAGES = 16  # in this rank's own process
    return _train(config, steps)


def test_a_discriminator_that_wins_outright_waits() -> None:
    # An autoencoder that hardly learns against a discriminator that does.
    config = _config(discriminator_hold_accuracy=0.8, discriminator_lr=0.01)
    slow = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, lr=1e-7))
    reports = run_ranks(_train_held, 1, slow, 40)[0]
    held = [report["discriminator/held"] for report in reports]
    first = held.index(1.0)
    assert 0 < first < 40, "it never won: the test shows nothing"
    assert reports[first - 1]["discriminator/accuracy_smoothed"] >= 0.8
    assert all("grad_norm/discriminator" in report for report in reports[:first])
    waiting = reports[first:]
    assert all("grad_norm/discriminator" not in r for r in waiting if r["discriminator/held"])
    assert all(report["adaptive_weight"] > 0 for report in waiting), "the autoencoder goes on feeling it"
    free = run_ranks(
        _train_held,
        1,
        dataclasses.replace(
            slow, autoencoder_loss=dataclasses.replace(slow.autoencoder_loss, discriminator_hold_accuracy=None)
        ),
        40,
    )[0]
    assert not any(report["discriminator/held"] for report in free)
