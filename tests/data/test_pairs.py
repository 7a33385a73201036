"""Rows of users' own: the forms that are read, what they become, and one line with the place for each mistake."""

import gzip
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
    "prompt with a blank completion": ("prompts", {"prompt": "1+1=", "completion": ""}, {"prompt": "1+1="}),
    "prompt of a conversation": ("prompts", {"messages": [ASK]}, {"prompt": [ASK]}),
    "conversation that ends with a reply": ("prompts", {"messages": [ASK, WRONG, ASK, SAY]}, {"prompt": [ASK, WRONG, ASK], "completion": "2"}),
    "prompt with a completion": ("prompts", {"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "completion": "2"}),
}  # fmt: skip
BAD = {
    "no completion": ("pairs", {"prompt": "x"}, "field 'completion' is missing .*the row has prompt"),
    "null": ("pairs", {"prompt": "x", "completion": None}, "field 'completion' is missing: it is null"),
    "no prompt": ("pairs", {"completion": "x", "instruction": "y"}, "field 'prompt' is missing"),
    "many keys": ("pairs", {str(i): 1 for i in range(2000)}, "the row has 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \\.\\.\\.$"),
    "empty": ("pairs", {"prompt": "x", "completion": ""}, "completion is empty"),
    "number": ("pairs", {"prompt": 3, "completion": "x"}, "prompt is of type int, not text"),
    "number as a completion": ("pairs", {"prompt": "x", "completion": 5}, "completion is of type int, not text"),
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


@pytest.mark.parametrize("form", ["pairs", "prompts"])
def test_numbers_in_a_table_are_texts_as_they_were_written(form, tmp_path):
    for cells in (["5", "7"], ["2.50", "3"], ["true", "false"], ["007", "1"]):
        text = "prompt,completion\n" + "".join(f"1,{cell}\n" for cell in cells)
        (tmp_path / "rows.csv").write_text(text)
        (tmp_path / "rows.tsv.gz").write_bytes(gzip.compress(text.replace(",", "\t").encode()))
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / "0.csv").write_text(text)
        rows = [{"prompt": "1", "completion": cell} for cell in cells]
        assert all(read_rows(tmp_path / name, form) == rows for name in ("rows.csv", "rows.tsv.gz", "shards"))


def test_a_blank_cell_is_no_completion(tmp_path):
    for cell in ("5", "text"):
        (tmp_path / "rows.csv").write_text(f"prompt,completion\na,{cell}\nb,\n")
        assert read_rows(tmp_path / "rows.csv", "prompts") == [{"prompt": "a", "completion": cell}, {"prompt": "b"}]


@pytest.mark.parametrize("rows, limit, says", [
    ([], 0, "the list is empty"), (["text"], 0, r"pairs\[0\]: is a str, not a dict"), (None, 0, "pairs: None holds no rows; give"),
    ([{"prompt": "x", "completion": "y"}] * 2, -1, "limit=-1 must be 0 or more"),
])  # fmt: skip
def test_lists_that_hold_no_rows(rows, limit, says):
    with pytest.raises(UserError, match=says):
        read_rows(rows, "pairs", limit=limit)


def test_held_out_rows_do_not_depend_on_the_order():
    rows = [{"prompt": str(i), "completion": "x"} for i in range(40)]
    train, held = split_rows(rows, 0.1, seed=0)
    assert len(held) == 4 and sorted(map(repr, train + held)) == sorted(map(repr, rows))
    again = split_rows(rows[::-1], 0.1, seed=0)[1]
    assert sorted(map(repr, held)) == sorted(map(repr, again))
    assert split_rows(rows, 0.0, seed=0) == (rows, []) and len(split_rows(rows[:5], 0.01, seed=0)[1]) == 1
    for few in (rows[:1], rows[:1] * 9):
        with pytest.raises(UserError, match="leaves none to train on"):
            split_rows(few, 0.5, seed=0)


@pytest.mark.parametrize("copies", [[2] * 40, [9, 2], [1, 30, 1, 1]])
def test_copies_of_a_row_fall_on_one_side(copies):
    rows = [{"prompt": str(i)} for i, count in enumerate(copies) for _ in range(count)]
    train, held = (sorted(row["prompt"] for row in part) for part in split_rows(rows, 0.1, seed=0))
    assert held and not set(train) & set(held) and len(held) <= max(2, len(rows) // 10)
