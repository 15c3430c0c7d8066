"""Sizes of configurations, each counted once in a test run: that takes seconds."""

from __future__ import annotations

from functools import cache

from ldm_scale.config.compose import load_config
from ldm_scale.planning.flops import RunSize, measure_run


@cache
def measured(*overrides: str) -> RunSize:
    """`measure_run` of a configuration."""
    return measure_run(load_config(overrides))
