"""FID's Inception with random weights in a file, so that nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def write_inception(path: Path, seed: int = 0) -> FeatureExtractorInceptionV3:
    """The network whose weights `path` then holds; they keep the size of activations from layer to layer."""
    torch.manual_seed(seed)
    with (
        mock.patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", return_value={}),
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        net = FeatureExtractorInceptionV3("random", ["2048", "logits_unbiased"])
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(net.state_dict(), path)
    return net
