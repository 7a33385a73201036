"""Measurements in processes of their own: errors, the command, and equal work on both sides."""

import fractions
import json
import os

import pytest

from qstar.__main__ import main
from qstar.bench.common import in_turn, measure, torch_product
from qstar.errors import UserError


def test_an_error_in_a_side_is_one_line_that_names_it():
    with pytest.raises(UserError, match=r"^bench, torch side: ZeroDivisionError: Fraction\(1, 0\)$"):
        measure("torch", fractions.Fraction, 1, numerator=1, denominator=0)
    with pytest.raises(UserError, match=r"^bench, torch side: the process died \(exit code 9\)"):
        measure("torch", os._exit, 1, status=9)


def test_rounds_are_said_as_they_end_and_joined(capsys):
    makers = {"torch": torch_product, "again": torch_product}
    found = in_turn(makers, 2, 3, "cpu", size=8)
    assert [len(found[side]["seconds"]) for side in makers] == [6, 6]
    said = [line.rpartition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [f"bench: torch_product, round {i} of 2" for i in (1, 1, 2, 2)]


def test_rounds_are_refused_where_the_sides_do_not_take_turns(capsys):
    assert main(["bench", "quiet_star", "--rounds=2"]) == 2
    assert capsys.readouterr().err == "qstar: bench: --rounds is not for quiet_star\n"


def test_the_bench_of_rl_gives_the_time_of_each_part_and_both_sides_do_the_same_work(capsys):
    assert main(["bench", "rl", "--json", "--quick", "--device=cpu"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [r["side"] for r in rows] == ["qstar", "torch"]
    for row in rows:
        shares = [row[k] for k in ("rollout", "answerer", "scoring", "update")]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0 and row["seconds"] > 0 and row["torch/qstar"] > 0
    assert rows[0]["recompiles"] == 0 and rows[0]["difference"] < 1e-4
