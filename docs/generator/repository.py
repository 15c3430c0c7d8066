"""Links of pages to files of the repository, in a form that the site can follow.

Pages are read in two places. On a web forge `[x](../kernels/README.md)` is followed as it stands; a site that is built
from docs/ alone has no such page. So whatever a page links to comes into the site: Markdown as a page, text as a page
with numbered lines, pictures as they are, all under repository/ with their path in the repository. Why not links to
the repository on the web: the site would then need a network, and would show another version than the one it was
built from. A link whose text is a name in backticks and whose target is a Python file goes to that name's definition.
"""

from __future__ import annotations

import ast
import posixpath
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).resolve().parents[2]
DOCS = "docs"
PREFIX = "repository"  # where files from outside docs/ lie in the site
PICTURES = (".png", ".jpg", ".svg")

# Code is passed over; what remains are inline links and pictures, with the name in backticks that may be their text.
_PIECES = re.compile(
    r"(?P<fence>^(?P<mark>`{3,}|~{3,})[^\n]*\n.*?^(?P=mark)[ ]*$)"
    r"|(?:\[`(?P<name>[\w.]+)`)?\]\((?P<target>[^)\s]+)(?P<title>\s+\"[^\"]*\")?\)"
    r"|(?P<code>``.+?``|`[^`\n]+`)",
    re.MULTILINE | re.DOTALL,
)


def links(markdown: str) -> Iterator[re.Match[str]]:
    """The links and pictures of a page, outside of code, in their order: groups `name`, `target`, `title`."""
    return (piece for piece in _PIECES.finditer(markdown) if piece["target"])


def local_target(source: str, target: str) -> tuple[str, str] | None:
    """Path in the repository and anchor of what a page at the path `source` links to; None for other addresses."""
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:|/", path):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), path)), anchor


def site_path(path: str) -> str:
    """Where a file of the repository lies among the site's sources."""
    if path.startswith(f"{DOCS}/"):
        return path.removeprefix(f"{DOCS}/")
    return f"{PREFIX}/{path}" if path.endswith((".md", *PICTURES)) else f"{PREFIX}/{path}.md"


def linked_from_outside(pages: dict[str, str]) -> dict[str, Path]:
    """Site path -> file, of all that lies outside docs/ and is linked from pages, or from pages that these link to.

    `pages` are site path -> path in the repository of the pages of docs/. Links that lead nowhere are left to the
    check of links.
    """
    found: dict[str, Path] = {}
    waiting = list(pages.values())
    while waiting:
        source = waiting.pop()
        for link in links((ROOT / source).read_text("utf-8")):
            local = local_target(source, link["target"])
            if local is None or local[0].startswith((f"{DOCS}/", "..")) or not (ROOT / local[0]).is_file():
                continue
            place = site_path(local[0])
            if place not in found:
                found[place] = ROOT / local[0]
                if local[0].endswith(".md"):
                    waiting.append(local[0])
    return found


def rewritten(markdown: str, source: str, complain: Callable[[str], None]) -> str:
    """The page at the path `source` of the repository with links that the site can follow.

    `complain` is told of names that a Python file does not define.
    """
    page = site_path(source)

    def replace(piece: re.Match[str]) -> str:
        local = local_target(source, piece["target"]) if piece["target"] else None
        if local is None or not (ROOT / local[0]).is_file():
            return piece[0]
        path, anchor = local
        if piece["name"] and path.endswith(".py"):
            line = defined_at(path, piece["name"])
            if line is None:
                complain(f"{source} names {piece['name']}, which {path} does not define")
            anchor = anchor if line is None else f"L-{line}"
        place = posixpath.relpath(site_path(path), posixpath.dirname(page) or ".")
        start = piece[0][: piece.start("target") - piece.start()]
        return f"{start}{place}{'#' if anchor else ''}{anchor}{piece['title'] or ''})"

    return _PIECES.sub(replace, markdown)


def defined_at(path: str, name: str) -> int | None:
    """The line of a Python file of the repository in which a function, class, method or constant is defined."""
    return _definitions(path).get(name)


@cache
def _definitions(path: str) -> dict[str, int]:
    found: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({prefix + target.id: node.lineno for target in targets if isinstance(target, ast.Name)})

    visit(ast.parse((ROOT / path).read_text("utf-8")).body, "")
    return found


def source_page(path: Path) -> str:
    """A page that shows a text file with numbered lines, of which each can be linked as `#L-12`."""
    text = path.read_text("utf-8")
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = TextLexer()
    formatter = HtmlFormatter(linenos="inline", lineanchors="L", anchorlinenos=True, wrapcode=True)
    shown = highlight(text, lexer, formatter)
    name = path.relative_to(ROOT).as_posix()
    # Nobody who searches for a word wants a page of code.
    return f'---\nsearch:\n  exclude: true\n---\n# {name}\n\n<div class="source-file">\n{shown}\n</div>\n'
