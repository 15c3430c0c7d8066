"""Benchmarks run from a checkout; where nothing is installed, the package of the kernels is found beside them."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("ldm_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
