"""HTML that cannot be injected into: whatever is not `Safe` is escaped on its way into a tag."""

from __future__ import annotations

import html
from typing import Any

_VOID = {"meta", "input", "br"}  # elements without an end tag


class Safe(str):
    """Markup that may stand in the page as it is; only `tag` and `join` (and constants of ours) make it."""


def escape(value: Any) -> Safe:
    """A value as text of a page; `Safe` passes unchanged."""
    return value if isinstance(value, Safe) else Safe(html.escape(str(value), quote=True))


def join(children: Any, separator: str = "") -> Safe:
    """Children one after the other, each escaped unless it is `Safe`; None counts as nothing."""
    return Safe(separator.join(escape(child) for child in children if child is not None))


def tag(name: str, /, *children: Any, **attributes: Any) -> Safe:
    """An element. `class_` is written `class`, `stroke_width` `stroke-width`; None leaves one out."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Safe(f"<{name}{written}>" + ("" if name in _VOID else f"{join(children)}</{name}>"))


def table(head: list[Any], rows: list[list[Any]], *, class_: str | None = None) -> Safe:
    """A table that scrolls sideways on a narrow screen; numbers (and the cells of a `Safe`) stay as given."""
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = tag("tbody", *(tag("tr", *(_cell(cell) for cell in row)) for row in rows))
    return tag("div", tag("table", top, body, class_=class_), class_="scroll")


def _cell(cell: Any) -> Safe:
    return cell if isinstance(cell, Safe) and cell.startswith("<td") else tag("td", cell)
