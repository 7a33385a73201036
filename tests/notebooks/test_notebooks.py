"""The notebooks run from top to bottom and state the numbers of a run folder."""

import json
import os
import shutil

import pytest

from qstar.data.sources import write_jsonl
from qstar.report.frames import load_run
from tests.methods import runs
from tests.report.quiet_synthetic import write_quiet_run
from tests.report.synthetic import Shape, write_run
from tests.report.v_star_synthetic import write_v_star_run

nbformat = pytest.importorskip("nbformat", reason="needs nbformat (pip install -e .[notebooks])")
pytest.importorskip("pandas", reason="needs pandas (pip install -e .[notebooks])")

from tests.notebooks.harness import NOTEBOOKS, ROOT, execute, figures  # noqa: E402


def test_star(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", Shape(loops=2))
    printed, shown = execute("01_star.ipynb", monkeypatch, QSTAR_RUN=str(run))
    assert load_run(run).headline in printed and figures(shown) == 4
    for verdict in ("kept", "rationalised", "rejected"):
        assert f"[rat, loop 1] {verdict}" in printed or f"[rat, loop 2] {verdict}" in printed


def test_star_on_one_arm_without_groups_and_audit(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", Shape(("norat",), 1, groups=False, audit=False, status=None, task="gsm8k"))
    printed, shown = execute("01_star.ipynb", monkeypatch, QSTAR_RUN=str(run))
    assert "Accuracy on held-out problems went from" in printed and figures(shown) == 4


def test_quiet_star(tmp_path, monkeypatch):
    run = write_quiet_run(tmp_path / "run", texts=15)
    printed, shown = execute("02_quiet_star.ipynb", monkeypatch, QSTAR_RUN=str(run))
    assert load_run(run).headline in printed and figures(shown) == 2
    table = next(value for value in shown if "accuracy_greedy/hard" in getattr(value, "columns", ()))
    assert table.loc["full"].tolist() == [0.967, 0.996, 0.110, 0.100, 0.234, 2.310, 0.967, 0.629]
    assert table.loc["plain"].isna().tolist() == [True, True, True, False, True, False, True, True]
    assert "helped most" in printed and "rgba(31,119,201,0.72)" in shown[-1].data


def test_v_star(tmp_path, monkeypatch):
    run = write_v_star_run(tmp_path / "run")
    rows = [{"problem_id": "1+1", "prompt": "1+1=", "completion": c, "correct": c == "2"} for c in ("2", "3", "2")]
    write_jsonl(run / "v_star" / "rationales" / "iter_001.jsonl", rows)
    printed, shown = execute("03_v_star.ipynb", monkeypatch, QSTAR_RUN=str(run))
    assert (
        figures(shown) == 2 and "V-STaR verifier (DPO)" in printed and "1 of 1 problems have right and wrong" in printed
    )
    found = json.loads((run / "v_star" / "selection" / "iter_002.json").read_text())
    line = next(line for line in printed.splitlines() if line.startswith("V-STaR verifier (DPO)"))
    assert float(line.split()[-1]) == round(found["auc"]["dpo"], 3)


def test_guided_cot(monkeypatch):
    run = runs.finished("guided_cot_synth.py:smoke")
    printed, shown = execute("04_guided_cot.ipynb", monkeypatch, QSTAR_RUN=str(run))
    assert load_run(run).headline in printed and figures(shown) == 2 and "[rl_both_unfiltered] " in printed


def test_a_notebook_runs_in_a_kernel(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient (pip install -e .[notebooks])")
    pytest.importorskip("ipykernel", reason="needs ipykernel (pip install -e .[notebooks])")
    run = write_run(tmp_path / "run", Shape(loops=1))
    monkeypatch.setenv("QSTAR_RUN", str(run))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    cells = nbformat.read(NOTEBOOKS / "01_star.ipynb", as_version=4)
    nbclient.NotebookClient(cells, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    shown = [output for cell in cells.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum('class="charts palette"' in output.get("data", {}).get("text/html", "") for output in shown) == 4


def test_a_first_cell_installs_only_what_is_missing_and_named(monkeypatch):
    for path in NOTEBOOKS.glob("*.ipynb"):
        code = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
        monkeypatch.delenv("QSTAR_SOURCE", raising=False)
        exec(code, {})
        with monkeypatch.context() as missing, pytest.raises(ImportError, match="qstar is not installed: set SOURCE"):
            missing.setattr("importlib.util.find_spec", lambda name: None)
            exec(code, {})


def test_notebooks_are_small_and_hold_the_outputs_of_a_run_without_errors():
    for path in NOTEBOOKS.glob("*.ipynb"):
        assert path.stat().st_size < 200_000, path.name
        outputs = [o for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code" for o in c.outputs]
        assert outputs and not [o for o in outputs if o.output_type == "error"], path.name
        text = path.read_text()
        # In two parts, so that this file holds no path of one machine either.
        assert not [folder for folder in ("work", "root", "tmp") if f"/{folder}/" in text], path.name


def test_the_quick_start_samples_trains_and_shows_a_run(monkeypatch):
    variables = {"QSTAR_MODEL": "random-tiny", "QSTAR_PROBLEMS": "6", "QSTAR_STEPS": "2", "QSTAR_ARGUMENT": ":smoke"}
    run = runs.finished("star_arithmetic.py:smoke")
    printed, shown = execute("00_quick_start.ipynb", monkeypatch, QSTAR_RUN=str(run), **variables)
    assert "of 8 attempts are right" in printed and load_run(run).headline in printed and figures(shown) == 2


def test_one_task_compares_the_methods_of_finished_runs(tmp_path, monkeypatch):
    finished = {"star": runs.arithmetic(), "v_star": runs.v_star(), "grpo": runs.finished("grpo_arithmetic.py:smoke")}
    for method, run in finished.items():
        shutil.copytree(run, tmp_path / method)
    variables = {"QSTAR_RUNS": str(tmp_path), "QSTAR_ARGUMENT": ",smoke"}
    printed, shown = execute("05_one_task_all_methods.ipynb", monkeypatch, **variables)
    table = next(value for value in shown if "responses" in getattr(value, "columns", ()))
    assert {"star: rationalisation", "v_star: v_star", "grpo: grpo"} <= set(table.method) and (
        table.responses > 0
    ).all()
    assert table.method.str.endswith("by the verifier").any() and figures(shown) == 2
    assert all(arm in shown[-1]._repr_html_() for arm in ("base", "rejection sampling"))  # as RESULTS.md records
    written = load_run(tmp_path / "star").rollouts("rationalisation").n_tokens.sum()
    assert table.set_index("method").tokens["star: rationalisation"] == pytest.approx(written)
    assert (tmp_path / "comparison.html").stat().st_size > 20_000
