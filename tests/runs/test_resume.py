"""A run that was killed or left, wherever that was, ends with the files and the bits of one that was not."""

import collections
import json
import os
import re

import pytest

from qstar.__main__ import main
from tests.methods import runs

# One chain: each process goes on from what the kill before it left.
# Of each list, a process is left by an exception at all events but the last, and killed there (runs.killed); "term" is a
# SIGTERM instead, at which it saves.
ARITHMETIC = [
    [
        "batch base 70",  # while the base trains, past its first checkpoint
        "term batch base 100",  # saved after that very update
        "saving base/training 120",  # while a checkpoint is being written
        "term begin no_rationalisation/stages/iter_001/sample_000.jsonl",  # outside of training nothing waits
        "done no_rationalisation/stages/iter_001/sample_000.jsonl",  # in the middle of sampling
        "batch no_rationalisation/checkpoints/iter_001 0",  # between selection and training
        "batch no_rationalisation/checkpoints/iter_001 12",  # while a loop trains, past its first checkpoint
    ],
    [
        "term batch no_rationalisation/checkpoints/iter_001 13",
        "term saving no_rationalisation/checkpoints/iter_001/training 16",  # being written in the background
        "saved no_rationalisation/checkpoints/iter_001/model 20",  # trained, but not marked as such
        "done no_rationalisation/stages/evaluation/iter_001_000.jsonl",  # in the middle of an evaluation
        "done rationalisation/stages/iter_001/rationalise_000.jsonl",  # in the middle of rationalising
        "replace rationalisation/rationales/iter_002.jsonl",  # the selection is written under its temporary name
    ],
    ["term batch rationalisation/checkpoints/iter_002 3", None],  # an update whose metrics are logged
]
GSM8K = [["done star/stages/iter_001/sample_000.jsonl", "batch star/checkpoints/iter_001 5"]]

V_STAR = [  # every stage; killed for good where a checkpoint is being written in the background
    [
        "batch g_sft 12",  # while G_SFT trains, past its first checkpoint
        "done g_sft/stages/k4_t1_18c98c75/sample_000.jsonl",  # in the middle of sampling from G_SFT
        "done v_star/rationales/iter_001.jsonl",  # before the buffers
        "term batch v_star/checkpoints/iter_001 4",  # saved after that update
        "batch v_star/checkpoints/iter_001 10",  # while the generator trains
        "done v_star/stages/evaluation/iter_001_000.jsonl",  # before its metrics are written
        "done v_star/stages/iter_002/sample_001.jsonl",  # in the middle of sampling from G_1
        "done v_star/d_gen/iter_002.jsonl",  # between the two buffers
        "done v_star/d_ver/iter_002.jsonl",
        "done v_star/verifiers/dpo/iter_002/pairs.jsonl",  # between the pairs and the verifier
        "saving v_star/verifiers/dpo/iter_002/training 4",  # while the verifier trains
    ],
    [
        "term batch v_star/verifiers/orm/iter_002 1",
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
    if pair == "arithmetic":  # the base was left at step 70, before the step; its checkpoint was of step 60
        counts = collections.Counter(tuple(e.split()[1:]) for e in told if e.startswith("batch "))
        repeated = {stage: sorted(int(i) for s, i in counts if s == stage and counts[s, i] > 1) for stage, _ in counts}
        base = repeated.pop("base")
        # What SIGTERM saves (after updates 100 and 13) is not done again; of step 120 the checkpoint may be unfinished.
        assert base[:11] == list(range(60, 71)) and set(base[11:]) <= set(range(101, 120))
        assert repeated.pop("no_rationalisation/checkpoints/iter_001") == [0, 8, 9, 10, 11, 12]
        assert len(repeated) == 3 and not any(repeated.values())


@PAIRS
def test_optimiser_moments_do_not_stay_behind(pair, request):
    for folder in request.getfixturevalue(pair):
        assert not list(folder.glob("**/training"))


def test_a_finished_run_is_left_as_it_is(arithmetic, monkeypatch):
    _, folder = arithmetic
    kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*.jsonl")}
    written, replace = set(), os.replace

    def replaced(source, target, **how):
        written.add(os.path.relpath(os.path.realpath(target), os.path.realpath(folder)))
        replace(source, target, **how)

    monkeypatch.setattr(os, "replace", replaced)
    assert main(["train", f"--config={runs.ROOT}/configs/star_arithmetic.py:smoke", f"--workdir={folder}"]) == 0
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*.jsonl")} == kept
    results = {name for name in written if not name.startswith(("..", ".checksums/"))}
    assert results == {"environment.json", "report.html"}


@pytest.mark.parametrize("pair, signals, updates", [("arithmetic", 5, (101, 14)), ("v_star", 2, (5, 2))])
def test_told_to_end_a_line_says_what_is_saved_and_how_to_go_on(pair, signals, updates, request):
    log = request.getfixturevalue(pair)[1].with_suffix(".log").read_text()
    ends = re.findall("qstar: stopped by SIGTERM; .*saved.*; go on with: qstar train --config=", log)
    plans = {"arithmetic": ARITHMETIC, "v_star": V_STAR}[pair]
    assert len(ends) == sum((event or "").startswith("term ") for events in plans for event in events) == signals
    assert all(f"saved after update {update};" in log for update in updates)  # only where that is so
    assert "Traceback" not in log
