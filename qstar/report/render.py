"""Rendering of pages: jinja2 templates with autoescape, style sheets and scripts inlined to make a page one file."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qstar import files
from qstar.report import charts, stats

HOME = Path(__file__).parent


@functools.cache
def environment() -> jinja2.Environment:
    """The templates' environment. Everything that a template inserts is escaped, unless it is `Markup`."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HOME / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    env.globals.update(stats=stats, charts=charts, static=static, links=links, flatten=flatten)
    env.filters.update(script_json=script_json, plain=stats.plain, percent=stats.percent, label=stats.label)
    return env


def page(template: str, **values: Any) -> str:
    """A page as text."""
    return environment().get_template(template).render(**values)


def write(path: Path, text: str) -> None:
    """Writes a page atomically: a reader who reloads it gets the old or the new one."""
    files.write(path, text.encode("utf-8", "replace"))


def static(name: str) -> Markup:
    """A style sheet or script of ours, to be inlined."""
    text = (HOME / "static" / name).read_text(encoding="utf-8")
    return Markup(re.sub(r"\n\s+", "\n", text))  # indentation would be a tenth of a small page


def script_json(value: Any) -> Markup:
    """JSON for a <script> element: "<" occurs only inside strings, and escaped it cannot end the element."""
    return Markup(json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c"))


def links(main: str) -> list[tuple[str, Markup]]:
    """(anchor, title) of the sections of a page."""
    return [(anchor, Markup(title)) for anchor, title in re.findall(r'<section id="([a-z]+)">\s*<h2>([^<]+)', main)]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested dict as ("outer.inner", value as text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            pairs += flatten(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return pairs
