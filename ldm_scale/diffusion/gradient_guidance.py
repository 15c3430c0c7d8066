"""Guidance by gradients: sampling is pulled towards latents to which some differentiable model gives a high log p.

By Bayes' rule the score of p(z_t | y) is that of p(z_t) plus the gradient of log p(y | z_t), and the noise is the score
times -sigma (arXiv:2105.05233, section 4.2). So one rule serves all: eps moves by -scale sigma gradient, whatever the
network's output means, with any sampler and around any other guidance. Two sources of the gradient: a model that was
trained on noised latents, and one that has seen clean pictures alone, which then judges the predicted clean latents,
through the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_scale.diffusion.guidance import Denoiser
from ldm_scale.diffusion.process import Process, expand_like

NoisedLogProb = Callable[[Tensor, Tensor], Tensor]  # (z_t (B, c, h, w), t (B,)) -> log p(y | z_t) (B,)
CleanLogProb = Callable[[Tensor], Tensor]  # z_0 (B, c, h, w) -> log p(y | z_0) (B,)


def classifier_guided(denoiser: Denoiser, process: Process, log_prob: NoisedLogProb, scale: float) -> Denoiser:
    """The denoiser under the gradient of a model of noised latents; the denoiser itself keeps no graph.

    Source: arXiv:2105.05233, algorithm 2 (there for eps).
    """

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        output = denoiser(z_t, t)
        with torch.enable_grad():
            z = z_t.detach().requires_grad_()
            gradient = _gradient(log_prob(z, t), z)
        return _moved(process, output, gradient, t, scale)

    return predict if scale != 0.0 else denoiser


def prediction_guided(denoiser: Denoiser, process: Process, log_prob: CleanLogProb, scale: float) -> Denoiser:
    """The denoiser under the gradient of a model of clean latents, asked about its prediction x0(z_t).

    The gradient passes through the denoiser: time and memory of a training step without weights' gradients.
    Source: arXiv:2112.10752, appendix C, eq. 16; arXiv:2302.07121, section 3.2 (forward guidance).
    """

    def predict(z_t: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z_t.detach().requires_grad_()
            output = denoiser(z, t)
            gradient = _gradient(log_prob(process.x0(z, output, t)), z)
        return _moved(process, output.detach(), gradient, t, scale)

    return predict if scale != 0.0 else denoiser


def _gradient(log_prob: Tensor, z: Tensor) -> Tensor:
    """Of every image's log p with respect to its own latents. Shapes: log_prob (B,), z and the result (B, c, h, w)."""
    assert log_prob.shape == z.shape[:1], f"log p of shape {tuple(log_prob.shape)} for {len(z)} images"
    return torch.autograd.grad(log_prob.sum(), z)[0]


def _moved(process: Process, output: Tensor, gradient: Tensor, t: Tensor, scale: float) -> Tensor:
    """The output that stands for eps - scale sigma gradient."""
    _, sigma = process.coefficients(t)
    # eps is linear in the output: what it makes of 1 at z_t = 0 is the slope. Without signal it is 0 (v, at zero
    # terminal SNR), x0 is all that the output says, and noise has no gradient to be guided by.
    one = output.new_ones(len(t), *(1,) * (output.ndim - 1))
    slope = process.eps(torch.zeros_like(one), one, t)
    change = -scale * expand_like(sigma, gradient) * gradient
    return torch.where(slope == 0.0, output, output + change / slope)
