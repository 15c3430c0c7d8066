"""What happens between docs/ and the site: MkDocs calls these functions by their names.

Every key of the configuration is written into configuration.md, files from outside docs/ that pages link to are added
(repository.py), and pages that mkdocs.yml does not name come last in the menu.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import config_keys
import repository
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

KEYS_PLACE = "<!-- every key: written here when the site is built -->"

_log = logging.getLogger("mkdocs.hooks.ldm_scale")  # a warning here fails a strict build, as MkDocs' own do
_sources: dict[str, str] = {}  # site path -> path in the repository, of all pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of docs/ and what they link to."""
    pages = {file.src_uri: f"{repository.DOCS}/{file.src_uri}" for file in files.documentation_pages()}
    _sources.clear()
    _sources.update(pages)
    for place, path in repository.linked_from_outside(pages).items():
        if not place.endswith(".md"):
            files.append(File.generated(config, place, abs_src_path=str(path)))
            continue
        name = path.relative_to(repository.ROOT).as_posix()
        content = path.read_text("utf-8") if name.endswith(".md") else repository.source_page(path)
        files.append(File.generated(config, place, content=content, inclusion=InclusionLevel.NOT_IN_NAV))
        if name.endswith(".md"):
            _sources[place] = name
    unnamed = sorted(set(pages) - set(_named(config.nav)))
    if unnamed and config.nav:
        config.nav.append({"More": unnamed})
    return files


def _named(menu: Any) -> Iterator[str]:
    """The pages that a part of mkdocs.yml's `nav` names."""
    if isinstance(menu, str):
        yield menu
    elif menu:
        for part in menu.values() if isinstance(menu, dict) else menu:
            yield from _named(part)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with links that the site can follow, and with every key where it asks for them."""
    source = _sources.get(page.file.src_uri)
    if source is None:
        return markdown
    markdown = repository.rewritten(markdown, source, _log.warning)
    return markdown.replace(KEYS_PLACE, config_keys.every_key()) if KEYS_PLACE in markdown else markdown
