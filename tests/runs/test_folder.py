"""A run folder is started once, gone on with, and never mixed with anything else."""

import json
import zlib

import pytest

from qstar.errors import QstarWarning, TrainingFailed, UserError
from qstar.methods.pairs import PairData
from qstar.methods.quiet_star import QuietConfig
from qstar.models.thought_config import ThoughtConfig
from qstar.runs import folder as run_folder
from qstar.runs.folder import cached_jsonl, once_json, open_run, stable_seed, write_json
from qstar.runs.settings import check_keys, settings_from
from tests.methods import stub

CONFIG = {"name": "a", "seed": 0, "task": {"pool": {"1": 40}, "seeds": {"1": (3, 4)}}, "log": {"wandb": {}}}


def tree(folder):
    return {p: (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns) for p in folder.rglob("*")}


def test_a_new_folder_holds_config_and_environment(tmp_path):
    open_run(tmp_path / "a" / "b", CONFIG)
    expected = {"format_version": run_folder.FORMAT_VERSION, **json.loads(json.dumps(CONFIG))}
    assert json.loads((tmp_path / "a/b/config.json").read_text()) == expected
    environment = json.loads((tmp_path / "a/b/environment.json").read_text())
    assert environment["platform"] == "cpu" and environment["jax"] and environment["command"]
    assert sorted(p.name for p in (tmp_path / "a/b").iterdir()) == [
        ".checksums",
        ".lock",
        "config.json",
        "environment.json",
    ]


def test_the_same_config_goes_on(tmp_path):
    open_run(tmp_path / "a", CONFIG)
    before = (tmp_path / "a/config.json").stat().st_mtime_ns
    open_run(tmp_path / "a", CONFIG)
    assert (tmp_path / "a/config.json").stat().st_mtime_ns == before


def test_another_config_is_refused_by_its_first_difference_and_nothing_changes(tmp_path):
    open_run(tmp_path / "a", CONFIG)
    before = tree(tmp_path)
    other = {**CONFIG, "seed": 1, "task": {"pool": {"1": 41}, "seeds": {"1": (3, 4)}}}
    with pytest.raises(UserError, match=r"config\.seed=0, now it is 1") as caught:
        open_run(tmp_path / "a", other)
    assert "\n" not in str(caught.value) and str(tmp_path / "a") in str(caught.value)
    with pytest.raises(UserError, match=r"config\.task\.pool\.1=40, now it is 41"):
        open_run(tmp_path / "a", {**CONFIG, "task": other["task"]})
    with pytest.raises(UserError, match=r"config\.extra='\(absent\)', now it is 1"):
        open_run(tmp_path / "a", {**CONFIG, "extra": 1})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("version", [None, 1, run_folder.FORMAT_VERSION + 1])
def test_another_format_is_refused_in_a_line_that_names_it(tmp_path, version):
    open_run(tmp_path / "a", CONFIG)
    old = {} if version is None else {"format_version": version}
    write_json(tmp_path / "a/config.json", {**CONFIG, **old})
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"format_version {version or 1}, and this version of qstar reads") as caught:
        open_run(tmp_path / "a", CONFIG)
    assert "\n" not in str(caught.value) and tree(tmp_path) == before


def test_a_whole_run_of_another_config_is_refused(tmp_path, monkeypatch):
    from qstar.methods import star

    stub.script(monkeypatch, lambda *_: None)
    with pytest.raises(TrainingFailed, match="0 rows kept"):
        star.run(stub.config(), tmp_path / "a", stub.Silent())
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"config\.train\.lr=0\.01, now it is 0\.02"):
        star.run(stub.config(train={"lr": 0.02}), tmp_path / "a", stub.Silent())
    assert tree(tmp_path) == before


def test_what_is_only_shown_may_differ(tmp_path):
    open_run(tmp_path / "a", CONFIG)
    open_run(tmp_path / "a", {**CONFIG, "log": {"wandb": {"project": "sums"}}})
    with pytest.raises(UserError, match="config.task.log"):  # a section of that name further down is no such thing
        open_run(tmp_path / "a", {**CONFIG, "task": {**CONFIG["task"], "log": 1}})


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="thesis.tex"):
        open_run(tmp_path, CONFIG)
    assert tree(tmp_path) == before


def test_a_run_that_was_killed_before_its_config_was_there_can_be_started(tmp_path):
    (tmp_path / "config.json.tmp").write_text("{")
    open_run(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text())["name"] == "a"


@pytest.mark.parametrize("workdir", ["/proc/qstar_test", "{tmp}/file", "{tmp}/file/below"])
def test_a_folder_that_cannot_be_written_is_named(workdir, tmp_path):
    """/proc refuses even root, whom permissions do not stop."""
    (tmp_path / "file").write_text("x")
    workdir = workdir.format(tmp=tmp_path)
    with pytest.raises(UserError, match=workdir):
        open_run(run_folder.Path(workdir), CONFIG)
    assert (tmp_path / "file").read_text() == "x"


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{\n"name": ')
    with pytest.raises(UserError, match="config.json"):
        open_run(tmp_path, CONFIG)


def test_once_makes_a_file_once_and_gives_back_the_same_rows(tmp_path):
    rows = [{"text": "é\u2028\n\ud800", "x": 0.1 + 0.2, "none": None}]
    calls = []

    def make():
        calls.append(1)
        return rows

    found = [cached_jsonl(tmp_path / "deep" / "a.jsonl", make) for _ in range(2)]
    assert found == [rows, rows] and len(calls) == 1
    assert (
        cached_jsonl(tmp_path / "empty.jsonl", list) == [] == cached_jsonl(tmp_path / "empty.jsonl", make)
        and len(calls) == 1
    )
    values = [once_json(tmp_path / "deep" / "a.json", lambda n=n: {"n": n}) for n in (1, 2)]
    assert values == [{"n": 1}] * 2


def test_a_file_that_could_not_be_made_is_not_there(tmp_path):
    def make():
        raise RuntimeError

    for path, function in (("a.jsonl", cached_jsonl), ("a.json", once_json)):
        with pytest.raises(RuntimeError):
            function(tmp_path / path, make)
    with pytest.raises(TypeError):
        cached_jsonl(tmp_path / "b.jsonl", lambda: [{"good": 1}, {"bad": object()}])
    assert list(tmp_path.iterdir()) == []


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(run_folder.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


def test_seeds_depend_on_their_parts_alone():
    """crc32 of the parts: were it to change, old runs would go on differently."""
    assert stable_seed(0, "base", 3) == zlib.crc32(b"0/base/3") % 2**31
    assert len({stable_seed(0, "a", n, "train") for n in range(1000)}) == 1000
    assert all(0 <= stable_seed(n) < 2**31 for n in range(1000))


def test_damage_is_named_when_a_run_is_opened_also_where_no_stage_reads_the_file_again(tmp_path):
    open_run(tmp_path, CONFIG)
    for name in ("kept", "gone", "changed"):
        cached_jsonl(tmp_path / "arm" / f"{name}.jsonl", lambda: [{"x": 1}])
    (tmp_path / "arm/gone.jsonl").unlink()
    (tmp_path / "arm/changed.jsonl").write_text('{"x": 2}\n')
    with pytest.warns(QstarWarning) as told:
        open_run(tmp_path, CONFIG)
    assert [name for name in ("kept", "gone", "changed") if any(name in str(w.message) for w in told)] == [
        "gone",
        "changed",
    ]
    assert (tmp_path / "arm/changed.jsonl.damaged").exists()
    assert cached_jsonl(tmp_path / "arm/changed.jsonl", lambda: [{"x": 1}]) == [{"x": 1}]


def test_lists_of_config_json_are_the_tuples_that_they_were():
    found = settings_from(QuietConfig, {"thought_lengths": [2, 4], "steps": 3}, "arms.x")
    assert found.thought_lengths == (2, 4)
    assert check_keys(ThoughtConfig, {"forbidden_ids": [16, 0]}, "thoughts") == {"forbidden_ids": (16, 0)}
    assert check_keys(PairData, {"rows": [{"prompt": "a"}]}, "data") == {"rows": [{"prompt": "a"}]}
    with pytest.raises(UserError, match="config.thoughts.forbidden_ids=3 must be of type tuple"):
        check_keys(ThoughtConfig, {"forbidden_ids": 3}, "thoughts")
