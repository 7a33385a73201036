import builtins
import gzip
import json
import os

import numpy as np
import pytest

from qstar.data import read_jsonl, read_records, sources, write_jsonl
from qstar.errors import UserError

ROWS = [{"question": "1+1?", "answer": "2"}, {"question": "é 漢\u2028字", "answer": "3"}]
FIELDS = ("question", "answer")


@pytest.fixture
def file(tmp_path):
    def make(name, content):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def refusal(source, fields=FIELDS, **options):
    """The message that a bad source is refused with: always one line."""
    with pytest.raises(UserError) as caught:
        read_records(source, fields, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_formats_hold_the_same_records(tmp_path, file):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_jsonl(tmp_path / "a.jsonl", ROWS)
    file("a.json", json.dumps(ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    file("a.csv", "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS))
    assert read_records(tmp_path / "a.csv", FIELDS) == [{**row, "answer": int(row["answer"])} for row in ROWS]
    for name in ("a.jsonl", "a.json", "a.parquet"):
        assert read_records(tmp_path / name, FIELDS) == ROWS
        assert read_records(str(tmp_path / name), FIELDS, limit=1) == ROWS[:1]


@pytest.mark.parametrize("cells, values", [
    ("7 -12", [7, -12]), ("- 5", [None, 5]), ("- x", ["", "x"]),
    *((cells, cells.split()) for cells in (
        "007 012", "2.50 1", "true False", "2020-01-02 2021-01-02", "12:30 13:00", "x 5", "12345678901234567890 0.5", "1 2e400",
        "NA nan", "NA 5", "+5 1", "-0 1",
    )),
])  # fmt: skip
def test_csv_cells_stay_as_they_were_written(file, cells, values):
    path = file("a.csv", "q,a\n" + "".join(f"q,{'' if cell == '-' else cell}\n" for cell in cells.split()))
    assert [row["a"] for row in read_records(path, ["q"])] == values


def test_csv_heads_are_different(file):
    assert "a.csv: several columns are named 'answer'" in refusal(file("a.csv", "question,answer,answer\nx,1,2\n"))
    assert read_records(file("a.csv", "question,answer,,\nx,1,,\n"), FIELDS)[0]["answer"] == 1


def test_csv_fields_have_line_breaks_in_long_files_too(file):
    rows = "".join(f'"line {i}\nline two",{i}\n' for i in range(60_000))  # above a block of 1 MiB
    assert read_records(file("a.csv", "q,a\n" + rows), ["q"])[-1] == {"q": "line 59999\nline two", "a": 59_999}


LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PACKED = gzip.compress(LINES, mtime=0)


@pytest.mark.parametrize("name, content", [
    ("a.jsonl.gz", PACKED), ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)), ("a.json", LINES),
    ("a.jsonl", json.dumps(ROWS, indent=1).encode()), ("a.json.gz", PACKED), ("a.jsonl", PACKED), ("a.jsonl.gz", LINES),
    ("a.json", b"\xef\xbb\xbf" + LINES),
], ids=str)  # fmt: skip
def test_what_a_file_holds_decides_how_it_is_read(file, name, content):
    assert read_records(file(name, content), FIELDS) == ROWS


def test_parquet_under_another_name(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.json")
    assert read_records(tmp_path / "a.json", FIELDS) == ROWS


@pytest.mark.parametrize("content, said", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"), (b"PK\x03\x04...", "a zip archive"),
    (b"<!DOCTYPE html><html>", "HTML"), (b"\x28\xb5\x2f\xfd..", "zstd"), (b"ARROW1\0\0", "an Arrow file"),
    (gzip.compress(LINES * 99, mtime=0)[:-9], "gzip data is damaged"), (PACKED[:12], "gzip data is damaged"),
], ids=str)  # fmt: skip
def test_what_is_no_json_is_named(file, content, said):
    for name in ("a.json", "b.jsonl", "c.jsonl.gz"):
        path = file(name, content)
        assert str(path) in refusal(path) and said in refusal(path)


def test_a_bad_line_of_json_lines_named_json_is_named(file):
    assert "a.json:2: not JSON" in refusal(file("a.json", '{"question": 1, "answer": 1}\n{"question": \n'))
    assert "a.jsonl.gz:1: field 'answer'" in refusal(file("a.jsonl.gz", gzip.compress(b'{"question": 1}\n')))


def test_home_folder_is_expanded(tmp_path, file, monkeypatch):
    file("a.jsonl", '{"x": 1}\n')
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_records("~/a.jsonl", ["x"]) == [{"x": 1}]


def test_blank_lines_byte_order_mark_and_extra_fields_are_fine(file):
    path = file("a.jsonl", '\ufeff{"x": 1, "y": 2}\n\n  \n{"x": 3}')
    assert read_records(path, ["x"]) == [{"x": 1, "y": 2}, {"x": 3}]


def test_limit_reads_no_further_than_it_must(file):
    assert read_records(file("a.jsonl", '{"x": 1}\nbroken'), ["x"], limit=1) == [{"x": 1}]


def test_missing_file(tmp_path):
    assert "no.jsonl: no such file" in refusal(tmp_path / "no.jsonl")
    assert "no such file" in refusal("data/no.jsonl")
    assert "no such file" in refusal("nodata/train.csv")


def test_folder_instead_of_file(tmp_path):
    assert "is a folder; name the file" in refusal(tmp_path)


def test_unknown_ending_lists_the_known_ones(file):
    message = refusal(file("a.xlsx", "x\n1\n"))
    assert "unknown ending '.xlsx'" in message and ".jsonl, .json, .parquet, .csv" in message


def test_bad_line_names_file_and_line(file):
    path = file("a.jsonl", '{"question": 1, "answer": 1}\n\n{"question": \n')
    assert "a.jsonl:3: not JSON" in refusal(path)


def test_bad_json_array(file):
    assert "a.json: not JSON" in refusal(file("a.json", "[1,\n 2,,]"))
    assert "b.json: field 'question' is missing; the record has version, data" in refusal(
        file("b.json", '{"version": 1,\n "data": [{"question": 1}]}')
    )


def test_line_that_is_not_an_object(file):
    path = file("a.jsonl", '{"x": 1}\n[1]\n')
    assert "a.jsonl:2: a record must be a JSON object, not list" in refusal(path, ["x"])


def test_missing_field_names_file_line_and_field(file):
    path = file("a.jsonl", '{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    assert "a.jsonl:2: field 'answer' is missing; the record has question" in refusal(path)
    assert "a.jsonl:1: field 'answer' is missing: it is null" in refusal(
        file("a.jsonl", '{"question": "a", "answer": null}')
    )


def test_the_other_tables_hold_the_same_records(file):
    rows = [{"question": "a", "answer": 1}, {"question": 'b "c"', "answer": 2}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    table = 'question\tanswer\na\t1\n"b ""c"""\t2\n'
    for name, text in {"a.tsv": table, "a.csv": table.replace("\t", ","), "a.ndjson": lines}.items():
        assert read_records(file(name, text), FIELDS) == rows
        assert read_records(file(f"{name}.gz", gzip.compress(text.encode(), mtime=0)), FIELDS) == rows
    assert read_records(file("a.csv", table.replace("\t", ",")), FIELDS, texts=True)[1]["answer"] == "2"


def test_of_many_fields_ten_are_named(file):
    line = refusal(file("a.jsonl", json.dumps({f"k{i}": 1 for i in range(2000)}) + "\n"))
    assert line.endswith("the record has " + ", ".join(f"k{i}" for i in range(10)) + ", ...")


def test_empty_sources(file):
    assert "no records" in refusal(file("a.jsonl", ""))
    assert "no records" in refusal(file("a.jsonl", "\n\n"))
    assert "no records" in refusal(file("a.json", "[]"))


def test_text_that_is_not_utf8(file):
    assert "a.jsonl:2: not UTF-8" in refusal(file("a.jsonl", b'{"x": 1}\n{"x": "\xff"}\n'), ["x"])


def test_unreadable_parquet(file):
    assert "a.parquet: not a readable parquet file" in refusal(file("a.parquet", "not parquet at all"))


def test_file_without_permission(file, monkeypatch):
    path = file("a.jsonl", "{}")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", refuse)  # chmod does not stop the root user
    monkeypatch.setattr("io.open", refuse)
    assert "cannot be read (Permission denied)" in refusal(path)


def test_limit_of_nothing_is_refused(file):
    assert "limit=0" in refusal(file("a.jsonl", "{}"), limit=0)


def test_neither_file_nor_hub_name():
    assert "neither a file nor a hub name" in refusal("gsm8k")


def test_parse_errors_carry_the_place(file):
    def parse(record):
        raise ValueError("the answer has no number")

    path = file("a.jsonl", '{"x": 1}\n')
    assert "a.jsonl:1: the answer has no number" in refusal(path, ["x"], parse=parse)
    said = refusal(path, ["x"], parse=lambda record: record["x"] / 0)
    assert "a.jsonl:1: not of the expected form (ZeroDivisionError: " in said
    assert read_records(path, ["x"], parse=lambda record: record["x"]) == [1]


def test_deep_nesting_is_read(file):
    line = '{"x": ' + "[" * 600 + '"\\ud83d"' + "]" * 600 + "}"
    assert "field 'x' has half a surrogate pair" in refusal(file("a.jsonl", line), ["x"])


def test_hub_name_config_and_split_reach_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((*a, k["split"])) or ROWS)
    assert read_records("openai/gsm8k:main", FIELDS, split="test", limit=1) == ROWS[:1]
    assert read_records("tau/commonsense_qa", FIELDS) == ROWS
    assert calls == [("openai/gsm8k", "main", "test"), ("tau/commonsense_qa", None, "train")]
    assert "tau/x (train): record 1: field 'nope'" in refusal("tau/x", ["nope"])


def test_hub_trouble_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise ConnectionError("Couldn't reach it\nTraceback: a long story\n")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refusal("openai/gsm8k:main", split="test")
    assert "openai/gsm8k:main (split 'test')" in message and "Couldn't reach it" in message


def test_the_whole_error_of_datasets_is_shown(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*args, **kwargs):
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['algebra', 'geometry']"
        )

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "among the available configs: ['algebra', 'geometry']" in refusal("EleutherAI/hendrycks_math")


def test_the_defaults_on_the_hub_can_be_read(monkeypatch):
    """The hub, imitated: MATH has a configuration per subject and none of all, and a loading script is not run."""
    datasets = pytest.importorskip("datasets")
    from qstar.tasks import make_task

    subjects = (
        "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra precalculus".split()
    )
    math = {"problem": "1+1", "level": "Level 1", "solution": "\\boxed{2}"}
    hop = {
        "_id": "1",
        "question": "Which?",
        "answer": "Elbe",
        "context": '[["A", ["The Elbe."]]]',
        "supporting_facts": '[["A", 0]]',
    }

    def load_dataset(path, name=None, *, split=None, data_files=None):
        if path == "EleutherAI/hendrycks_math" and name in subjects:
            return [{**math, "type": name}] * (2 if split == "test" else 3)
        if (
            path == "parquet"
            and data_files == f"hf://datasets/xanhho/2WikiMultihopQA/{'dev' if n == 'test' else 'train'}.parquet"
        ):
            return [hop] * (2 if n == "test" else 60)
        raise RuntimeError(f"not on the hub: {path} {name} {data_files}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for n in ("test", "train", "val"):
        problems = make_task("math").problems(n)
        assert [p.group for p in problems[:: 2 if n == "test" else 3]] == (subjects if problems else [])
        assert len({p.id for p in problems}) == len(problems)
        found = make_task("2wikimultihopqa").problems(n)
        assert (not found or found[0].gold == "elbe") and (n != "test" or len(found) == 2)


def test_written_rows_come_back(tmp_path):
    rows = [{"b": 1, "a": "é\n\u2028 漢"}, {"half": "\ud83d", "n": None}]
    write_jsonl(tmp_path / "new" / "a.jsonl", [*rows, {"x": np.float32(0.5), "y": np.arange(2)}])
    assert read_jsonl(tmp_path / "new" / "a.jsonl") == [*rows, {"x": 0.5, "y": [0, 1]}]
    content = (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8")
    assert content.startswith('{"b": 1, "a": "é') and content.endswith("}\n")


def test_empty_list_is_an_empty_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [])
    assert read_jsonl(tmp_path / "a.jsonl") == []


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    def rows():
        yield {"x": 2}
        raise KeyboardInterrupt

    write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    with pytest.raises(KeyboardInterrupt):
        write_jsonl(tmp_path / "a.jsonl", rows())
    with pytest.raises(TypeError, match="object"):
        write_jsonl(tmp_path / "a.jsonl", [{"x": object()}])
    assert read_jsonl(tmp_path / "a.jsonl") == [{"x": 1}]
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_rows_are_on_disk_before_the_name_is_taken(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(sources.os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(sources.os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    write_jsonl(tmp_path / "a.jsonl", [{"x": 1}])
    assert events == ["fsync", "replace"]


def test_read_jsonl_names_a_bad_line(file):
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        read_jsonl(file("a.jsonl", '{"x": 1}\n{"x"'))
    with pytest.raises(UserError, match="no such file"):
        read_jsonl("absent.jsonl")
