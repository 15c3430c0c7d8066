"""Per-channel statistics in the convolutions beside the latents: the same function, and the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldm_scale.interchange.artifact import Artifact
from ldm_scale.interchange.folding import FOLDED, fold, unfold
from ldm_scale.models.autoencoder import Autoencoder, LatentStatistics

# Channels as unequal as trained ones get.
STATISTICS = LatentStatistics(channel_mean=(3.0, -0.7, 0.01), channel_std=(9.0, 0.05, 1.3), num_images=8)


def loaded(artifact: Artifact, state: dict[str, torch.Tensor]) -> Autoencoder:
    network = Autoencoder(artifact.config).eval()
    network.load_state_dict(state)
    return network


def test_folded_raw_latents_are_the_latents(autoencoder_artifact: Artifact) -> None:
    ours = loaded(autoencoder_artifact, autoencoder_artifact.state)
    ours.statistics = STATISTICS
    folded = loaded(autoencoder_artifact, fold(autoencoder_artifact.state, STATISTICS))
    x, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        # A sample with noise: the log-variance has to be folded too.
        torch.testing.assert_close(folded.encode(x, noise), ours.encode(x, noise), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded.decode(noise), ours.decode(noise), rtol=1e-4, atol=1e-5)


def test_unfold_inverts_fold(autoencoder_artifact: Artifact) -> None:
    state = autoencoder_artifact.state
    folded = fold(state, STATISTICS)
    back = unfold(folded, STATISTICS)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(folded[name], tensor) == (name not in FOLDED)
        assert back[name].dtype == tensor.dtype
        assert (back[name] - tensor).norm() <= 1e-6 * tensor.norm()


@pytest.mark.parametrize("statistics", [LatentStatistics(), LatentStatistics(shift=0.5, scale=3.0)])
def test_one_scale_for_all_channels_is_not_folded(autoencoder_artifact: Artifact, statistics: LatentStatistics) -> None:
    state = autoencoder_artifact.state
    for result in (fold(state, statistics), unfold(state, statistics)):
        assert all(torch.equal(result[name], tensor) for name, tensor in state.items())


def test_statistics_belong_to_the_channels(autoencoder_artifact: Artifact) -> None:
    with pytest.raises(RuntimeError):
        fold(autoencoder_artifact.state, replace(STATISTICS, channel_mean=(0.0, 1.0), channel_std=(1.0, 1.0)))
