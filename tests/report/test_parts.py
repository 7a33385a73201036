"""The parts of a report by themselves: samples and counts of rationales, hints, curves, ticks, escaping."""

import re
from collections import Counter

import pytest

from qstar.data.sources import read_jsonl, write_jsonl
from qstar.report import charts, rationales, stats
from qstar.report.read import read_run
from tests.report.synthetic import Shape, write_run


def test_reasons_are_counted_without_their_details():
    rows = [{"verdict": "rejected", "reason": f"hint leak: {words!r}"} for words in ("as stated", "hint")]
    assert Counter(map(rationales.kind, rows)) == {("rejected", "hint leak", False, "", None): 2}


def test_a_problem_counts_under_its_best_attempt_whatever_their_order(tmp_path):
    rows = [{"problem_id": "a", "group": "2", "verdict": v} for v in ("kept", "rejected", "rationalised")]
    rows += [{"problem_id": "b", "group": "3", "verdict": v} for v in ("rationalised", "rejected")]
    write_jsonl(tmp_path / "iter_001.jsonl", rows)
    problems = rationales.read_attempts(tmp_path / "iter_001.jsonl", 10).problems
    assert problems[""] == {"kept": 1, "rationalised": 1, "rejected": 0}
    assert problems["3"] == {"kept": 0, "rationalised": 1, "rejected": 0}


def test_sample_takes_the_rare_kinds_whole_and_any_prefix_holds_all():
    rows = [{"problem_id": n, "verdict": "kept", "reason": ""} for n in range(1000)]
    rows += [{"problem_id": n, "verdict": "rejected", "reason": "leak"} for n in range(3)]
    taken = rationales.sample(rows, 50)
    assert Counter(row["verdict"] for row in taken) == {"kept": 47, "rejected": 3}
    assert {row["verdict"] for row in taken[:2]} == {"kept", "rejected"}
    assert rationales.sample(rows, 1)[0]["reason"] == "leak"  # the rare ones first
    assert rationales.sample(rows[::-1], 50) == taken  # the order in the file does not matter


@pytest.mark.parametrize(
    ("plain", "hinted", "gold", "marked"),
    [
        ("737+361=", "737+361=(1098)", "1098", ["(1098)"]),
        ("Q\n(a) x\n(b) y\nA:", "Q\n(a) x (CORRECT)\n(b) y\nA:", "a", [" (CORRECT)"]),
        (
            "In:\n1\nTarget:\nIn:\n2\nTarget:",
            "In:\n1\nTarget: 0 1\nIn:\n2\nTarget: 0 2",
            "2",
            [" 0 1", " 0 2"],
        ),
        ("5+5=", "5+5=(5+5=)", "10", ["(5+5=)"]),
        (None, "12 + 3 (15)", "15", ["15"]),
        (None, "no such thing", "15", []),
        ("something else", "12 (12)", "12", ["12"]),
    ],
)
def test_hint_is_what_the_plain_prompt_lacks(plain, hinted, gold, marked):
    assert [hinted[start:end] for start, end in rationales.hint_spans(plain, hinted, gold)] == marked


@pytest.mark.parametrize(
    ("prompt", "completion", "wrong"),
    [
        ("215+480=", "215+480,C0|1+8,5C0|...", False),
        ("215+480=(0695)", "225+480,C0|2+8,5C0|...", True),
        ("215+480=", "#695", None),
        ("Input:\n2 1 + 4 8\nTarget:\n", "<scratch>\n2 1 + 4 8 , C: 0\n", False),
        (
            "Input:\n9 9 + 1 1\nTarget:\nx\n\nInput:\n2 1 + 4 8\nTarget: 0 6 9\n",
            "<scratch>\n2 2 + 4 8 , C: 0\n",
            True,
        ),
        ("Q: how many?\nA:", "Three, I think", None),
    ],
)
def test_miscopied_operands(prompt, completion, wrong):
    assert rationales.miscopied(prompt, completion) is wrong


def test_losses_of_all_loops_stand_one_after_the_other():
    rows = [{"iteration": loop, "step": step, "loss": 10 * loop + step} for loop in (1, 2, 3) for step in (50, 100)]
    assert stats.losses(rows) == ([50, 100, 150, 200, 250, 300], [60, 110, 70, 120, 80, 130])


def test_a_row_written_twice_counts_once(tmp_path):
    write_run(tmp_path, Shape(arms=("norat",), loops=1))
    rows = read_jsonl(tmp_path / "metrics.jsonl")
    write_jsonl(tmp_path / "metrics.jsonl", [{**rows[-1], "accuracy": 0.1}, *rows])
    assert stats.metric(read_run(tmp_path).arms[0], "accuracy").x == [0, 1]


def test_labels_are_spread_without_leaving_the_chart():
    placed = charts.spread([10, 10, 12, 100], 14, 0, 110)
    assert placed == [10, 24, 38, 100]
    assert charts.spread([100, 100, 100], 14, 0, 100) == [72, 86, 100]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 35.7, [0, 10, 20, 30, 40]),
        (0, 0.013, [0, 0.005, 0.01, 0.015]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low, high, ticks):
    assert charts.nice_ticks(low, high, 5) == ticks


def test_ticks_of_loops_are_whole_numbers():
    assert charts.nice_ticks(0, 4, 8, integers=True) == [0, 1, 2, 3, 4]
    assert all(tick % 1 == 0 for tick in charts.nice_ticks(0, 36, 8, integers=True))


def test_charts_escape_names():
    line = charts.Line("<b>", (1, 2), (0, 1), 'x"')
    svg = charts.line_chart([line], title='"<i>', x_label="<u>", y_format="{:g}".format)
    assert not re.search(r"<[biu]>", svg) and "&lt;b&gt;" in svg and 'aria-label="&#34;&lt;i&gt;"' in svg


@pytest.mark.parametrize("ys", [(-3.0, -1.0), (0.0, 0.0), (-2.0, 5.0)])
def test_a_chart_covers_what_is_below_zero_and_what_is_only_zero(ys):
    line = charts.Line("a", (1, 2), ys, "red")
    svg = str(charts.line_chart([line], title="t", x_label="x", y_format=lambda v: f"<{v:g}>"))
    ticks = [float(t) for t in re.findall(r"&lt;(-?[\d.]+)&gt;", svg)]
    assert min(ticks) <= min(0, *ys) and max(ticks) >= max(0, *ys) and max(ticks) > min(ticks)
