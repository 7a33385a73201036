"""Scores of samples for `qstar evaluate --verifier`: best-of-k and votes by score, and the quality of the scorers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qstar.methods.select import Scorer, curves, gain, ks_for, quality
from qstar.methods.v_star_eval import Ballots, candidates
from qstar.methods.verifier import Verifier, score
from qstar.runs.evaluate import by_problem
from qstar.runs.folder import cached_jsonl, fingerprint
from qstar.text.tokenizer import Tokenizer
from qstar.train.stats import summarise
from qstar.types import Rollout


def by_scores(
    rollouts: list[Rollout],
    samples: int,
    scorers: Mapping[str, Scorer | Verifier],
    folder: Path,
    tokenizer: Tokenizer | None = None,
    ballots: Ballots = list,
) -> dict[str, Any]:
    """Returns metrics of choosing among the samples by their scores.

    For every scorer NAME: `best@k:NAME`, `weighted@k:NAME`, `top4@k:NAME` and `regret@k:NAME` with intervals, and
    `auc:NAME`, `auc_pooled:NAME`, `ece:NAME` and `brier:NAME` (after Platt scaling). For every two scorers
    `gain@k:B - A`: the difference in accuracy of best-of-k, paired over problems, at k = 16 (or all samples).

    The scorer "generator" is always present: the log-probability under the model that wrote the samples. Scores are
    kept in FOLDER/scores_NAME_RULE_HASH.jsonl (of a function: scores_NAME.jsonl), so that a second call does not score
    again. A `Verifier` with the `tokenizer` that the samples were written with scores the sampled ids; every other
    scorer, f(prompts, completions), gets texts.
    """
    groups = by_problem(rollouts)
    scores: dict[str, list[list[float]]] = {"generator": [[r.logprob for r in rows] for rows in groups]}
    for name, scorer in scorers.items():
        # Bound as a default: a closure would read the loop's variable when it is called.
        def make(scorer: Scorer | Verifier = scorer) -> list[dict[str, Any]]:
            prompts = [rows[0].prompt for rows in groups]
            texts = [[r.completion for r in rows] for rows in groups]
            if not isinstance(scorer, Verifier):
                found = scorer(prompts, texts)
            elif tokenizer is not None and scorer.reads(tokenizer):
                # The sampled ids: encoding the text anew need not give them back.
                found = score(scorer, prompts, [[r.tokens or r.completion for r in rows] for rows in groups])
            else:
                found = score(scorer, prompts, texts)
            return [{"problem_id": rows[0].problem_id, "scores": row.tolist()} for rows, row in zip(groups, found)]

        # Scores of another verifier under the same name are not read back.
        own = [scorer.rule, fingerprint(scorer.model.params)] if isinstance(scorer, Verifier) else []
        file = "_".join(["scores", name, *own]) + ".jsonl"
        scores[name] = [row["scores"] for row in cached_jsonl(folder / file, make)]
    some = [candidates(rows, {name: scores[name][i] for name in scores}, ballots) for i, rows in enumerate(groups)]
    out: dict[str, Any] = {}
    ks = ks_for(samples)
    values = curves(some, ks)
    for rule, by_k in values.items():
        way, slash, name = rule.partition("/")
        for k, each in by_k.items() if slash else ():
            out.update(summarise(f"{way}@{k}:{name}", each, [c.group for c in some]))
    worth = quality(some, values)
    for name in scores:
        out |= {f"auc:{name}": worth["auc"][name], f"auc_pooled:{name}": worth["auc_pooled"][name]}
        out |= {f"{key}:{name}": value for key, value in worth["calibration"][name].items()}
        for k, (mean, low, high) in worth["regret"][name].items():
            out |= {f"regret@{k}:{name}": mean, f"regret@{k}:{name}_low": low, f"regret@{k}:{name}_high": high}
    # At one k, as in `v_star_eval.result`, so that gains of several runs can be compared.
    k = min(16, ks[-1])
    for a, b in itertools.combinations(scores, 2):
        mean, low, high = gain(values[f"best/{b}"][k], values[f"best/{a}"][k])
        key = f"gain@{k}:{b} - {a}"
        out |= {key: mean, f"{key}_low": low, f"{key}_high": high}
    return out
