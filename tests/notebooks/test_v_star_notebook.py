"""The V-STaR notebook runs from top to bottom on a run folder and states its numbers."""

import json

import pytest

from qstar.report import stats
from qstar.report.pages.v_star import SCORERS, headline
from tests.notebooks.test_star_notebook import ROOT, outputs, told
from tests.report.v_star_synthetic import write_v_star_run

nbformat = pytest.importorskip("nbformat", reason="needs nbformat (pip install -e .[notebooks])")
NOTEBOOK = ROOT / "notebooks" / "03_v_star.ipynb"


def test_notebook_states_the_numbers_and_ranks_solutions(tmp_path, monkeypatch):
    run = write_v_star_run(tmp_path / "run")
    printed, figures = told(outputs(NOTEBOOK, run, monkeypatch))
    assert figures == 2
    for arm, n in (("v_star", 2), ("verification", 1)):
        found = json.loads((run / arm / "selection" / f"iter_{n:03d}.json").read_text())
        assert f"{stats.label(arm)}: {headline(found)}" in printed
        assert f"{SCORERS['dpo']:26s}{found['auc']['dpo']:8.3f}{found['auc_pooled']['dpo']:8.3f}" in printed
        for kind in found["auc_by_fault"]:
            assert f"  {kind:22s}" in printed
        assert f"[{stats.label(arm)}] " in printed and f"only {SCORERS['dpo']}" not in printed
    assert f"; {SCORERS['dpo']} alone is right" in printed and f"  by {SCORERS['generator']}" in printed


def test_notebook_is_kept_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
