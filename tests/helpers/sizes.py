"""Configurations and their sizes, each made once in a test process: that takes a quarter of a second, and seconds."""

from __future__ import annotations

from functools import cache

from ldm_scale.config.compose import load_config
from ldm_scale.config.schema import Config
from ldm_scale.planning.flops import RunSize, measure_run


@cache
def composed(*overrides: str) -> Config:
    """`load_config` of overrides; a configuration cannot be changed."""
    return load_config(overrides)


@cache
def measured(*overrides: str) -> RunSize:
    """`measure_run` of a configuration."""
    return measure_run(composed(*overrides))
