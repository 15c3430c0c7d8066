"""HTML that is escaped by construction: what is not `Html` already is text, whatever it holds."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from ldm_scale.redaction import public_urls


class Html(str):
    """Markup that may be put into a page as it is; made by `tag` and `joined` alone."""

    __slots__ = ()


_VOID = frozenset({"img", "meta", "br", "input"})


def escaped(value: object) -> Html:
    """The value as text, or as an attribute in double quotes; its URLs are without passwords and signatures."""
    return value if isinstance(value, Html) else Html(html.escape(public_urls(str(value)), quote=True))


def tag(name: str, /, *children: object, **attributes: Any) -> Html:
    """An element. Attributes: class_ for class, underscores for hyphens; True is an empty one, None and False none."""
    words = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            attribute = key.rstrip("_").replace("_", "-")
            words.append(attribute if value is True else f'{attribute}="{escaped(value)}"')
    opening = f"<{' '.join(words)}>"
    return Html(opening if name in _VOID else f"{opening}{joined(children)}</{name}>")


def joined(children: Iterable[object]) -> Html:
    """Elements and texts one after another; None is left out."""
    return Html("".join(escaped(child) for child in children if child is not None))


def table(rows: Sequence[Sequence[object]], header: Sequence[str] = (), class_: str = "") -> Html:
    """A table in a box that scrolls by itself where the page is too narrow; the first column names the rows."""
    head = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in header))) if header else None
    body = tag("tbody", *(tag("tr", tag("th", row[0], scope="row"), *(tag("td", x) for x in row[1:])) for row in rows))
    return tag("div", tag("table", head, body), class_=f"scroll {class_}".strip())


def details(summary: object, *children: object, is_open: bool = False) -> Html:
    """What is shown when the summary is asked for."""
    return tag("details", tag("summary", summary), *children, open=is_open)
