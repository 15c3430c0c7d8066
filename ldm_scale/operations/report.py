"""A run as one page that needs nothing else: no script, no font and no picture from anywhere but itself.

The page forbids all of these to itself (Content-Security-Policy), so that a text of the run that got into it as markup
could still load and run nothing.
"""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm_scale import __version__
from ldm_scale.engine.tensor_file import replace_file
from ldm_scale.errors import ConfigError
from ldm_scale.operations import report_sections as sections
from ldm_scale.operations.report_html import Html, joined, tag
from ldm_scale.operations.report_pictures import Album
from ldm_scale.operations.report_run import RunFolder, read_run, series
from ldm_scale.operations.report_style import STYLE
from ldm_scale.telemetry.log import get_logger

PAGE = "report.html"
_GENERATOR = "ldm-scale report"
_BEGINNING = re.compile(
    rf'<!DOCTYPE html>\s*<html [^>]*><head><meta charset="utf-8"><meta name="generator" content="{_GENERATOR} '.encode()
)
_HEAD_BYTES = 2048  # of a page, within which it says what made it
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the page shows and what it lacks; the page is written.

    Raises: ConfigError if the folder is no run's, or another program's file is in the place of the page; DataError if
    an evaluation that was named cannot be read.
    """
    out: Path = arguments.out or arguments.run / PAGE
    _require_place(out)
    run = read_run(arguments.run, arguments.results)
    album = Album()
    page = _page(run, album)
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, page)
    log = get_logger(0)
    for text in run.missing:
        log.warning(f"missing on the page: {text}")
    log.info(f"wrote {out} ({len(page.encode()) / 2**20:.1f} MiB, {album.count} pictures)")
    return {
        "run": str(run.path),
        "page": str(out),
        "bytes": len(page.encode()),
        "status": run.status,
        "images": run.images,
        "total_images": run.total_images,
        "pictures": album.count,
        "figures": len(series(run.rows)),
        "evaluations": [result.source for result in run.results],
        "attempts": len(run.attempts),
        "missing": run.missing,
    }


def _require_place(out: Path) -> None:
    """Nothing, if nothing is there, or an older page."""
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; give the name of a page, such as {out / PAGE}")
    if out.exists():
        with out.open("rb") as file:
            if _BEGINNING.match(file.read(_HEAD_BYTES)) is None:
                raise ConfigError(f"--out {out} exists and is no page of {_GENERATOR}; remove it, or give another name")


def _page(run: RunFolder, album: Album) -> str:
    figures = series(run.rows)
    shown = sections.pictures(run, album)
    evaluated = sections.evaluations(run.results, album, run.missing)
    if album.num_left_out:
        run.missing.append(
            f"{album.num_left_out} pictures, to keep it small; TensorBoard and the run's folder have them"
        )
    parts = [
        sections.trouble(run),  # after the pictures were looked at: it tells what is wrong with them
        shown,
        *sections.curves(run, figures),
        evaluated,
        sections.cost(run),
        sections.checkpoints(run),
        sections.environment(run),
        sections.configuration(run),
    ]
    found = [part for part in parts if part is not None]
    made = f"{_GENERATOR} {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
    body = tag(
        "main",
        sections.header(run),
        sections.tiles(run, figures),
        sections.contents(found),
        *found,
        tag("footer", f"Made by {made}. Nothing on this page is loaded from anywhere else."),
    )
    name = run.config.get("experiment") or run.path.resolve().name
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=made),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{name}: {run.status}"),
        tag("style", Html(STYLE)),
    )
    return joined([Html("<!DOCTYPE html>\n"), tag("html", head, tag("body", body), lang="en"), "\n"])
