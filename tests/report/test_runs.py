"""Lists of run folders, their status, pages that compare runs, and pages of runs that go on."""

import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from qstar.__main__ import main
from qstar.data.sources import read_jsonl, write_jsonl
from qstar.errors import UserError
from qstar.preemption import Preempted
from qstar.report import pages
from qstar.report.listing import list_runs
from qstar.report.pages.comparison import Side, answers, distinct_names, paired_answers, settings
from qstar.report.read import read_run
from qstar.runs.access import lock, unlock
from qstar.runs.folder import ending, note, open_run
from qstar.train.stats import paired
from tests.report.quiet_synthetic import write_quiet_run
from tests.report.synthetic import CURVES, Shape, write_run
from tests.report.test_report import Page
from tests.report.v_star_synthetic import write_v_star_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of three methods, one of another format version, one with a broken file."""
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "a", Shape(loops=2))
    write_run(root / "sweep" / "b", Shape(("rat",), loops=1))
    write_quiet_run(root / "quiet", texts=3)
    rows = read_jsonl(write_v_star_run(root / "verified") / "metrics.jsonl")
    best = {"arm": "v_star", "iteration": 2, "stage": "selection", "best/orm": 0.5}
    rows += [{**best, "step": k, "best/dpo": 0.1 * k, "best/dpo_low": 0.0, "best/dpo_high": 1.0} for k in (1, 8)]
    write_jsonl(root / "verified" / "metrics.jsonl", rows)
    for name, text in {"old": '{"method": "star"}', "bad": '{"method": ', "model": '{"model_type": "llama"}'}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(text)
    return root


def test_a_list_holds_every_run_folder_with_its_last_result(runs):
    rows = {row["run"]: row for row in list_runs(runs)}
    assert set(rows) == {"a", "sweep/b", "quiet", "verified", "old", "bad"}  # a model's folder is none
    assert (rows["a"]["method"], rows["a"]["status"]) == ("star", "done")
    assert (rows["a"]["value"], rows["a"]["measure"], rows["a"]["arm"]) == (
        CURVES["rat"]["3"][2],
        "3-digit accuracy",
        "rat",
    )
    assert rows["a"]["low"] < rows["a"]["value"] < rows["a"]["high"]
    assert rows["quiet"]["measure"] == "accuracy on hard tokens"
    verified = [rows["verified"][key] for key in ("measure", "value", "low", "high")]
    assert verified == ["best of 8 by the DPO verifier", 0.8, 0.0, 1.0]


def test_a_folder_that_cannot_be_read_hides_no_other(runs, monkeypatch):
    iterdir = pathlib.Path.iterdir

    def refused(path):
        if path.name == "sweep":
            raise PermissionError(13, "Permission denied")
        return iterdir(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", refused)
    assert {row["run"] for row in list_runs(runs)} == {"a", "quiet", "verified", "old", "bad"}


def test_folders_of_another_format_or_with_a_broken_file_are_named(runs, capsys):
    rows = {row["run"]: row for row in list_runs(runs)}
    assert [rows[name]["status"] for name in ("old", "bad")] == ["unreadable"] * 2
    assert main(["runs", str(runs)]) == 0
    shown = capsys.readouterr().out
    assert f"{runs / 'old'}: the run folder has format_version 1" in shown and "config.json:1: broken JSON" in shown
    assert main(["report", str(runs / "old")]) == 2 and "format_version 1" in capsys.readouterr().err


def test_the_json_of_a_list_is_an_object_per_run(runs, capsys, monkeypatch):
    monkeypatch.chdir(runs.parent)
    assert main(["runs", str(runs), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["run"] for row in found} >= {"a", "quiet"} and found[0].keys() >= {"seconds", "parameters", "started"}
    assert main(["runs", "nowhere"]) == 2 and "nowhere: no such folder" in capsys.readouterr().err


def test_a_list_and_a_comparison_need_no_jax(runs):
    code = (
        "import sys; from qstar.__main__ import main; main(['runs', sys.argv[1]]); "
        "main(['report', sys.argv[1] + '/a', sys.argv[1] + '/quiet', '--out', sys.argv[1] + '/x.html']); "
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(runs)], check=True, capture_output=True)


# -------------------------------------------------------------------------------------------------------------- status


def test_status_follows_the_lock_and_what_the_process_noted(tmp_path):
    run = write_run(tmp_path / "run", Shape(("rat",), loops=1, status=None))
    (run / "environment.json").unlink()
    config = {k: v for k, v in json.loads((run / "config.json").read_text()).items() if k != "format_version"}
    status = lambda: read_run(run).status  # noqa: E731
    assert status() == "interrupted"  # an arm has no status.json
    open_run(run, config)
    note(run, parameters=334_368)
    assert status() == "running" and list_runs(run)[0]["parameters"] == 334_368
    for outcome, error in (("failed", OSError()), ("interrupted", Preempted()), ("done", None)):
        with contextlib.suppress(OSError, Preempted), ending(run):
            if error:
                raise error
        assert status() == outcome
        open_run(run, config)
    assert json.loads((run / "environment.json").read_text()).get("outcome") is None
    unlock(run)
    assert status() == "interrupted"  # killed: no end was noted


def test_the_lock_of_another_process_is_found_and_kept(tmp_path):
    run = write_run(tmp_path / "run", Shape(("rat",), loops=1))
    code = "import sys, pathlib; from qstar.runs.access import lock; lock(pathlib.Path(sys.argv[1])); print(); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(run)], **pipes) as other:
        other.stdout.readline()
        assert read_run(run).status == "running"
        with pytest.raises(UserError, match=f"process {other.pid} on"):
            lock(run)
        other.communicate("\n")
    assert read_run(run).status == "done"
    lock(run)  # looking at it has left no lock
    unlock(run)


# ---------------------------------------------------------------------------------------------------------- comparison


def test_a_comparison_states_settings_results_and_paired_differences(runs, tmp_path):
    other = shutil.copytree(runs / "a", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["train"]["optim"]["lr"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    path = other / "rat" / "evaluation" / "iter_002.jsonl"
    rows = read_jsonl(path)
    write_jsonl(path, [{**row, "correct": row["correct"] and i % 4 > 0} for i, row in enumerate(rows)])
    page = Page(pages.compare_runs([runs / "a", other], tmp_path / "page.html"))
    assert page.table("setting") == [["train.optim.lr", "0.0015", "0.5"]]
    before, after = ([float(r["correct"] and (i % 4 > 0 or not k)) for i, r in enumerate(rows)] for k in (0, 1))
    low, difference, high = paired(before, after)
    expected = [
        f"{len(rows)} of {len(rows)}",
        f"{100 * difference:+.1f}",
        f"{100 * low:+.1f} to {100 * high:+.1f}",
        "worse",
    ]
    found = next(r for r in page.table("from → to") if r[0].strip() == "a · rat → other · rat")
    assert [found[1], *found[4:]] == expected
    assert [r[:3] for r in page.table("run", "arm")][0] == ["a", "rat", "3-digit accuracy"]
    titles = [attributes.get("aria-label") for name, attributes in page.elements if name == "svg"]
    assert {"Accuracy", "Accuracy · 3 digits", "Training loss", "3-digit accuracy"} <= set(titles)


def test_a_comparison_across_methods_says_what_cannot_be_compared(runs, tmp_path):
    names = [runs / "a", runs / "quiet", runs / "verified"]
    page = Page(pages.compare_runs(names, tmp_path / "page.html"))
    assert "The runs answer different tasks" in page.text and "has no answers by problem: not paired" in page.text
    assert "not named" not in page.text and "Settings that only some of the runs have" in page.text


def test_only_problems_with_the_same_id_and_answer_are_paired(runs):
    a, b = (read_run(runs / name, rollouts=False) for name in ("a", "sweep/b"))
    sides = [Side("a", a, a.arms[0]), Side("b", b, b.arms[0])]
    common = answers(sides[0]).keys() & answers(sides[1]).keys()
    rows, without = paired_answers(sides)
    assert rows[0][2][0] == len(common) and not without
    assert not settings([a, a])[0] and distinct_names([runs / "a" / "x", runs / "b" / "x"]) == ["a/x", "b/x"]


def test_a_file_that_is_no_page_of_qstar_is_kept(runs, tmp_path, capsys):
    out = tmp_path / "thesis.html"
    out.write_text("<p>mine")
    two = [str(runs / "a"), str(runs / "quiet")]
    assert main(["report", *two, f"--out={out}"]) == 2 and out.read_text() == "<p>mine"
    assert "is there, and no page of qstar" in capsys.readouterr().err
    assert main(["report", two[0], f"--out={out}"]) == 2 and main(["report", two[0], two[0]]) == 2
    assert "is named twice" in capsys.readouterr().err
    out.unlink()
    assert main(["report", *two, f"--out={out}"]) == 0 and main(["report", *two, f"--out={out}"]) == 0


# --------------------------------------------------------------------------------------------------------------- watch


def test_a_watched_page_reloads_itself_until_the_run_ends(tmp_path):
    run = write_run(tmp_path / "run", Shape(("rat",), loops=1))
    written = []

    def write(refresh):
        path = pages.write_report(run, refresh)
        written.append((refresh, re.findall(r'data-refresh="(\d+)"', path.read_text())))
        if len(written) == 2:
            unlock(run)
        return path

    lock(run)
    assert pages.watch([run], write, 1) == run / "report.html"
    assert written == [(1, ["1"]), (1, ["1"]), (0, [])]


def test_a_watch_that_is_interrupted_leaves_a_page_without_reload(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", Shape(("rat",), loops=1))
    lock(run)

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(pages.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pages.watch([run], lambda refresh: pages.write_report(run, refresh), 5)
    unlock(run)
    assert "data-refresh=" not in (run / "report.html").read_text()
