"""The STaR notebook runs from top to bottom on a run folder and states its numbers."""

import os
from pathlib import Path

import pytest

from qstar.report import render
from qstar.report.read import read_run
from tests.report.synthetic import Shape, write_run

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_star.ipynb"

nbformat = pytest.importorskip("nbformat", reason="needs nbformat (pip install -e .[notebooks])")


def outputs(notebook, run, monkeypatch):
    """Everything that a notebook shows when it is executed on a run."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient (pip install -e .[notebooks])")
    pytest.importorskip("ipykernel", reason="needs ipykernel (pip install -e .[notebooks])")
    monkeypatch.setenv("QSTAR_RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    cells = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(cells, timeout=120, resources={"metadata": {"path": str(notebook.parent)}}).execute()
    return [output for cell in cells.cells if cell.cell_type == "code" for output in cell.outputs]


def told(shown):
    """(printed text, number of figures)."""
    printed = "".join(output.text for output in shown if output.output_type == "stream" and output.name == "stdout")
    return printed, sum('class="charts"' in output.get("data", {}).get("text/html", "") for output in shown)


def execute(run, monkeypatch):
    """The executed notebook's outputs: (printed text, number of figures)."""
    return told(outputs(NOTEBOOK, run, monkeypatch))


def test_notebook_states_the_numbers_of_the_run(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", Shape(loops=2))
    printed, figures = execute(run, monkeypatch)
    assert render.headline(read_run(run)) in printed
    assert figures == 3
    for verdict in ("kept", "rationalised", "rejected"):
        assert f"[rat, loop 1] {verdict}" in printed or f"[rat, loop 2] {verdict}" in printed
    assert "why attempts were rejected, arm norat" in printed and "wrong answers (" in printed


def test_notebook_runs_on_one_arm_without_groups_and_audit(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", Shape(("norat",), 1, groups=False, audit=False, status=None, task="gsm8k"))
    printed, figures = execute(run, monkeypatch)
    assert "Accuracy on held-out problems went from" in printed and figures == 3


def test_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
