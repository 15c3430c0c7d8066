"""OpenCLIP's models by name and weights, opened without surprises; whoever needs one opens it here."""

from __future__ import annotations

import logging
import os
import socket
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from ldm_scale.config.networks import TOKENIZER_VOCABULARY
from ldm_scale.errors import ConfigError


def load_open_clip(model: str, weights: str, model_key: str, weights_key: str) -> Any:
    """OpenCLIP's `CustomTextCLIP`, frozen, on the CPU in fp32; the keys are what errors call the two names.

    `weights` is a file, or OpenCLIP's name of weights that are in the usual cache or can be downloaded.
    Raises: ConfigError if there is no such model, if its weights cannot be had, or if they are another model's.
    """
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(
            f"{model_key}={model}: OpenCLIP has no architecture of that name; `python -c 'import open_clip; "
            "print(open_clip.list_models())'` lists them"
        )
    published = open_clip.get_pretrained_cfg(model, weights)
    if not published and not os.path.isfile(weights):
        raise ConfigError(
            f"{weights_key}={weights}: neither a file nor weights that OpenCLIP knows of {model} "
            f"({', '.join(open_clip.list_pretrained_tags_by_model(model)) or 'none'}); give one of them"
        )
    # OpenCLIP only warns: what the other activation gives is wrong and looks right.
    if published and published.get("quick_gelu", False) != config.get("quick_gelu", False):
        raise ConfigError(
            f"{model_key}={model}: the weights {weights} were trained with the other GELU; set "
            f"{model_key}={_other_gelu(model)}"
        )
    try:
        with _quietly(), _offline_if_so():
            network: Any = open_clip.create_model(
                model, pretrained=weights, precision="fp32", device="cpu", force_custom_text=True
            )
    except Exception as error:  # a hub's, a file's, a state dict's: of many types, all the same to the user
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder="...")
        raise ConfigError(
            f"{weights_key}={weights}: cannot be loaded into {model} ({reason}); give the path of a file of OpenCLIP "
            "weights, or put them into the usual cache on a machine with a network"
        ) from error
    return network.eval().requires_grad_(False)


def text_tower_size(model: str) -> tuple[int, int]:
    """Layers and width of the text tower of an OpenCLIP architecture; no weights are opened.

    Raises: ConfigError if there is no such model.
    """
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None or "layers" not in config.get("text_cfg", {}):
        raise ConfigError(
            f"conditioning.frozen_text.model={model}: OpenCLIP has no text tower of that name with a known size; "
            "`python -c 'import open_clip; print(open_clip.list_models())'` lists its models"
        )
    return int(config["text_cfg"]["layers"]), int(config["text_cfg"]["width"])


def text_tower_parameters(model: str) -> int:
    """Weights of that tower, by its sizes: attention and MLP of each layer, and the tokens' embeddings.

    Raises: ConfigError as `text_tower_size`.
    """
    layers, width = text_tower_size(model)
    return 12 * layers * width**2 + TOKENIZER_VOCABULARY * width


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings and log lines of what the error then says in one."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _offline_if_so() -> Iterator[None]:
    """The hub's library looks into its cache at once where there is no network: it would retry for two minutes."""
    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
            yield
    else:
        yield


def _other_gelu(model: str) -> str:
    suffix = "-quickgelu"
    return model.removesuffix(suffix) if model.endswith(suffix) else model + suffix
