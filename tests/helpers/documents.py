"""The project's Markdown: its pages, their code blocks and the command lines in them."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
_GENERATOR = ROOT / "docs" / "generator"
_FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1 *$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!-- not run: .+? -->\s*\Z", re.DOTALL)


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    line: int  # of its first line
    language: str
    text: str
    runs: bool  # False after a comment <!-- not run: reason -->


def pages() -> list[Path]:
    """Every Markdown file of the project."""
    folders = (ROOT.glob("*.md"), *((ROOT / name).rglob("*.md") for name in ("docs", "kernels", "benchmarks")))
    return sorted(path for folder in folders for path in folder)


def blocks(path: Path) -> Iterator[Block]:
    """The fenced and the indented code blocks of a page, in their order; the latter without a language."""
    text, page = path.read_text("utf-8"), path.relative_to(ROOT).as_posix()
    found = []
    for fence in _FENCE.finditer(text):
        runs = _NOT_RUN.search(text[: fence.start()]) is None
        found.append((fence.start(3), fence[2], fence[3], runs))
    plain = _FENCE.sub(lambda fence: re.sub(r"[^\n]", " ", fence[0]), text)
    for indented in re.finditer(r"(?<=\n\n)((?: {4}\S[^\n]*\n|[ ]*\n(?= {4}\S))+)", plain):
        found.append((indented.start(), "", re.sub(r"^ {4}", "", indented[0], flags=re.MULTILINE), True))
    for start, language, code, runs in sorted(found):
        yield Block(page, text.count("\n", 0, start) + 1, language, code, runs)


def code_spans(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of everything in single backticks outside of code blocks."""
    text = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), path.read_text("utf-8"))
    for span in re.finditer(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text):
        yield text.count("\n", 0, span.start()) + 1, " ".join(span[1].split())


def command_lines(block: Block) -> Iterator[tuple[int, str]]:
    """Line and text of the commands of a block, continued lines joined."""
    lines = block.text.splitlines()
    while lines:
        number = block.line + block.text.count("\n") - len(lines)
        command = lines.pop(0)
        while command.endswith("\\") and lines:
            command = command[:-1].rstrip() + " " + lines.pop(0).strip()
        if command.strip():
            yield number, command.strip()


@cache
def generator(name: str) -> ModuleType:
    """A module of docs/generator/, under a name that no other module has."""
    spec = importlib.util.spec_from_file_location(f"docs_generator_{name}", _GENERATOR / f"{name}.py")
    assert spec is not None, name
    assert spec.loader is not None, name
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
