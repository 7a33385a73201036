"""`qstar report`: writes the page of a run, or of a comparison of several."""

from __future__ import annotations

from pathlib import Path

from qstar.errors import require
from qstar.flags import Parser, integer, local_folder


def main(argv: list[str]) -> int:
    """qstar report RUN [RUN ...] [--out FILE] [--watch [SECONDS]]"""
    p = Parser(
        "report",
        "Writes RUN/report.html, or one page that compares several runs: one self-contained file.",
        device=False,
        epilog="qstar report runs/a --watch",
    )
    p.flag("runs RUN", "run folder: the --workdir of qstar train; several are compared", nargs="+")
    p.flag("--out FILE", "the page of several runs (default: comparison.html)")
    p.flag(
        "--watch SECONDS",
        "while a run goes on, writes the page again every so many seconds, 30 by default; an open page reloads itself",
        integer(1, 86_400),
        nargs="?",
        const=30,
    )
    a = p.parse_args(argv)
    several = len(a.runs) > 1
    require((several or not a.out, "report: --out is the page of several runs; that of one is RUN/report.html"))
    from qstar.report import pages

    def write(refresh: int) -> Path:
        if several:
            return pages.compare_runs(a.runs, local_folder("--out", a.out or "comparison.html"), refresh)
        return pages.write_report(a.runs[0], refresh)

    print(pages.watch(a.runs, write, a.watch) if a.watch else write(0))
    return 0
