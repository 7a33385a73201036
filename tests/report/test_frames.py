"""Runs as frames: every row of the files, the arms and iterations that exist, and one line where something lacks."""

import builtins
import json
import re
import subprocess
import sys

import pytest

import qstar
from qstar.data.sources import read_jsonl, write_jsonl
from qstar.errors import UserError
from qstar.train import metrics
from tests.report.quiet_synthetic import write_quiet_run
from tests.report.synthetic import CURVES, Shape, write_run
from tests.report.v_star_synthetic import write_v_star_run

pd = pytest.importorskip("pandas", reason="needs pandas (pip install -e .[notebooks])")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("frames") / "run", Shape(loops=2))


def test_frames_hold_every_row_of_the_files(folder):
    run = qstar.load_run(folder)
    assert (run.method, run.status, run.arms) == ("star", "done", ["rat", "norat"])
    assert len(run.metrics) == len(metrics.read(folder)) and run.config["train"]["steps"] == 400
    files = [read_jsonl(folder / "rat" / "rationales" / f"iter_00{n}.jsonl") for n in (1, 2)]
    assert run.rollouts("rat").completion.tolist() == [row["completion"] for rows in files for row in rows]
    assert run.rollouts("rat", 2).problem_id.tolist() == [row["problem_id"] for row in files[1]]
    answers = read_jsonl(folder / "norat" / "evaluation" / "iter_002.jsonl")
    assert run.evaluation("norat").correct.tolist() == [row["correct"] for row in answers]
    assert len(run.evaluation("norat", 0)) == len(answers)
    assert run.summary.set_index("arm").value.to_dict() == {arm: CURVES[arm]["3"][2] for arm in ("rat", "norat")}


def test_what_a_run_lacks_is_named_in_one_line(folder, tmp_path):
    run = qstar.load_run(folder)
    for call, line in (
        (lambda: run.rollouts("rats"), "arm 'rats'"),
        (lambda: run.rollouts("rat", 9), "of iteration 9: there are those of 1, 2"),
        (lambda: run.charts("curve"), "did you mean curves"),
        (lambda: qstar.load_run(tmp_path / "nowhere"), "no such folder"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert run.selection().empty


def test_without_pandas_a_line_says_what_to_install(folder, monkeypatch):
    usual = builtins.__import__

    def without(name, *args, **options):
        if name == "pandas":
            raise ImportError(name)
        return usual(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="need pandas: pip install"):
        qstar.load_run(folder)


def test_a_frame_of_thoughts_has_a_row_per_predicted_token(tmp_path):
    run = qstar.load_run(write_quiet_run(tmp_path / "run", texts=3))
    tokens = run.rollouts()
    last = tokens[tokens.iteration == tokens.iteration.max()]
    path = sorted((tmp_path / "run" / run.arms[0] / "thoughts").glob("*.jsonl"))[-1]
    texts = read_jsonl(path)
    assert len(last) == sum(value is not None for text in texts for value in text["base_nll"])
    row = last.iloc[0]
    assert row.gain == pytest.approx(row.base_nll - sum(row.nll) / len(row.nll))


def test_a_frame_of_a_selection_has_the_curves(tmp_path):
    folder = write_v_star_run(tmp_path / "run")
    found = json.loads((folder / "v_star" / "selection" / "iter_002.json").read_text())
    curves = qstar.load_run(folder).selection("v_star")
    assert len(curves) == sum(map(len, found["curves"].values()))
    mean, low, high = found["curves"]["majority"]["4"]
    row = curves[(curves.rule == "majority vote") & (curves.k == 4)].iloc[0]
    assert (row.value, row.low, row.high) == (mean, low, high)


def test_rows_of_rl_are_the_logged_completions(tmp_path):
    folder = write_run(tmp_path / "run", Shape(("rat",), loops=1))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "method": "rl"}))
    write_jsonl(folder / "rat" / "completions" / "update_000004.jsonl", [{"update": 4, "completion": "x"}])
    assert qstar.load_run(folder).rollouts().to_dict("records") == [{"iteration": 4, "update": 4, "completion": "x"}]


def test_charts_of_frames(folder):
    run = qstar.load_run(folder)
    losses = run.metrics[run.metrics.stage == "train"]
    chart = qstar.plot(losses, "step", "loss", by="arm", title="<loss>")._repr_html_()
    assert chart.count("<polyline") >= 3 and "&lt;loss&gt;" in chart and "<loss>" not in chart
    assert qstar.plot(run.summary, "arm", "value")._repr_html_().count("<rect") == 2


def test_bars_have_the_intervals_of_the_frame():
    frame = pd.DataFrame({"arm": ["a", "b"], "share": [0.2, 0.4], "low": [0.1, None], "high": [0.3, None]})
    chart = qstar.plot(frame, "arm", "share")._repr_html_()
    (x1, x2), (x3, x4) = re.findall(r'<line x1="([\d.]+)" x2="([\d.]+)"[^>]*class="interval"', chart)
    (begin, width), (_, widest) = re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', chart)
    x1, x2, x3, x4, begin, width, widest = map(float, (x1, x2, x3, x4, begin, width, widest))
    # A bar of .2 ends in the middle of .1 to .3; the other row has no interval.
    assert (x1 + x2) / 2 == pytest.approx(begin + width, abs=0.2) and x2 - x1 == pytest.approx(width, abs=0.2)
    assert x3 == x4 == pytest.approx(begin + widest, abs=0.2)


def test_loading_a_run_needs_no_jax(folder):
    code = "import sys, qstar; qstar.load_run(sys.argv[1]).summary; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
