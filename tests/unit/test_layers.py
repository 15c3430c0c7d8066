"""Who may import whom (CONTRIBUTING.md, "Layers"), read from the sources: imports inside functions count too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# From the lowest to the highest. A module may import what stands in lower rows and what belongs to its own entry;
# neighbours in a row do not know each other. An entry stands for the module or the package of that name.
LAYERS = (
    ("ldm_scale.errors", "ldm_scale.redaction", "ldm_scale.config.schema"),
    ("ldm_scale.config.convert", "ldm_scale.config.ranges", "ldm_scale.config.fit", "ldm_scale.command_line"),
    ("ldm_scale.config.networks", "ldm_scale.config.origin"),
    ("ldm_kernels", "ldm_scale.diffusion"),
    ("ldm_scale.telemetry", "ldm_scale.faults", "ldm_scale.processes"),
    ("ldm_scale.data", "ldm_scale.engine"),
    ("ldm_scale.models",),
    ("ldm_scale.conditioning",),
    ("ldm_scale.interchange",),
    ("ldm_scale.evaluation", "ldm_scale.planning"),
    ("ldm_scale.training",),
    ("ldm_scale.operations",),
    ("ldm_scale.config.validate", "ldm_scale.config.compose"),
    ("ldm_scale.__main__",),
)
# Files directly in ldm_scale/ that no entry names are commands: above everything, and strangers to each other.
COMMANDS = len(LAYERS)

# One owner per library. "commands" are the files directly in ldm_scale/.
OWNERS = {
    "hydra": {"ldm_scale.config.compose", "commands"},
    "omegaconf": {"ldm_scale.config.compose", "commands"},
    "deepspeed": {"ldm_scale.engine"},
    "webdataset": {"ldm_scale.data"},
    "triton": {"ldm_kernels"},
    "xformers": {"ldm_kernels"},
    "tensorboard": {"ldm_scale.telemetry"},
    "torch.utils.tensorboard": {"ldm_scale.telemetry"},
    "diffusers": {"ldm_scale.interchange"},
    "transformers": {"ldm_scale.interchange"},
    "accelerate": {"ldm_scale.interchange"},
}
# What these see besides the standard library and themselves.
CLOSED = {
    "ldm_kernels": {"torch", "triton", "xformers"},
    "ldm_scale.diffusion": {"torch", "ldm_scale.errors", "ldm_scale.config.schema"},
    "ldm_scale.errors": set(),
    "ldm_scale.redaction": set(),
    "ldm_scale.config.schema": set(),
    "ldm_scale.config.convert": {"ldm_scale"},
    "ldm_scale.config.ranges": {"ldm_scale"},
    "ldm_scale.config.fit": {"ldm_scale"},
    "ldm_scale.config.networks": {"ldm_scale"},
    "ldm_scale.config.origin": {"ldm_scale"},
}


def _within(module: str, entry: str) -> bool:
    return module == entry or module.startswith(entry + ".")


def _find_sources(root: Path) -> dict[str, Path]:
    """Module name -> file, for both import packages of a checkout."""
    sources = {}
    for base, package in ((root, "ldm_scale"), (root / "kernels", "ldm_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return sources


def _imports(module: str, path: Path, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in the file it does."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, source] if source else above)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                # `from package import module` is an import of the module.
                yield node.lineno, full if full in modules or full in OWNERS else source
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def _entry(module: str) -> tuple[int, str] | None:
    """Row and entry of a module of ours; None where nothing in the table covers it."""
    for row, entries in enumerate(LAYERS):
        for entry in entries:
            if _within(module, entry):
                return row, entry
    if module.count(".") == 1 and module.startswith("ldm_scale."):
        return COMMANDS, module
    return None


def find_breaches(root: Path) -> list[str]:
    """One line per import that the tables forbid, and per module that they do not cover."""
    sources = _find_sources(root)
    packages = {module for module, path in sources.items() if path.name == "__init__.py"}
    breaches = []
    for module, path in sources.items():
        entry = _entry(module)
        for line, target in dict.fromkeys(_imports(module, path, set(sources))):
            reason = _why_forbidden(module, entry, target, packages)
            if reason:
                breaches.append(f"{path.relative_to(root)}:{line}: {module} imports {target}: {reason}")
        # The two packages' own files are the public face of what lies below them.
        if entry is None and module not in ("ldm_scale", "ldm_scale.config"):
            breaches.append(f"{path.relative_to(root)}: {module} has no row in LAYERS")
    return breaches


def _why_forbidden(module: str, entry: tuple[int, str] | None, target: str, packages: set[str]) -> str:
    top = target.partition(".")[0]
    if top in sys.stdlib_module_names:
        return ""
    row, name = entry if entry else (COMMANDS, module)
    owner_name = "commands" if row == COMMANDS else name
    for library, owners in OWNERS.items():
        if _within(target, library) and owner_name not in owners:
            return f"{library} belongs to {' and '.join(sorted(owners))}"
    allowed = CLOSED.get(name)
    if allowed is not None and not _within(target, name) and not any(_within(target, a) for a in allowed):
        return f"{name} sees only {', '.join(sorted(allowed)) or 'the standard library'}"
    if top not in ("ldm_scale", "ldm_kernels") or target == "ldm_scale":
        return ""  # `from ldm_scale import __version__` loads nothing that is not loaded already
    target_entry = _entry(target)
    if target_entry is None:
        return "" if target in packages else "there is no such module"
    target_row, target_name = target_entry
    if target_name == name or target_row < row:
        return ""
    return "both are of one layer" if target_row == row else f"{target_name} is above {name}"


def test_no_import_breaches_the_layers() -> None:
    assert not find_breaches(ROOT), "\n" + "\n".join(find_breaches(ROOT))


def test_the_walk_sees_the_project() -> None:
    sources = _find_sources(ROOT)
    assert {"ldm_scale.errors", "ldm_scale.config.compose", "ldm_kernels"} <= set(sources)
    imported = {t for m, p in sources.items() for _, t in _imports(m, p, set(sources))}
    assert {"hydra", "torch", "ldm_scale.errors"} <= imported


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("ldm_scale/models/x.py", "from ldm_scale.training import trainer", "ldm_scale.training is above"),
        ("ldm_scale/data/x.py", "import ldm_scale.engine.env", "both are of one layer"),
        ("ldm_scale/engine/x.py", "from ..data import shards", "both are of one layer"),
        ("ldm_scale/models/x.py", "def f():\n    import deepspeed", "deepspeed belongs to ldm_scale.engine"),
        ("ldm_scale/data/x.py", "if True:\n    from hydra.utils import call", "hydra belongs to"),
        ("ldm_scale/engine/x.py", "from torch.utils import tensorboard", "belongs to ldm_scale.telemetry"),
        ("ldm_scale/engine/x.py", "from torch.utils.tensorboard import SummaryWriter", "belongs to"),
        ("ldm_scale/models/x.py", "import triton.language as tl", "triton belongs to ldm_kernels"),
        ("ldm_scale/x.py", "import diffusers", "diffusers belongs to ldm_scale.interchange"),
        ("ldm_scale/x.py", "from ldm_scale.train import main", "both are of one layer"),
        ("ldm_scale/diffusion/x.py", "import numpy", "ldm_scale.diffusion sees only"),
        ("ldm_scale/diffusion/x.py", "import ldm_kernels", "ldm_scale.diffusion sees only"),
        ("ldm_scale/config/schema.py", "import torch", "sees only the standard library"),
        ("ldm_scale/config/new.py", "", "has no row in LAYERS"),
        ("ldm_scale/models/x.py", "import importlib\nimportlib.import_module('ldm_scale.plan')", "is above"),
        ("ldm_scale/operations/x.py", "from ldm_scale.config import compose", "ldm_scale.config.compose is above"),
        ("kernels/ldm_kernels/x.py", "from ldm_scale import errors", "ldm_kernels sees only"),
        ("kernels/ldm_kernels/x.py", "import numpy", "ldm_kernels sees only"),
    ],
)
def test_a_planted_breach_is_found(tmp_path: Path, module: str, line: str, expected: str) -> None:
    for name in (*_STANDING, module):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / module).write_text(line + "\n")
    breaches = find_breaches(tmp_path)
    assert len(breaches) == 1, breaches
    assert expected in breaches[0]
    assert breaches[0].startswith(module)


_STANDING = (
    "ldm_scale/__init__.py",
    "ldm_scale/errors.py",
    "ldm_scale/plan.py",
    "ldm_scale/train.py",
    "ldm_scale/config/__init__.py",
    "ldm_scale/config/compose.py",
    "ldm_scale/data/shards.py",
    "ldm_scale/engine/env.py",
    "ldm_scale/training/trainer.py",
    "kernels/ldm_kernels/__init__.py",
)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ldm_scale/operations/x.py", "from ldm_scale.training import trainer"),
        ("ldm_scale/config/compose.py", "import hydra\nfrom ldm_scale.errors import ConfigError"),
        ("ldm_scale/train.py", "import hydra\nfrom ldm_scale.config.compose import load_config"),
        ("ldm_scale/models/x.py", "from ldm_kernels import geglu\nfrom ldm_scale import __version__"),
        ("ldm_scale/engine/env.py", "import deepspeed\nfrom ldm_scale.engine import zero"),
        ("ldm_scale/__init__.py", "from importlib import import_module\nimport_module('ldm_scale.training.trainer')"),
    ],
)
def test_what_is_allowed_passes(tmp_path: Path, module: str, line: str) -> None:
    for name in (*_STANDING, module):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / module).write_text(line + "\n")
    assert find_breaches(tmp_path) == []


def test_nothing_in_the_package_shadows_a_module() -> None:
    # `deepspeed ldm_scale/train.py` puts ldm_scale/ first on the path, until train.py takes it off.
    names = {path.stem for path in (ROOT / "ldm_scale").glob("*.py")} - {"__init__", "__main__"}
    names |= {path.name for path in (ROOT / "ldm_scale").iterdir() if (path / "__init__.py").exists()}
    others = set(packages_distributions()) - {"ldm_scale", "ldm_kernels"}
    assert names & (set(sys.stdlib_module_names) | others) == set()
