"""Where records are: JSON objects with splits, lists or columns, and folders of files; what is ambiguous is refused."""

import gzip
import json

import pytest

from qstar.data import read_records
from qstar.data.pairs import read_rows
from qstar.errors import QstarWarning, UserError
from qstar.tasks import make_task

A, B, C = ({"question": f"{x}?", "answer": x} for x in "abc")
FIELDS = ("question", "answer")
VIEWER = {
    "features": [{"feature_idx": 0, "name": "question"}],
    "rows": [{"row_idx": i, "row": r} for i, r in enumerate((A, B))],
}
COLUMNS = {"question": ["a?", "b?"], "answer": ["a", "b"]}
HELD = {
    "a list": [A, B],
    "one list": {"data": [A, B]},
    "one list of any name": {"name": "x", "version": 1, "instances": [A, B]},
    "one list of records": {"metrics": [{"name": "f1"}], "examples": [A, B]},
    "one list with a bad first row": {"data": [A, B], "notes": [{"x": 1}, {"y": 2}]},
    "the hub's viewer": VIEWER,
    "splits": {"train": [A, B], "test": [C]},
    "splits of one size": {"test": [C, C], "train": [A, B]},
    "splits of columns": {"train": COLUMNS, "test": {k: v[:1] for k, v in COLUMNS.items()}},
    "columns": COLUMNS,
    "columns of pandas": {k: {str(i): x for i, x in enumerate(v)} for k, v in COLUMNS.items()},
}


@pytest.fixture
def write(tmp_path):
    def make(name, value):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = value if isinstance(value, str) else json.dumps(value, indent=1)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return make


def refusal(source, **options):
    with pytest.raises(UserError) as caught:
        read_records(source, FIELDS, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("what", HELD)
def test_the_records_of_a_json_file(what, write):
    assert read_records(write("a.json", HELD[what]), FIELDS) == [A, B]
    assert read_records(write("a.json.gz", HELD[what]), FIELDS, split="train[1:]") == [B]
    # As a task parses them, with options instead of required fields.
    task = make_task("exact", test=str(write("a.json", HELD[what])), test_split="train")
    assert [p.gold for p in task.problems("test")] == ["a", "b"]


def test_a_task_reads_its_splits_of_one_file(write):
    rows = [{"question": f"{i} + 1?", "answer": i + 1} for i in range(40)]
    path = str(write("a.json", {"train": rows, "dev": rows[:2], "test": rows[:3]}))
    with pytest.warns(QstarWarning, match="3 of its 3 test problems are among its train problems"):
        task = make_task("numeric", train=path, test=path)
        assert len(task.problems("train")) + len(task.problems("val")) == 40 and len(task.problems("test")) == 3
    assert len(make_task("numeric", test=path, test_split="dev").problems("test")) == 2


@pytest.mark.parametrize("form, row", [
    ("pairs", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
    ("prompts", {"prompt": [{"role": "user", "content": "q"}]}),
])  # fmt: skip
def test_a_record_may_hold_a_list_of_objects(form, row, write):
    assert read_rows(write("a.json", row), form) == [row]
    assert read_rows(write("b.json", {"train": [row], "test": [row, row]}), form) == [row]
    assert read_rows(write("c.json", {key: [value] * 2 for key, value in row.items()}), form) == [row] * 2


def test_lines_are_records_whatever_they_hold(write):
    assert read_records(write("a.jsonl", json.dumps({"train": [A]})), ["train"]) == [{"train": [A]}]


def test_errors_name_the_list_and_the_record(write):
    bad = {"question": "x"}
    said = "a.json: train: record 2: field 'answer' is missing; the record has question"
    assert said in refusal(write("a.json", {"train": [A, bad], "test": [B]}))
    assert "a.json: data: record 2: field 'answer'" in refusal(write("a.json", {"version": 1, "data": [A, bad]}))
    assert "a.json: record 2: field 'answer' is missing: it is null" in refusal(
        write("a.json", {"question": ["a", "b"], "answer": ["a", None]})
    )
    both = "a.json: field 'question' is missing; the record has data (and of data, record 1: field 'answer'"
    assert both in refusal(write("a.json", {"data": [bad]}))
    assert "no records" in refusal(write("a.json", {"train": [A], "test": []}), split="test")


def test_several_lists_and_none_of_the_split_are_refused(write):
    path = write("a.json", {"easy": [A], "hard": [B, C], "notes": [{"x": 1}]})
    said = refusal(path)
    assert "a.json: has records in easy, hard, none is split 'train'" in said and "accepted is an object with" in said
    assert read_records(path, FIELDS, split="hard[:1]") == [B] and read_records(path, FIELDS, split="all") == [A, B, C]


# ---------------------------------------------------------------------------------------------------------- folders


def test_shards_are_read_in_the_order_of_their_names(tmp_path, write):
    for name, row in (("part-1.jsonl", B), ("part-0.jsonl.gz", A), ("sub/part-2.jsonl", C)):
        write(f"shards/{name}", json.dumps(row))
    for name in ("README.md", "_SUCCESS", ".part-3.jsonl", "LICENSE"):
        write(f"shards/{name}", "---\nlicense: mit\n---\n")
    for split in (None, "test"):  # no name tells of a split
        assert read_records(tmp_path / "shards", FIELDS, split=split) == [A, B, C]
    assert read_records(tmp_path / "shards", FIELDS, split="train[1:]", limit=1) == [B]
    write("shards/part-1.jsonl", '{"question": 1}')
    assert f"{tmp_path}/shards/part-1.jsonl:1: field 'answer'" in refusal(tmp_path / "shards")


@pytest.mark.parametrize("train, test", [
    ("train-00000-of-00002.csv", "test-00000-of-00001.csv"), ("data/train.csv", "data/test.csv"), ("train/0.csv", "test/0.csv"),
])  # fmt: skip
def test_names_of_files_and_folders_tell_of_splits(train, test, tmp_path, write):
    write(f"x/{train}", "question,answer\na?,a\nb?,b\n")
    write(f"x/{test}", "question,answer\nc?,c\n")
    assert read_records(tmp_path / "x", FIELDS) == [A, B]
    assert read_records(tmp_path / "x", FIELDS, split="test") == [C]
    assert sorted(r["answer"] for r in read_records(tmp_path / "x", FIELDS, split="all")) == ["a", "b", "c"]
    said = "/x: by their names its files are of train, test, none of split 'validation'"
    assert said in refusal(tmp_path / "x", split="validation")


def test_the_official_folders_of_math(tmp_path, write):
    for i, name in enumerate(
        ("train/algebra/1", "train/algebra/10", "train/geometry/2", "test/algebra/5", "test/geometry/7")
    ):
        kind = name.split("/")[1].title()
        row = {"problem": f"{i} + 1?", "level": "Level 1", "type": kind, "solution": f"\\boxed{{{i + 1}}}"}
        write(f"MATH/{name}.json", row)
    folder = str(tmp_path / "MATH")
    task = make_task("math", train=folder, test=folder)
    assert [(p.gold, p.group) for p in task.problems("test")] == [("4", "algebra"), ("5", "geometry")]
    assert sorted(p.gold for split in ("train", "val") for p in task.problems(split)) == ["1", "2", "3"]
    assert len(make_task("math", test=f"{folder}/test/algebra").problems("test")) == 1
    write("MATH/test/algebra/5.json", {"problem": "x", "level": "Level 1"})
    with pytest.raises(UserError, match="MATH/test/algebra/5.json: field 'solution'"):
        make_task("math", test=folder).problems("test")


def test_a_folder_of_several_things_is_refused(tmp_path, write):
    write("two/a.jsonl", json.dumps(A))
    write("two/b.csv", "question,answer\na?,a\n")
    assert "/two: holds files of several kinds (.csv, .jsonl); name one of them" in refusal(tmp_path / "two")
    for name in ("main", "socratic"):
        write(f"sets/{name}/train.jsonl", json.dumps(A))
    write("sets/README.md", "---\nconfigs:\n- config_name: main\n  data_files: x\n- config_name: socratic\n---\n")
    assert "/sets: holds the data sets main, socratic; name the folder" in refusal(tmp_path / "sets")
    assert read_records(tmp_path / "sets/main", FIELDS) == [A]
    (tmp_path / "empty").mkdir()
    write("notes/a.md", "x")
    for name in ("empty", "notes"):
        assert f"/{name}: is a folder; name the file inside it" in refusal(tmp_path / name)


def test_mbpp_takes_all_splits_of_its_file(write):
    rows = [
        {"task_id": n, "text": "Write f.", "code": "def f():\n    return 1", "test_list": ["assert f() == 1"]}
        for n in (2, 3, 4, 11, 601)
    ]
    path = str(write("mbpp.json", {"prompt": rows[:3], "test": rows[3:4], "train": rows[4:]}))
    task = make_task("mbpp", data=path)
    assert [len(task.problems(split)) for split in ("train", "val", "test")] == [1, 0, 1]
