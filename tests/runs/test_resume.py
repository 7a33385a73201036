"""A run that was killed or left, wherever that was, ends with the files and the bits of one that was not."""

import json
import re

import pytest

from tests.methods import runs

# One chain: each process goes on from what the kill before it left.
# Of each list, a process is left by an exception at all events but the last, and killed there (runs.killed).
ARITHMETIC = [
    [
        "batch base 70",  # while the base trains, past its first checkpoint
        "saving base/training 120",  # while a checkpoint is being written
        "done no_rationalisation/stages/iter_001/sample_000.jsonl",  # in the middle of sampling
        "batch no_rationalisation/checkpoints/iter_001 0",  # between selection and training
        "batch no_rationalisation/checkpoints/iter_001 12",  # while a loop trains, past its first checkpoint
    ],
    [
        "saved no_rationalisation/checkpoints/iter_001/model 20",  # trained, but not marked as such
        "done no_rationalisation/stages/evaluation/iter_001_000.jsonl",  # in the middle of an evaluation
        "done rationalisation/stages/iter_001/rationalise_000.jsonl",  # in the middle of rationalising
        "replace rationalisation/rationales/iter_002.jsonl",  # the selection is written under its temporary name
    ],
]
GSM8K = [["done star/stages/iter_001/sample_000.jsonl", "batch star/checkpoints/iter_001 5"]]

V_STAR = [  # every stage; killed for good where a checkpoint is being written in the background
    [
        "batch g_sft 12",  # while G_SFT trains, past its first checkpoint
        "done g_sft/stages/k4_t1_18c98c75/sample_000.jsonl",  # in the middle of sampling from G_SFT
        "done v_star/rationales/iter_001.jsonl",  # before the buffers
        "batch v_star/checkpoints/iter_001 10",  # while the generator trains
        "done v_star/stages/evaluation/iter_001_000.jsonl",  # before its metrics are written
        "done v_star/stages/iter_002/sample_001.jsonl",  # in the middle of sampling from G_1
        "done v_star/d_gen/iter_002.jsonl",  # between the two buffers
        "done v_star/d_ver/iter_002.jsonl",
        "done v_star/verifiers/dpo/iter_002/pairs.jsonl",  # between the pairs and the verifier
        "saving v_star/verifiers/dpo/iter_002/training 4",  # while the verifier trains
    ],
    [
        "batch v_star/verifiers/orm/iter_002 6",
        "batch v_star/verifiers/prm/iter_002 3",  # before its first checkpoint
        "done v_star/selection/samples_002_000.jsonl",  # in the middle of the test samples
        "begin v_star/selection/scores_002.jsonl",
        "done v_star/selection/scores_002.jsonl",  # before the curves
        None,
    ],
]


@pytest.fixture(scope="module")
def arithmetic():
    return runs.arithmetic(), runs.killed("star_arithmetic.py:smoke", ARITHMETIC)


@pytest.fixture(scope="module")
def gsm8k():
    config = runs.pretrained_config("star_gsm8k.py", "data/gsm8k")
    return runs.gsm8k(), runs.killed(config, GSM8K, runs.SMALLER)


@pytest.fixture(scope="module")
def v_star():
    return runs.v_star(), runs.killed(runs.V_STAR, V_STAR)


PAIRS = pytest.mark.parametrize("pair", ["arithmetic", "gsm8k", "v_star"])


@PAIRS
def test_rationales_and_evaluations_are_byte_identical(pair, request):
    whole, resumed = map(runs.answers, request.getfixturevalue(pair))
    assert len(whole) == {"arithmetic": 2 * (2 + 2 * 3), "gsm8k": 1 + 2 + 1, "v_star": 2 + 3 + 3 + 3 + 4 + 4}[pair]
    assert sorted(whole) == sorted(name for name in resumed if ".jsonl.tmp-" not in name)
    assert [name for name in whole if whole[name] != resumed[name]] == []


@PAIRS
def test_models_are_bit_identical(pair, request):
    whole, resumed = map(runs.weights, request.getfixturevalue(pair))
    assert len(whole) == {"arithmetic": 1 + 2 * 2, "gsm8k": 1, "v_star": 2 + 2 + 3}[pair]
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if whole[name] != resumed[name]] == []
    assert len({str(model) for model in whole.values()}) == len(whole)  # and they are not all the same model


@PAIRS
def test_metrics_are_the_same_but_for_the_clock(pair, request):
    whole, resumed = request.getfixturevalue(pair)
    assert runs.numbers(whole) == runs.numbers(resumed)
    assert json.loads((whole / "config.json").read_text()) == json.loads((resumed / "config.json").read_text())


@PAIRS
def test_nothing_that_was_done_is_done_again(pair, request):
    _, resumed = request.getfixturevalue(pair)
    told = runs.events(resumed)
    files = [e for e in told if e.startswith("done ")]
    assert len(files) == len(set(files)) and len(files) > 5
    if pair == "arithmetic":  # the base was killed at step 70, before the step; its checkpoint was of step 60
        repeated = sorted(int(e.split()[2]) for e in set(told) if e.startswith("batch base") and told.count(e) > 1)
        assert repeated[:11] == list(range(60, 71)) and set(repeated[11:]) <= set(range(71, 120))
        again = [
            e for e in told if e.startswith("batch no_rationalisation/checkpoints/iter_001 ") and told.count(e) > 1
        ]
        assert sorted(int(e.split()[2]) for e in set(again)) == [0, 8, 9, 10, 11, 12]


@PAIRS
def test_optimiser_moments_do_not_stay_behind(pair, request):
    for folder in request.getfixturevalue(pair):
        assert not list(folder.glob("**/training"))


def test_a_finished_run_is_left_as_it_is(arithmetic):
    _, folder = arithmetic
    kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*.jsonl")}
    before = len(runs.events(folder))
    assert runs.drive([{"config": "star_arithmetic.py:smoke", "workdir": str(folder)}]) == [0]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*.jsonl")} == kept
    written = set(runs.events(folder)[before:])
    assert written == {"replace environment.json", "replace report.html"}


TOLD = [  # one process, and another one that goes on from there
    [
        "term batch base 70",  # while the base trains: saved after that very update
        "term begin no_rationalisation/stages/iter_001/sample_000.jsonl",  # anywhere else nothing waits
        "term batch no_rationalisation/checkpoints/iter_001 12",
        "term saving no_rationalisation/checkpoints/iter_001/training 16",  # a checkpoint is being written in the background
        "term batch rationalisation/checkpoints/iter_002 3",  # an update whose metrics are logged
    ],
]


@pytest.fixture(scope="module")
def told():
    return runs.killed("star_arithmetic.py:smoke", TOLD)


def test_told_to_end_it_saves_and_goes_on_to_the_same_end(arithmetic, told):
    whole, _ = arithmetic
    assert runs.answers(told) == runs.answers(whole)
    assert runs.weights(told) == runs.weights(whole)
    assert runs.numbers(told) == runs.numbers(whole)


def test_told_to_end_no_update_is_lost_and_a_line_says_how_to_go_on(told):
    updates = [e for e in runs.events(told) if e.startswith("batch ")]
    assert len(updates) == len(set(updates)) > 100
    log = told.with_suffix(".log").read_text()
    ends = re.findall("qstar: stopped by SIGTERM; .*saved.*; go on with: qstar train --config=", log)
    assert len(ends) == sum(map(len, TOLD))
    assert "saved after update 71;" in log and "saved after update 13;" in log  # only where that is so
    assert "Traceback" not in log
