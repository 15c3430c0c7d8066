"""ldm-scale: latent diffusion models from scratch, one code path from two CPU cores to a Slurm cluster of GPUs.

Importing the package starts nothing and loads neither torch nor DeepSpeed: the loaders come on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm_scale.interchange.classifier import load_classifier
    from ldm_scale.interchange.load import load_autoencoder, load_diffusion

__version__ = "0.1.0"
__all__ = ["__version__", "load_autoencoder", "load_classifier", "load_diffusion"]


def __getattr__(name: str) -> Any:
    if name in ("load_autoencoder", "load_diffusion"):
        return getattr(import_module("ldm_scale.interchange.load"), name)
    if name == "load_classifier":
        return import_module("ldm_scale.interchange.classifier").load_classifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
