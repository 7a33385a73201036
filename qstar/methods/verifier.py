"""Verifiers: training one from D_VER, and scoring with it.

A verifier is a model of its own. It never writes solutions (as a generator it soon gets worse, V-STaR, section 4.6), and
scores those of any generator:

    dpo   the language model that DPO made of G_SFT; score log V(y|x)                                   V-STaR
    orm   a head on every token; score sigmoid at the last one                                          2110.14168
    prm   a head after every step; score the least, or the product, of its sigmoids                     2305.20050
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qstar.data.loader import batches
from qstar.errors import UserError, require, unknown
from qstar.methods.buffers import Solution
from qstar.methods.preference_data import Pair, graded_arrays, pair_arrays, step_ends, step_targets
from qstar.models.heads import add_value_head
from qstar.models.model import Model, load
from qstar.models.scoring import logprobs, values
from qstar.runs.folder import cached_jsonl, data_hash
from qstar.runs.rollouts import to_example
from qstar.runs.stages import Stage, UpdateSettings, train_stage
from qstar.tasks.base import Problem, Task
from qstar.text.packing import Example
from qstar.text.tokenizer import Tokenizer
from qstar.train.metrics import Writer
from qstar.train.preference import dpo_loss
from qstar.train.step import make_step
from qstar.train.value import value_loss
from qstar.types import Batch, Graded, Preference

SCORES = ("logp", "mean_logp", "logratio", "orm", "prm_min", "prm_product")
KINDS = {"dpo": ("logp", "logratio", "mean_logp"), "orm": ("orm",), "prm": ("prm_min", "prm_product")}


@dataclasses.dataclass(frozen=True)
class VerifierSettings(UpdateSettings):
    """How a verifier is trained. A config's `dpo`, `orm` and `prm` sections."""

    epochs: float = 1.0
    steps: int = 0  # instead of epochs, where it is not 0
    beta: float = 0.1  # dpo: pull towards G_SFT
    alpha: float = 0.0  # rpo: of the likelihood of right solutions, per token, beside DPO
    rollouts: int = 0  # prm: continuations per step that tell how right it is; 0: the task checks its steps
    lm_weight: float = 0.1  # orm, prm: of the mean NLL of right solutions' tokens, beside the mean over judged tokens
    dropout: float = 0.2  # orm, prm: on what the head reads
    packed: bool = True
    row_length: int = 1024  # for dpo, of a pair's two solutions together

    def __post_init__(self):
        super().__post_init__()
        require(
            (0 < self.epochs < math.inf, f"epochs={self.epochs} must be above 0"),
            (self.steps >= 0, f"steps={self.steps} must be 0 (as many as epochs says) or more"),
            (0 < self.beta < math.inf, f"beta={self.beta} must be above 0"),
            (0 <= self.alpha < math.inf, f"alpha={self.alpha} must be 0 (plain DPO) or more"),
            (self.rollouts >= 0, f"rollouts={self.rollouts} must be 0 (ask the task) or more"),
            (0 <= self.lm_weight < math.inf, f"lm_weight={self.lm_weight} must be 0 or more"),
            (0 <= self.dropout < 1, f"dropout={self.dropout} must be in [0, 1)"),
            (self.row_length >= 2, f"row_length={self.row_length} must be at least 2 tokens"),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Verifier:
    """A model and how its numbers become a score."""

    model: Model
    score: str = ""  # one of SCORES; "": by the model: logp without a head, else orm or prm_min
    reference: Model | None = None  # for logratio: G_SFT
    steps: Callable[[str], list[int]] | None = None  # for prm_*: `Task.steps`; None: every line is a step

    @property
    def rule(self) -> str:
        """The score's name.

        Raises:
          UserError: it does not fit the model.
        """
        head = self.model.config.value_head
        rule = self.score or {"": "logp", "orm": "orm", "prm": "prm_min"}[head]
        if rule not in SCORES:
            raise unknown(f"score {rule!r}", rule, SCORES)
        needs = rule.partition("_")[0] if rule in ("orm", "prm_min", "prm_product") else ""
        require(
            (
                head == needs or not needs,
                f"score {rule!r} needs a model with a value head {needs!r}; this has {head or 'none'}",
            ),
            (rule != "logratio" or self.reference is not None, "score 'logratio' needs a reference model, G_SFT"),
        )
        return rule

    def reads(self, tokenizer: Tokenizer) -> bool:
        """Whether ids of the tokenizer mean the same to this model (and to its reference)."""
        models = [self.model] if self.reference is None else [self.model, self.reference]
        return all(m.tokenizer is not None and m.tokenizer.spells_as(tokenizer) for m in models)


def score(
    verifier: Verifier | Model | str | os.PathLike, prompts: Sequence[Any], completions: Sequence[Any]
) -> np.ndarray:
    """Scores solutions, whoever wrote them; larger is better.

    Args:
      verifier: a Verifier, a model, or the folder of one (see `qstar export --verifier`).
      prompts: N texts, or lists of token ids taken as they are.
      completions: N, or N lists of n each: texts, which the model's EOS is put after, or lists of token ids, taken as they
        are (with their EOS, if they have one; without it a solution is taken as cut off).

    Returns:
      float32 [N] or [N, n]: `logp` sums log V(token) over the completion, EOS included; `mean_logp` divides by their number;
      `logratio` subtracts the reference's; `orm` is the chance of being right, read at the last token; `prm_min` and
      `prm_product` those of all steps, the least or all together.

    Raises:
      UserError: see `model.logprobs`; a score that does not fit the model.
    """
    v = (
        verifier
        if isinstance(verifier, Verifier)
        else Verifier(verifier if isinstance(verifier, Model) else load(verifier))
    )
    rule = v.rule
    if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
        raise UserError(
            "prompts and completions are two lists of one length; several completions of a prompt are a list"
        )
    nested = bool(completions) and _is_list_of_completions(completions[0])
    if nested and len({len(c) for c in completions}) > 1:
        raise UserError("every prompt needs equally many completions: pad the lists, or score them one by one")
    flat = [(p, c) for p, cs in zip(prompts, completions) for c in (cs if nested else [cs])]
    rows: dict[tuple, int] = {}  # equal solutions are scored once
    index = [rows.setdefault((_hashable(p), _hashable(c)), len(rows)) for p, c in flat]
    found = _scores(v, rule, list(rows))
    out = found[np.asarray(index, int)] if flat else np.zeros(0, np.float32)
    return out.reshape(len(prompts), -1) if nested else out


def _is_list_of_completions(x: Any) -> bool:
    return (
        not isinstance(x, str) and len(x) > 0 and (isinstance(x[0], str) or isinstance(x[0], (list, tuple, np.ndarray)))
    )


def _hashable(x: Any) -> Any:
    return x if isinstance(x, str) else tuple(int(t) for t in x)


def _scores(v: Verifier, rule: str, pairs: Sequence[tuple[Any, Any]]) -> np.ndarray:
    rows = [_ids(v.model, p, c) for p, c in pairs]
    heads, tails = [e.prompt for e in rows], [e.completion for e in rows]
    if rule in ("logp", "mean_logp", "logratio"):
        each = logprobs(v.model, heads, tails)
        sums = np.array([x.sum() for x in each], np.float32)
        if rule == "mean_logp":
            return sums / np.array([max(1, len(x)) for x in each], np.float32)
        return sums - _scores(Verifier(v.reference), "logp", pairs) if rule == "logratio" else sums
    odds = values(v.model, heads, tails)
    if rule == "orm":
        return np.array([_sigmoid(x[-1:]).sum() for x in odds], np.float32)
    task, tokenizer = _Steps(v.steps), v.model.tokenizer
    out = np.zeros(len(pairs), np.float32)
    for i, ((_, text), row, x) in enumerate(zip(pairs, rows, odds)):
        if tokenizer is None:
            raise UserError(f"score {rule!r} needs texts, and this model has no tokenizer to read where steps end")
        text = text if isinstance(text, str) else tokenizer.decode(row.completion, after=row.prompt)
        judged = _sigmoid(x[list(dict.fromkeys(step_ends(task, tokenizer, row, text)))])
        out[i] = judged.min() if rule == "prm_min" else judged.prod()
    return out


class _Steps(Task):
    def __init__(self, steps: Callable[[str], list[int]] | None):
        self.steps = steps or super().steps


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def _ids(model: Model, prompt: Any, completion: Any) -> Example:
    if isinstance(completion, str):
        if model.tokenizer is None:
            raise UserError("this model has no tokenizer (no tokenizer files in its folder): pass lists of token ids")
        if isinstance(prompt, str):
            return to_example(model.tokenizer, prompt, completion)
        return Example(list(prompt), [*model.tokenizer.encode_continuation(completion), model.tokenizer.eos_id])
    head = model.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
    return Example(head, list(completion))


# ------------------------------------------------------------------------------------------------------- training


@dataclasses.dataclass(frozen=True)
class Job:
    """Where a verifier is trained, and how."""

    folder: Path
    settings: VerifierSettings
    seed: int
    writer: Writer
    label: dict[str, Any]
    bar: Callable[[int], Any] = contextlib.nullcontext  # steps -> a context that yields the progress bar's update


def train_dpo(sft: Model, pairs: Sequence[Pair], job: Job) -> tuple[Model, dict[str, Any]]:
    """Trains V by DPO: initial policy and reference are both G_SFT, whose log-probabilities are computed once.

    FOLDER/pairs.jsonl holds the pairs with them: killed at any point and called again, it ends with the same bits.

    Raises:
      UserError: no pairs, or none that fits into a row.
    """
    s = job.settings

    def examples(p: Pair) -> tuple[Example, ...]:
        sides = ((p.chosen, p.chosen_tokens), (p.rejected, p.rejected_tokens))
        return tuple(to_example(sft.tokenizer, p.prompt, text, ids) for text, ids in sides)

    def make() -> list[dict[str, Any]]:
        made = [examples(p) for p in pairs]
        fit = [sum(map(len, e)) <= s.row_length for e in made]
        some = [e for e, ok in zip(made, fit) if ok]  # one that does not fit may be too long for the model, too
        prompts, both = [e[0].prompt for e in some], [[x.completion for x in e] for e in some]
        scores = iter(score(Verifier(sft, "logp"), prompts, both).astype(float).tolist() if some else ())
        return [{**dataclasses.asdict(p), "reference": next(scores) if ok else None} for p, ok in zip(pairs, fit)]

    rows = cached_jsonl(job.folder / "pairs.jsonl", make)
    groups = [examples(Pair(**{k: v for k, v in r.items() if k != "reference"})) for r in rows]
    fits = [i for i, r in enumerate(rows) if r["reference"] is not None]
    if not fits:
        raise UserError(f"config.dpo.row_length={s.row_length}: none of {len(rows)} pairs fits into a row")
    reference = np.array([rows[i]["reference"] for i in fits], np.float32)
    arrays = pair_arrays([groups[i] for i in fits], reference, s.row_length, s.packed)
    tx, step = dpo_step(sft.config, s)

    def to_batch(a: dict[str, np.ndarray]) -> Preference:
        extra = {k: a.pop(k) for k in ("reference", "weight")}
        return Preference(Batch(**a), **extra)

    model, summary = _train(sft, job, tx, step, arrays, to_batch, "rpo" if s.alpha else "dpo")
    return model, {**summary, "pairs": len(fits), "dropped_pairs": len(rows) - len(fits)}


def train_head(
    sft: Model,
    kind: str,
    solutions: Sequence[Solution],
    task: Task,
    problems: dict[str, Problem],
    job: Job,
    labels: Callable[[Solution], Sequence[float] | None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains an ORM or a PRM, from G_SFT with a fresh head, on the solutions of D_VER.

    Args:
      labels: for a PRM, how right each of a solution's `task.steps` is; None: `Task.step_labels`.

    Raises:
      UserError: nothing fits into a row; for a PRM, a task that cannot judge steps.
    """
    s, tokenizer = job.settings, sft.tokenizer
    examples = [to_example(tokenizer, x.prompt, x.completion, x.tokens) for x in solutions]
    steps = None
    if kind == "prm":
        ask = labels or (lambda x: task.step_labels(problems[x.problem_id], x.completion))
        judged = [ask(x) for x in solutions]
        fault = (
            f"config.loop.verifiers: task {task.name} cannot judge the steps a prm learns from; set config.prm.rollouts"
        )
        require((all(some is not None for some in judged), fault))
        ends = [step_ends(task, tokenizer, e, x.completion) for e, x in zip(examples, solutions)]
        steps = [step_targets(e, label) for e, label in zip(ends, judged)]
    fits = [i for i, e in enumerate(examples) if len(e) <= s.row_length]
    if not fits:
        raise UserError(f"config.{kind}.row_length={s.row_length}: none of {len(solutions)} solutions fits into a row")
    some = [solutions[i] for i in fits]
    arrays = graded_arrays(some, tokenizer, s.row_length, s.packed, steps and [steps[i] for i in fits])
    scale = arrays["weight"].sum() / max(1.0, arrays["mask"].sum())  # judged tokens per learnt one
    arrays["lm_scale"] = np.full(len(arrays["tokens"]), scale, np.float32)
    start = add_value_head(sft, kind)
    tx, step = value_step(start.config, s)

    def to_batch(a: dict[str, np.ndarray]) -> Graded:
        extra = {k: a.pop(k) for k in ("labels", "weight", "lm_scale")}
        return Graded(Batch(**a), **extra)

    model, summary = _train(start, job, tx, step, arrays, to_batch, kind)
    return model, {**summary, "solutions": len(fits), "dropped_solutions": len(solutions) - len(fits)}


@functools.cache
def dpo_step(config: Any, s: VerifierSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step) of DPO, one per configuration."""
    tx = s.optimiser()
    return tx, make_step(
        s.through(functools.partial(dpo_loss, config=config, beta=s.beta, alpha=s.alpha)), tx, s.accumulate
    )


@functools.cache
def value_step(config: Any, s: VerifierSettings) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step) of a verifier with a head, one per configuration."""
    tx = s.optimiser()
    loss = functools.partial(value_loss, config=config, lm_weight=s.lm_weight, dropout=s.dropout)
    return tx, make_step(s.through(loss), tx, s.accumulate)


def _train(start, job, tx, step, arrays, to_batch, kind):
    s, rows = job.settings, len(arrays["tokens"])
    steps = s.steps or max(1, round(s.epochs * rows / s.batch_size))
    stream = functools.cache(lambda: batches(arrays, s.batch_size, seed=job.seed))
    with job.bar(steps) as progress:
        shown = progress if callable(progress) else None
        data = data_hash(part for name in sorted(arrays) for part in (name, arrays[name]))
        stage = Stage(job.folder, s, steps, job.seed, job.writer, job.label, shown, kind, data)
        return train_stage(start, stage, tx, lambda n: step, lambda n: to_batch(stream()[n]))
