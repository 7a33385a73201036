"""A Quiet-STaR run folder as `qstar train` writes it, made up, whose numbers follow from the arguments alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random

from qstar.data.sources import write_jsonl

CLASSES = ("easy", "unpredictable", "hard")
ACCURACY = {  # arm -> hard-token accuracy by evaluation
    "full": [0.1, 0.37, 0.85, 0.967],
    "policy_weight_0": [0.1, 0.19, 0.15, 0.148],
    "pause": [0.1, 0.1, 0.1, 0.103],
    "plain": [0.1, 0.1, 0.1, 0.102],
}
THINK = ("full", "policy_weight_0", "pause")
STEPS = (0, 50, 100, 250)
SCRIPT = "</script><script>document.title='owned'</script><!--"
S, P = 6, 2


def write_quiet_run(folder: Path, *, arms=tuple(ACCURACY), steps=STEPS, texts: int = 40, hostile: bool = False) -> Path:
    """Writes the run and returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format_version": 2,
        "method": "quiet_star",
        "name": "quiet_star_test",
        "seed": 0,
        "thoughts": {"thought_tokens": S, "talk_tokens": 1, "thoughts_per_position": P},
        "arms": {arm: {} for arm in arms},
        "train": {"steps": 250, "lr": 1e-3},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"jax": "0.10.2", "device": "cpu"}))
    (folder / "base").mkdir(exist_ok=True)
    gates = {"direct": {"metric": "nll_base/hard", "value": 2.31, "limit": "at least 2.2", "ok": True}}
    (folder / "base" / "gates.json").write_text(json.dumps(gates))
    rows = [_train("base", step, 3.0 * 0.5 ** (step / 300)) for step in range(50, 1001, 50)]
    for arm in arms:
        rows += [_train(arm, step, 1.3 + 0.3 * 0.5 ** (step / 50)) for step in range(10, max(steps) + 1, 10)]
        for number, step in enumerate(steps):
            rows.append(evaluation(arm, number, step))
            if arm in THINK:
                path = folder / arm / "thoughts" / f"step_{step:06d}.jsonl"
                write_jsonl(path, [text(arm, number, at, hostile) for at in range(texts)])
    if "policy_weight_0" in arms and 100 in steps:
        told = "thoughts are ignored: weight below .05 for 100 steps"
        rows.append({"arm": "policy_weight_0", "iteration": 0, "stage": "alarm", "step": 100, "text": told})
    write_jsonl(folder / "metrics.jsonl", rows)
    return folder


def _train(arm: str, step: int, loss: float) -> dict:
    row = {"arm": arm, "iteration": 0, "stage": "train", "step": step, "loss": loss}
    if arm in THINK:
        open_ = ACCURACY[arm][-1] * min(1.0, step / 120)
        row |= {"reward_positive": 0.5 + 0.3 * open_, "advantage": 0.02 + 0.2 * open_, "mix_weight": 0.1 * open_}
    return row


def evaluation(arm: str, number: int, step: int) -> dict:
    """The row of one evaluation."""
    right = ACCURACY[arm][number]
    row = {"arm": arm, "iteration": 0, "stage": "evaluation", "step": step, "classes": [*CLASSES, "all"]}
    base = {"easy": 0.05, "unpredictable": 2.303, "hard": 2.31, "all": 1.39}
    for name in (*CLASSES, "all"):
        accuracy = {"easy": 1.0, "unpredictable": 0.1, "hard": 0.1, "all": 0.53}[name]
        row |= {f"nll_base/{name}": base[name], f"accuracy_base/{name}": accuracy}
        if arm not in THINK:
            row |= {f"accuracy_base_low/{name}": accuracy - 0.02, f"accuracy_base_high/{name}": accuracy + 0.02}
            continue
        mine = right if name == "hard" else accuracy
        row |= {
            f"nll/{name}": -math.log(right) + 0.2 if name == "hard" else base[name],
            f"accuracy/{name}": mine,
            f"accuracy_low/{name}": max(0.0, mine - 0.013),
            f"accuracy_high/{name}": min(1.0, mine + 0.013),
            f"weight/{name}": 0.65 * right if name == "hard" else 0.004,
            f"accuracy_greedy/{name}": min(1.0, mine * 1.03),
            f"accuracy_random/{name}": 0.11 if name == "hard" else accuracy,
        }
    if arm in THINK:
        row["thought_accuracy/hard"] = right
        counts = [0, 40, 8000, 300, 20, 10, int(20 + 900 * right), int(10 + 600 * right), 5]
        edges = [-0.2, -0.1, 0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]
        row |= {"thought_entropy": 1.2 - right, "distinct": 0.9, "weight_histogram": {"edges": edges, "counts": counts}}
    return row


def text(arm: str, number: int, at: int, hostile: bool = False) -> dict:
    """One text with its thoughts; the thoughts of the last token are right as often as the accuracy says."""
    rng = Random(f"{at}")
    k = rng.randrange(2, 7)
    first = rng.randrange(26)
    letters = [chr(97 + (first + i) % 26) for i in range(6 - k)]
    digits = [str(rng.randrange(10)) for _ in range(k)]
    tokens = [*letters, *digits, "=", str(sum(map(int, digits)) % 10), ";"]
    classes = ["easy"] * (6 - k) + ["unpredictable"] * k + ["easy", "hard", "easy"]
    base = [{"easy": 0.05, "unpredictable": 2.3, "hard": 2.31}[name] for name in classes[1:]]
    rng = Random(f"{arm}/{number}/{at}")
    passes = []
    for _ in range(P):
        thoughts, nll, weight = [], [], []
        for j, name in enumerate(classes[1:]):
            good = name == "hard" and rng.random() < ACCURACY[arm][number]
            steps = [str(sum(map(int, digits[i:])) % 10) for i in reversed(range(k))]
            said = ["-", *steps, *"------"] if good else ["-", "a", *rng.choices("bcdefgh", k=S)]
            thoughts.append(said[:S])
            weight.append(0.65 * ACCURACY[arm][number] if name == "hard" else rng.gauss(0.004, 0.01))
            better = 1.9 if good else -0.6 * (name == "hard") * ACCURACY[arm][number] + rng.gauss(0, 0.03)
            nll.append(max(0.001, base[j] - better))
        passes.append({"tokens": thoughts, "nll": nll, "weight": weight})
    for p in passes:
        p["reward"] = [x - y for x, y in zip(base, p["nll"])]
    if hostile and at == 0:
        tokens[0], passes[0]["tokens"][1][0] = SCRIPT, SCRIPT
    return {"text": f"heldout-{at:04d}", "tokens": tokens, "classes": classes, "base_nll": base, "thoughts": passes}
