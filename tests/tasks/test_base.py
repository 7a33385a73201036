import pickle

import pytest

from qstar.data import write_jsonl
from qstar.errors import QstarWarning, UserError
from qstar.tasks import Problem, Task, make_task
from qstar.tasks.base import bucket, leak_marker, stable_rng


class Letters(Task):
    """The smallest task: twenty problems whose answers are their ids."""

    name = "letters"
    stop = ("\n\n", "Q:")

    def problems(self, split):
        return [Problem(str(i), f"say {i}", str(i)) for i in range(20)]


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'gsm' is unknown \(did you mean gsm8k\?\); there are 2wiki"):
        make_task("gsm")


def test_unknown_option_lists_the_known_ones():
    with pytest.raises(UserError, match="'gsm8k': option 'shots' is unknown; there are bad_rows, train, test, prompts"):
        make_task("gsm8k", shots=3)


@pytest.mark.parametrize("name", ["arithmetic", "gsm8k", "commonsense_qa"])
def test_tasks_are_picklable_and_named(name):
    task = pickle.loads(pickle.dumps(make_task(name)))
    assert task.name == name and task.prefix() == task.prefix(hint=True) == ""


def test_pool_is_a_pure_function_of_iteration_and_seed():
    pools = {key: [p.id for p in Letters().pool(*key)] for key in [(0, 0), (1, 0), (0, 1)]}
    assert len({tuple(pool) for pool in pools.values()}) == 3
    assert all(sorted(pool) == sorted(pools[0, 0]) for pool in pools.values())
    assert [p.id for p in Letters().pool(1, 0, count=5)] == pools[1, 0][:5]


def test_no_answer_is_never_right():
    assert not Letters().correct(Problem("0", "", "None"), None)
    assert Letters().correct(Problem("0", "", "x"), "x")


def test_cut_ends_at_the_first_stop_string():
    assert Letters().cut("a\nb Q: c\n\nd") == "a\nb "
    assert Letters().cut("a\nb") == "a\nb"


@pytest.mark.parametrize(
    "text, marker",
    [
        ("(b) is marked (correct), so", "(correct)"),
        ("The Hint says 5", "Hint"),
        ("as the hints show", "hints"),
        ("by the given answer", "given answer"),
        ("It is 5, AS STATED.", "AS STATED"),
    ],
)
def test_leak_markers_in_any_case(text, marker):
    assert leak_marker(text) == f"hint marker {marker!r}"


@pytest.mark.parametrize("text", ["The correct way", "hinterland", "a chintz", "was stated", "72 clips", ""])
def test_words_that_only_contain_a_marker_are_no_leak(text):
    assert leak_marker(text) is None


def test_marker_that_the_question_uses_is_no_leak():
    assert leak_marker("3 hints x 2 = 6", "A quiz gives 3 hints per round.") is None
    assert leak_marker("3 hints, as stated", "A quiz gives 3 hints per round.") == "hint marker 'as stated'"


def test_hashes_and_generators_never_change():
    assert bucket("737,361", 1_000_000) == 1967951671 % 1_000_000  # the crc32 that gzip writes
    assert stable_rng("a", 1).random() == stable_rng("a", 1).random() != stable_rng("a", 2).random()


def test_missing_prompts_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gsm_prompts\.txt: no such few-shot file"):
        make_task("gsm8k", prompts=str(tmp_path))


def test_few_shot_questions_are_excluded_from_every_split(tmp_path):
    rows = [{"question": f"How many are {i} ?", "answer": f"{i}\n#### {i}"} for i in range(200)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    shots = "".join(f"Q: {row['question']}\nA: {row['answer']}\n\n" for row in rows[:40])
    for name in ("gsm_prompts.txt", "gsm_prompts_answer_key.txt"):
        (tmp_path / name).write_text(shots)
    path = str(tmp_path / "rows.jsonl")
    task = make_task("gsm8k", train=path, test=path, prompts=str(tmp_path))
    assert {p.gold for s in ("train", "val") for p in task.problems(s)} == {str(i) for i in range(40, 200)}
    assert {p.gold for p in task.problems("test")} == {str(i) for i in range(40, 200)}


def test_a_byte_order_mark_is_no_part_of_the_few_shot_text(tmp_path):
    write_jsonl(
        tmp_path / "rows.jsonl", [{"question": "1+1?", "answer": "#### 2"}, {"question": "2+2?", "answer": "#### 4"}]
    )
    for name in ("gsm_prompts.txt", "gsm_prompts_answer_key.txt"):
        (tmp_path / name).write_text("\ufeffQ: 1+1?\nA: 2\n")
    task = make_task("gsm8k", test=str(tmp_path / "rows.jsonl"), prompts=str(tmp_path))
    assert task.prefix().startswith("Q: ") and [p.question for p in task.problems("test")] == ["2+2?"]


def test_repeated_ids_get_the_number_of_their_record(tmp_path):
    rows = [{"ID": name, "question": f"{i}?", "answer": i} for i, name in enumerate(["1", "2", "1", ""])]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    task = make_task("numeric", test=str(tmp_path / "rows.jsonl"), id="ID")
    with pytest.warns(QstarWarning, match=r"1 ids of test records are not unique \('1'\)"):
        assert [p.id for p in task.problems("test")] == ["1-00000", "2", "1-00002", "numeric-test-00003"]


def test_unknown_split_is_refused():
    with pytest.raises(UserError, match="unknown split 'dev'"):
        make_task("arithmetic").problems("dev")
    with pytest.raises(UserError, match="unknown split 'dev'"):
        make_task("gsm8k").problems("dev")
