"""Rows of users' own: the forms that are read, what they become, and one line with the place for each mistake."""

import json

import pytest

from qstar.data.pairs import read_rows, split_rows
from qstar.errors import UserError

ASK, SAY, WRONG = (
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "assistant", "content": "3"},
)
READ = {
    "texts": ("pairs", {"prompt": "1+1=", "completion": "2", "id": 7}, {"prompt": "1+1=", "completion": "2"}),
    "messages": ("pairs", {"messages": [ASK, {**SAY, "name": "x"}]}, {"messages": [ASK, SAY]}),
    "prompt of messages": ("pairs", {"prompt": [ASK], "completion": [SAY]}, {"prompt": [ASK], "completion": "2"}),
    "preference": ("preferences", {"prompt": "1+1=", "chosen": "2", "rejected": "3"}, {"prompt": "1+1=", "chosen": "2", "rejected": "3"}),
    "whole conversations": (
        "preferences", {"prompt": "1+1?", "chosen": [ASK, SAY], "rejected": [ASK, WRONG]},
        {"prompt": [ASK], "chosen": "2", "rejected": "3"},
    ),
    "prompt alone": ("prompts", {"prompt": "1+1="}, {"prompt": "1+1="}),
    "prompt with a completion": ("prompts", {"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "2"}),
}  # fmt: skip
BAD = {
    "no completion": ("pairs", {"prompt": "x"}, "field 'completion' is missing .*the row has prompt"),
    "no prompt": ("pairs", {"completion": "x", "instruction": "y"}, "field 'prompt' is missing"),
    "empty": ("pairs", {"prompt": "x", "completion": ""}, "completion is empty"),
    "number": ("pairs", {"prompt": 3, "completion": "x"}, "prompt: must be a list of"),
    "no assistant": ("pairs", {"messages": [ASK]}, "none is of the assistant"),
    "no role": ("pairs", {"messages": [{"content": "x"}]}, "messages: message 0 must be"),
    "ends with the user": (
        "pairs",
        {"prompt": "x", "completion": [SAY, ASK]},
        "its last message is of the role 'user'",
    ),
    "equal": ("preferences", {"prompt": "x", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    "two conversations": ("preferences", {"chosen": [ASK, SAY], "rejected": [SAY, WRONG]}, "different conversations"),
}


@pytest.mark.parametrize("case", READ)
def test_a_row_is_read_from_lists_and_files(case, tmp_path):
    form, row, found = READ[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert read_rows([row], form) == read_rows(tmp_path / "rows.jsonl", form) == [found]


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_named_with_its_place(case, tmp_path):
    form, row, says = BAD[case]
    good = {"prompt": "x", "completion": "y", "chosen": "y", "rejected": "z"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(good) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:3: .*{says}"):
        read_rows(str(tmp_path / "rows.jsonl"), form)
    with pytest.raises(UserError, match=rf"^{form}\[1\]: .*{says}"):
        read_rows([good, row], form)


def test_lists_that_hold_no_rows():
    for rows, says in (([], "the list is empty"), (["text"], r"pairs\[0\]: is a str, not a dict")):
        with pytest.raises(UserError, match=says):
            read_rows(rows, "pairs")


def test_held_out_rows_do_not_depend_on_the_order():
    rows = [{"prompt": str(i), "completion": "x"} for i in range(40)]
    train, held = split_rows(rows, 0.1, seed=0)
    assert len(held) == 4 and sorted(map(repr, train + held)) == sorted(map(repr, rows))
    again = split_rows(rows[::-1], 0.1, seed=0)[1]
    assert sorted(map(repr, held)) == sorted(map(repr, again))
    assert split_rows(rows, 0.0, seed=0) == (rows, []) and len(split_rows(rows[:5], 0.01, seed=0)[1]) == 1
    with pytest.raises(UserError, match="leaves none to train on"):
        split_rows(rows[:1], 0.5, seed=0)
