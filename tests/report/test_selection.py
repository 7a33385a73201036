"""What a report and an evaluation's page tell of choosing: the numbers of the files, and the texts as text."""

import json

import pytest

from qstar.methods.score_samples import by_scores
from qstar.methods.select import Candidates
from qstar.report import pages
from qstar.report.pages.v_star import CASES, SCORERS, curve_rows, headline, read_cases, selection_of, write_evaluation
from qstar.runs.evaluate import many
from qstar.types import Rollout
from tests.report.test_report import Page
from tests.report.v_star_synthetic import write_v_star_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_v_star_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def page(folder):
    return Page(pages.write_report(folder))


def found(folder, arm="v_star", n=2):
    return json.loads((folder / arm / "selection" / f"iter_{n:03d}.json").read_text())


def interval(values):
    return "{:.3f} {:.3f}–{:.3f}".format(*values)


def test_the_table_of_rules_holds_curves_areas_regret_and_calibration(folder, page):
    rows = {row[0]: row[1:] for row in page.table("rule", "k = 1", "k = 2", "k = 4", "AUC in problems")}
    told = found(folder)
    assert rows["majority vote"][:3] == [interval(told["curves"]["majority"][k]) for k in "124"]
    for name in ("dpo", "generator", "orm"):
        cells, fits = rows[SCORERS[name]], told["calibration"][name]
        assert cells[:3] == [interval(told["curves"][f"best/{name}"][k]) for k in "124"]
        assert cells[3:6] == [
            f"{told['auc'][name]:.3f}",
            f"{told['auc_pooled'][name]:.3f}",
            interval(told["regret"][name]["4"]),
        ]
        raw = f" ({fits['ece_raw']:.3f})" if name == "orm" else ""
        assert cells[6] == f"{fits['ece']:.3f}{raw}"
    assert "headroom" in page.text and "0.652" in page.text  # the gates of G_SFT
    assert headline(told) in page.text and "V-STaR verifier (DPO)" in headline(told)


def test_mistakes_are_told_by_kind_with_their_share(folder, page):
    rows = {row[0]: row[1:] for row in page.table("AUC by first mistake")}
    told = found(folder)["auc_by_fault"]
    total = sum(kind["samples"] for kind in told.values())
    assert rows.keys() == told.keys() == {"wrong carry", "copied sum", "copied answer", "skipped line"}
    for kind, row in rows.items():
        assert row[0] == f"{told[kind]['samples']:,} ({told[kind]['samples'] / total:.1%})"
        assert f"{told[kind]['auc']['dpo']:.3f}" in row


def test_areas_by_iteration_are_a_table_and_a_chart(folder, page):
    rows = page.table("AUC after iteration")
    assert [row[0] for row in rows] == ["1", "2"] and f"{found(folder, n=1)['auc']['dpo']:.3f}" in rows[0]
    labels = [a.get("aria-label", "") for name, a in page.elements if name == "svg"]
    assert "AUC within problems by iteration, V-STaR" in labels


def test_solutions_stand_side_by_side_as_both_rank_them(folder, page):
    cases = read_cases(folder, "v_star", 2, ("dpo", "generator"))
    assert [c.kind for c in cases] == sorted(c.kind for c in cases)
    assert {0, 1} <= {c.kind for c in cases} and max(sum(c.kind == k for c in cases) for k in range(len(CASES))) == 2
    for case in cases:
        for order in case.orders.values():
            assert [r.score for r in order] == sorted((r.score for r in order), reverse=True)
            assert len({r.completion for r in order}) == len(order) <= 4
        firsts = [order[0].correct for order in case.orders.values()]
        assert firsts == {0: [True, False], 1: [False, True], 2: [True, True], 3: [False, False]}[case.kind]
        assert case.prompt.strip() in page.text
    assert "<script>document" not in page.source and "document.title='owned'" in page.text
    assert (
        read_cases(folder, "v_star", 9, ("dpo", "generator"))
        == []
        == read_cases(folder, "v_star", 2, ("prm_min", "generator"))
    )


def test_a_run_measured_before_there_was_more_to_tell_has_its_page(folder, tmp_path):
    run = write_v_star_run(tmp_path / "old", ("verification",), problems=6)
    path = run / "verification" / "selection" / "iter_001.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in old.items() if k not in ("regret", "calibration", "auc_by_fault")}))
    rows = Page(pages.write_report(run)).table("rule", "k = 1")
    assert len(next(row for row in rows if row[0] == SCORERS["dpo"])) == 1 + 3 + 2  # the values of k, and both areas


def test_an_evaluation_has_a_chart_over_k_with_every_scorer(folder, tmp_path):
    rows = [
        Rollout(**json.loads(r)) for r in (folder / "v_star/selection/samples_002_000.jsonl").read_text().splitlines()
    ]
    scores = [json.loads(r)["dpo"] for r in (folder / "v_star/selection/scores_002.jsonl").read_text().splitlines()]
    scorer = lambda prompts, texts: __import__("numpy").reshape(scores, (len(prompts), -1))  # noqa: E731
    result = {"problems": 30, "accuracy": 0.5, **many(rows, 4), **by_scores(rows, 4, {"mine": scorer}, tmp_path)}
    told = found(folder)
    told_of = selection_of(result)
    curves = told_of["curves"]
    assert curves["best/mine"]["4"] == pytest.approx(told["curves"]["best/dpo"]["4"])
    assert curves["pass"]["2"] == pytest.approx(told["curves"]["pass"]["2"])
    worth = told_of
    assert worth["auc"]["mine"] == told["auc"]["dpo"] and worth["regret"]["mine"] == told["regret"]["dpo"]
    assert worth["calibration"]["mine"] == told["calibration"]["dpo"]
    printed = {row["rule"]: row for row in curve_rows(result)}
    assert printed["best/mine"]["k=4"].startswith(f"{result['best@4:mine']:.3f} (") and printed["best/mine"]["AUC"]
    page = Page(write_evaluation(tmp_path, "sums, test", result, 4))
    names = {row[0] for row in page.table("rule", "k = 1")}
    assert {"any of k (ceiling)", "majority vote", "own log-probability", "mine", "weighted vote by mine"} <= names
    titles = [t for t in page.text.split("\n") if "mine" in t]
    assert (
        page.source.count("<polyline") == 4 and page.source.count("<polygon") == 3 and titles
    )  # bands but for the ceiling
    assert "http" not in page.source.split("</head>")[0].replace("http-equiv", "")


def test_candidates_count_problems_without_samples_of_a_kind_nowhere():
    from qstar.methods.select import auc_by_fault

    assert auc_by_fault([Candidates(["right"], [True], {"v": [1.0]})], [[None]]) == {}
