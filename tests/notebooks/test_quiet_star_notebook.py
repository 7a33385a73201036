"""The Quiet-STaR notebook runs from top to bottom on a run folder, states its numbers and colours its texts."""

import re

import pytest

from qstar.report import render
from qstar.report.read import read_run
from tests.notebooks.test_star_notebook import ROOT, outputs, told
from tests.report.quiet_synthetic import write_quiet_run

nbformat = pytest.importorskip("nbformat", reason="needs nbformat (pip install -e .[notebooks])")
NOTEBOOK = ROOT / "notebooks" / "02_quiet_star.ipynb"


def test_notebook_states_the_numbers_and_colours_the_texts(tmp_path, monkeypatch):
    run = write_quiet_run(tmp_path / "run", texts=15)
    shown = outputs(NOTEBOOK, run, monkeypatch)
    printed, figures = told(shown)
    assert render.headline(read_run(run)) in printed and figures == 3
    rows = dict(re.findall(r"^(full|plain) +([\d. -]+)$", printed, re.MULTILINE))
    assert rows["full"].split() == ["0.967", "0.996", "0.110", "0.100", "0.234", "2.310", "0.967", "0.629"]
    assert rows["plain"].split() == ["0.100", "-", "-", "0.100", "2.310", "2.310", "-", "-"]
    pages = [o["data"]["text/html"] for o in shown if "text/html" in o.get("data", {})]
    pages = [page for page in pages if "<svg" not in page]
    assert len(pages) == 12 and "rgba(31,119,201,0.72)" in "".join(pages)  # a hard token, helped as much as can be
    assert "helped most" in printed and re.search(r"\+1\.9\d  '.*=' -> '\d'  thought '-\d+", printed)


def test_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
