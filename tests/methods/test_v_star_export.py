"""A V-STaR run's models taken out of it, and used from the command line: generators, verifiers, evaluation by scores."""

import json
import re

import numpy as np
import pytest

import qstar
from qstar.__main__ import main
from qstar.data.sources import read_jsonl
from qstar.methods.export import trained_model
from qstar.methods.score_samples import by_scores
from qstar.methods.select import Candidates, curves
from qstar.types import Rollout
from tests.methods import runs


@pytest.fixture(scope="module")
def run():
    return runs.v_star()


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    home = tmp_path_factory.mktemp("models")
    for name in ("", "dpo", "orm", "prm"):
        verifier = [f"--verifier={name}"] if name else []
        assert main(["export", f"--run={run}", "--arm=v_star", *verifier, f"--out={home / (name or 'generator')}"]) == 0
    return home


def test_every_verifier_scores_as_it_did_in_the_run(run, exported):
    samples = [Rollout(**r) for f in sorted((run / "v_star/selection").glob("samples_002_*")) for r in read_jsonl(f)][
        :6
    ]
    scores = read_jsonl(run / "v_star/selection/scores_002.jsonl")[:6]
    prompts, texts = [r.prompt for r in samples], [r.completion for r in samples]
    for kind, folder in (("dpo", "dpo"), ("orm", "orm"), ("sft", None)):
        model = trained_model(run, "v_star", 0) if folder is None else qstar.load(exported / folder)
        np.testing.assert_allclose(qstar.score(model, prompts, texts), [s[kind] for s in scores], rtol=1e-4, atol=1e-4)
    configs = {name: json.loads((exported / name / "config.json").read_text()) for name in ("dpo", "orm", "prm")}
    kinds = {name: config.get("qstar_value_head") for name, config in configs.items()}
    assert kinds == {"dpo": None, "orm": "orm", "prm": "prm"}


def test_the_models_of_a_run_differ(run, exported):
    first = [
        np.asarray(qstar.load(exported / n).params["layers"]["q"]["kernel"]) for n in ("generator", "dpo", "orm", "prm")
    ]
    first += [np.asarray(trained_model(run, "v_star", n).params["layers"]["q"]["kernel"]) for n in (0, 1)]
    assert len({x.tobytes() for x in first}) == 6


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--arm=v_star", "--verifier=dpo", "--iteration=1"], ["dpo verifier", "iteration 1", "2"]),
        (["--arm=v_star", "--iteration=7"], ["generator", "iteration 7", "0, 1, 2"]),
        (["--arm=vstar"], ["vstar", "v_star"]),
    ],
)
def test_what_is_not_there_is_named(run, flags, words, tmp_path, capsys):
    assert main(["export", f"--run={run}", *flags, f"--out={tmp_path / 'x'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(w in said for w in words) and not (tmp_path / "x").exists()


def test_evaluate_scores_cached_samples_with_verifiers(run, exported, tmp_path, capsys):
    command = [
        "evaluate", f"--model={exported / 'generator'}", "--task=arithmetic", "--limit=6", "--samples=4", "--json",
        '--task-options={"pool": {"1": 40}, "seeds": {}}', "--max-new-tokens=30", f"--out={tmp_path / 'out'}",
    ]  # fmt: skip
    verifiers = [f"--verifier=dpo={exported / 'dpo'}", f"--verifier=least={exported / 'prm'}:prm_min"]
    assert main([*command, *verifiers]) == 0
    found = json.loads(capsys.readouterr().out)
    names = {
        f"{rule}@{k}:{s}"
        for rule in ("best", "weighted", "top4")
        for k in (1, 2, 4)
        for s in ("generator", "dpo", "least")
    }
    assert names <= set(found) and {"best@4:dpo_low", "auc:dpo", "pass@4", "majority@4"} <= set(found)
    assert found["best@1:dpo"] == pytest.approx(found["pass@1"]) and found["best@4:dpo"] <= found["pass@4"] + 1e-9
    files = {p: p.read_bytes() for p in (tmp_path / "out").glob("*.jsonl")}
    kept = sorted(re.sub("[0-9a-f]{16}", "HASH", p.name) for p in files if p.name.startswith("scores"))
    assert kept == ["scores_dpo_logp_HASH.jsonl", "scores_least_prm_min_HASH.jsonl"]
    assert main([*command, verifiers[0]]) == 0  # another set of verifiers counts the same samples
    assert json.loads(capsys.readouterr().out)["best@4:dpo"] == found["best@4:dpo"]
    assert {p: p.read_bytes() for p in files} == files
    # Another verifier under the same name: its own scores, not those that are there.
    assert main([*command, f"--verifier=dpo={exported / 'prm'}:prm_min"]) == 0
    assert json.loads(capsys.readouterr().out)["best@4:dpo"] == found["best@4:least"]


@pytest.mark.parametrize("flag", ["generator={}", "dpo", "a b={}", "dpo={}:orm"])
def test_a_verifier_flag_that_makes_no_sense_is_named(exported, flag, capsys):
    flag = flag.format(exported / "dpo")
    assert main(["evaluate", f"--model={exported / 'generator'}", "--task=arithmetic", f"--verifier={flag}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("verifier" in said or "value head" in said)


def test_scores_are_used_as_the_curves_say(tmp_path):
    """`by_scores` on made-up samples: a perfect scorer has pass@k, a useless one pass@1."""
    rng = np.random.default_rng(0)
    rows = []
    for p in range(8):
        for j in range(4):
            right = bool(rng.random() < 0.5)
            rows.append(Rollout(f"p{p}", 0, j, False, "g", "q", f"{right}", "1" if right else "2", "1", right, "", "", False,
                                None, float(rng.normal()), 3))  # fmt: skip
    oracle = lambda prompts, texts: np.array([[float(t == "True") for t in some] for some in texts])  # noqa: E731
    found = by_scores(rows, 4, {"oracle": oracle, "none": lambda p, t: np.zeros((len(p), 4))}, tmp_path)
    some = [Candidates([None] * 4, [r.correct for r in rows[4 * p : 4 * p + 4]], {}) for p in range(8)]
    passed = {k: np.mean(v) for k, v in curves(some, [1, 2, 4])["pass"].items()}
    assert [found[f"best@{k}:oracle"] for k in (1, 2, 4)] == pytest.approx([passed[k] for k in (1, 2, 4)])
    assert [found[f"best@{k}:none"] for k in (1, 2, 4)] == pytest.approx([passed[1]] * 3) and found["auc:oracle"] == 1
    # Verifiers are compared on one common set of samples, paired over problems.
    gains = {k: v for k, v in found.items() if k.startswith("gain@") and not k.endswith(("_low", "_high"))}
    assert gains.keys() == {"gain@4:oracle - generator", "gain@4:none - generator", "gain@4:none - oracle"}
    assert gains["gain@4:none - oracle"] == pytest.approx(passed[1] - passed[4])
    assert found["gain@4:none - oracle_low"] < passed[1] - passed[4] < found["gain@4:none - oracle_high"]
