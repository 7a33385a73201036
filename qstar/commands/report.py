"""`qstar report`: writes the page of a run."""

from __future__ import annotations

from pathlib import Path

from qstar.flags import Parser


def main(argv: list[str]) -> int:
    """qstar report RUN"""
    p = Parser("report", "Writes RUN/report.html: one self-contained page.", device=False)
    p.flag("run RUN", "run folder: the --workdir of qstar train")
    a = p.parse_args(argv)
    from qstar.report.pages import write_report

    print(write_report(Path(a.run)))
    return 0
