"""The site builds strictly from what is there, needs no network, and names no function that does not exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.documents import ROOT, generator

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed, with which `make env` builds the site")

REPOSITORY = generator("repository")
SETTINGS = {"NO_MKDOCS_2_WARNING": "1"}
pytestmark = pytest.mark.timeout(300)  # six seconds on an idle core


def _build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    # Not --quiet, under which MkDocs neither shows nor counts warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | SETTINGS | {"PYTHONPATH": paths}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = _build(ROOT, folder)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_built_and_in_the_menu(site: Path) -> None:
    menu = re.sub(r"\s+", " ", (site / "index.html").read_text("utf-8"))
    for path in (ROOT / "docs").rglob("*.md"):
        built = path.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / built).is_file(), built
        assert f'href="{built.as_posix()}"' in menu, f"{built} is not in the menu"


def _fetched(text: str) -> list[str]:
    """What a browser would fetch from another server for this HTML or CSS; links that a reader follows are none."""
    tags = re.findall(r"<(?:script|img|iframe|source|video|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>", text)
    return tags + re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^\"')]*", text)


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        assert _fetched(path.read_text("utf-8")) == [], path.name


@pytest.mark.parametrize(
    "text",
    [
        '<link rel="preconnect" href="https://fonts.gstatic.com" crossorigin>',
        '<script src="//example.org/a.js"></script>',
        "<img alt=x src=https://example.org/a.png>",
        "@import 'https://example.org/a.css';",
    ],
)
def test_what_is_fetched_is_seen(text: str) -> None:
    assert len(_fetched(f'<a href="https://example.org">x</a> {text}')) == 1


def test_every_key_is_a_heading_of_the_built_page(site: Path) -> None:
    text = (site / "configuration.html").read_text("utf-8")
    for key in generator("config_keys").all_keys():
        assert f'id="{key.name}"' in text, key.name


def test_sources_have_a_place_for_every_line_that_is_linked(site: Path) -> None:
    equations = (site / "equations.html").read_text("utf-8")
    found = re.findall(r'href="(repository/[\w./]+\.py\.html)#(L-\d+)"', equations)
    assert len(found) > 60
    for target, anchor in found:
        assert f'name="{anchor}"' in (site / target).read_text("utf-8"), f"{target}#{anchor}"


def test_equations_name_functions_that_exist() -> None:
    text = (ROOT / "docs" / "equations.md").read_text("utf-8")
    named = [link for link in REPOSITORY.links(text) if link["target"].endswith(".py")]
    assert len(named) > 60
    for link in named:
        path, _ = REPOSITORY.local_target("docs/equations.md", link["target"])
        assert link["name"], f"{link[0]}: give the function as the link's text, in backticks"
        assert REPOSITORY.defined_at(path, link["name"]) is not None, f"{path} does not define {link['name']}"


def test_every_source_of_a_formula_of_diffusion_is_an_equation_of_the_page() -> None:
    text = (ROOT / "docs" / "equations.md").read_text("utf-8")
    sources = {
        identifier
        for path in (ROOT / "ldm_scale" / "diffusion").glob("*.py")
        for identifier in re.findall(r"arXiv:(\d{4}\.\d{5})", path.read_text("utf-8"))
    }
    assert len(sources) > 15
    assert {identifier for identifier in sources if identifier not in text} == set()


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    """A small documentation with one mistake of each kind, built as the real one is."""
    shutil.copytree(ROOT / "docs" / "generator", tmp_path / "docs" / "generator", ignore=_caches)
    (tmp_path / "code.py").write_text("def present():\n    pass\n")
    (tmp_path / "docs" / "index.md").write_text(
        "# Home\n[a](missing.md) [b](index.md#nowhere) [c](../gone.py) [`absent`](../code.py) [`present`](../code.py)\n"
    )
    (tmp_path / "docs" / "unnamed.md").write_text("# A page that the menu does not name\n")
    settings = _settings() | {"nav": [{"Home": "index.md"}], "extra_css": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    built = _build(tmp_path, tmp_path / "site")
    assert built.returncode != 0
    assert "'missing.md'" in built.stderr
    assert "no such anchor" in built.stderr
    assert "'../gone.py'" in built.stderr
    assert "names absent, which code.py does not define" in built.stderr
    assert "present" not in built.stderr
    assert built.stderr.count("WARNING") == 4
    # It is last in the menu all the same.
    assert 'href="unnamed.html"' in (tmp_path / "site" / "index.html").read_text("utf-8")


def _caches(_: str, names: list[str]) -> Iterator[str]:
    return (name for name in names if name == "__pycache__")


def _settings() -> dict[str, object]:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    assert isinstance(settings, dict)
    return settings
