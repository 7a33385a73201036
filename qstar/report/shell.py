"""Page frame: the HTML document around the sections, the table of contents, and atomic writing."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from qstar.report.assets import SCRIPT, STYLE
from qstar.report.markup import Safe, tag

# Nothing may be loaded from anywhere, whatever a text manages to smuggle in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def document(
    title: str, header: Sequence[Safe | None], parts: Sequence[Safe | None], *, style: str = "", script: str = ""
) -> str:
    """The whole page as text.

    Args:
        header: what stands above the sections; links to them follow it.
        style, script: beyond what all pages share.
    """
    top = tag("header", *header, tag("nav", *_links(parts), aria_label="sections"))
    scripts = [tag("script", Safe(text)) for text in (SCRIPT, script) if text]
    body = tag("body", top, tag("main", *parts), *scripts)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{title} · qstar"),
        tag("style", Safe(STYLE + style)),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def _links(parts: Sequence[Safe | None]) -> list[Safe]:
    found = [re.match(r'<section id="([a-z]+)"><h2>([^<]+)', part) for part in parts if part]
    return [tag("a", Safe(match[2]), href=f"#{match[1]}") for match in found if match]


def write(path: Path, text: str) -> None:
    """Writes a page, all or nothing: someone who reloads it sees the old report or the new one."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # also on Ctrl-C
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
