"""Imports that would take longer than they need."""

from __future__ import annotations

from importlib import import_module

import torch


def import_uncompiled(name: str) -> None:
    """Nothing; the module is imported, and what it decorates with `torch.compile` stays as it is written.

    The decorator alone loads Inductor, which takes a second.
    """
    compile_, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        import_module(name)
    finally:
        torch.compile = compile_
