"""Rendering of pages: jinja2 templates with autoescape, style sheets and scripts inlined to make a page one file."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qstar import files
from qstar.report import charts, stats
from qstar.report.charts import Card
from qstar.report.read import Run

HOME = Path(__file__).parent


@functools.cache
def environment() -> jinja2.Environment:
    """The environment of the templates."""
    # StrictUndefined: a misspelt name raises, where jinja2's default would print nothing. Autoescape, since prompts and
    # completions are arbitrary text.
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HOME / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    env.globals.update(stats=stats, charts=charts, static=static, links=links, flatten=flatten, headline=headline)
    env.globals.update(guided=None, title="", refresh=0)  # of some pages only
    env.filters.update(script_json=script_json, plain=stats.plain, percent=stats.percent, label=stats.label)
    return env


def page(template: str, **values: Any) -> str:
    """A page as text."""
    return environment().get_template(template).render(**values)


def headline(run: Run, guided: Any = None) -> str:
    """The result of a run in a sentence or two, as plain text; `guided`: `pages.guided_cot.read_guided` of such a run."""
    text = re.sub(r" ([,;.])", r"\1", " ".join(page("headline.j2", run=run, guided=guided).split()))
    # The first interval alone says what the numbers in brackets are.
    return (text[0].upper() + text[1:]).replace("%)", "%, 95% interval)", 1)


class Panels:
    """Cards of `charts` side by side, as a notebook shows them."""

    def __init__(self, cards: Iterable[Card | None]):
        self.cards = [card for card in cards if card]

    def _repr_html_(self) -> str:
        return page("panels.html.j2", cards=self.cards)


def write(path: Path, text: str) -> None:
    """Writes a page atomically: a reader who reloads it gets the old or the new one."""
    # "replace": a lone surrogate, which escaped JSON may hold, has no UTF-8.
    files.write(path, text.encode("utf-8", "replace"))


def static(name: str) -> Markup:
    """A style sheet or script of ours, to be inlined."""
    text = (HOME / "static" / name).read_text(encoding="utf-8")
    # Without indentation, which would be a tenth of a small page.
    return Markup(re.sub(r"\n\s+", "\n", text))


def script_json(value: Any) -> Markup:
    """JSON for a <script> element."""
    # In JSON, "<" occurs only inside strings; escaped there, a "</script>" of a text cannot end the element.
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def packed(value: Any) -> str:
    """A value as text that scripts read with `page.unpack`: base64 of gzip of JSON."""
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    # No time in the header: the same run gives the same page.
    return base64.b64encode(gzip.compress(written, 6, mtime=0)).decode("ascii")


def links(main: str) -> list[tuple[str, Markup]]:
    """(anchor, title) of the sections of a page."""
    return [(anchor, Markup(title)) for anchor, title in re.findall(r'<section id="([a-z]+)">\s*<h2>([^<]+)', main)]


def flatten(tree: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A nested dict as ("outer.inner", value as text) pairs."""
    flat = files.flatten(tree)
    return [(k, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for k, v in flat.items()]
