"""The random model of smoke runs, and the rows that ship."""

import numpy as np
import pytest

import qstar
from qstar.data.sources import read_records
from qstar.errors import UserError
from qstar.models import hub, random_tiny
from qstar.tasks import make_task


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    random_tiny.folder.cache_clear()
    yield tmp_path
    random_tiny.folder.cache_clear()


def test_it_is_made_once_and_any_text_goes_through_it(home):
    model = qstar.load("random-tiny")
    text = "naïve\n\t🙂 <|end"
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    assert model.tokenizer.vocab_size == model.config.vocab_size and model.tokenizer.eos_id == model.config.eos_id
    assert np.isfinite(qstar.logits(model, [[5, 6, 7]])).all()
    made = hub.resolve("random-tiny")
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    random_tiny.folder.cache_clear()
    assert hub.resolve("random-tiny") == made and (made / "model.safetensors").stat().st_mtime_ns == stamp
    assert [p.name for p in made.parent.iterdir()] == [made.name]


def test_a_folder_of_that_name_wins(home):
    (home / "random-tiny").mkdir()
    with pytest.raises(UserError, match="random-tiny"):
        qstar.load("random-tiny")


def test_a_home_that_cannot_be_written_does_not_matter(home, monkeypatch):
    (home / "cache").write_text("a file")
    assert (random_tiny.folder() / "config.json").is_file()


@pytest.mark.parametrize("name", ["gsm8k", "commonsense_qa", "hotpotqa"])
def test_shipped_rows_fill_every_split_and_their_gold_solutions_are_right(name):
    task = make_task(name, train=f"built-in:{name}", test=f"built-in:{name}")
    for split in ("train", "val", "test"):
        assert task.problems(split)
        for problem in task.problems(split):
            assert task.solution(problem) is None or task.correct(problem, task.parse(task.solution(problem)))


def test_shipped_programs_pass_their_tests():
    task = make_task("mbpp", data="built-in:mbpp", shots=())
    problems = [p for split in ("train", "val", "test") for p in task.problems(split)]
    assert len(problems) == 13
    spaces = {}
    for p in problems:
        exec(p.solution + "\n" + "\n".join(p.meta["tests"]), spaces)


def test_an_unknown_name_of_shipped_rows_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean gsm8k"):
        read_records("built-in:gsm8", ("question",))
