"""Verifiers: models that score solutions, and how they are trained from D_VER.

    dpo   a language model trained by DPO from G_SFT; score log V(y|x)                       V-STaR, arXiv 2402.06457
    orm   a value head on every token; score sigmoid(logit) at the last token                 arXiv 2110.14168
    prm   a value head read after every step; score the minimum or product over the steps     arXiv 2305.20050

A verifier is separate from the generator: used as a generator, a DPO verifier soon degrades (V-STaR, section 4.6). It
scores solutions of any generator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from qstar.data.loader import batches
from qstar.errors import UserError, bounded, require, unknown
from qstar.methods.preference_data import Pair, Solution, graded_arrays, pair_arrays, step_ends, step_targets
from qstar.models.heads import add_value_head
from qstar.models.model import Model, load
from qstar.models.scoring import logprobs, values
from qstar.runs.folder import cached_jsonl, data_hash
from qstar.runs.rollouts import to_example, tokenizer_of
from qstar.runs.settings import EpochSettings
from qstar.runs.stages import Stage, train_stage
from qstar.tasks.base import Problem, Task
from qstar.text.chat import as_text
from qstar.text.packing import Example
from qstar.text.tokenizer import Tokenizer
from qstar.train.preference import dpo_loss, value_loss
from qstar.train.step import make_step
from qstar.types import Batch, Graded, Params, Preference

KINDS = {"dpo": ("logp", "logratio", "mean_logp"), "orm": ("orm",), "prm": ("prm_min", "prm_product")}
SCORES = ("logp", "mean_logp", "logratio", "orm", "prm_min", "prm_product")


@dataclasses.dataclass(frozen=True)
class VerifierSettings(EpochSettings):
    """Training of a verifier. A config's `dpo`, `orm` and `prm` sections; `rpo` trains a generator on pairs."""

    beta: float = bounded(0.1, gt=0)  # DPO: strength of the pull towards the reference
    alpha: float = bounded(0.0, ge=0, note="0: plain DPO")  # RPO: weight of the chosen solution's NLL per token
    rollouts: int = bounded(0, ge=0, note="0: ask the task")  # PRM: continuations per step that estimate its label
    lm_weight: float = bounded(0.1, ge=0)  # ORM, PRM: weight of the language-model loss of correct solutions
    dropout: float = bounded(0.2, ge=0, lt=1)  # ORM, PRM: on the inputs of the head
    packed: bool = True
    row_length: int = bounded(1024, ge=2, note="tokens")  # DPO: of a pair's two solutions together


# --------------------------------------------------------------------------------------------------------- scoring


@dataclasses.dataclass(frozen=True, eq=False)
class Verifier:
    """A model and the name of the score that is read from it."""

    model: Model
    score: str = ""  # one of SCORES; "": by the model: logp without a head, else orm or prm_min
    reference: Model | None = None  # for logratio: G_SFT
    steps: Callable[[str], list[int]] | None = None  # for prm_*: `Task.steps`; None: every line is a step

    @property
    def rule(self) -> str:
        """The name of the score; raises UserError if it is unknown, or does not fit the model."""
        head = self.model.config.value_head
        rule = self.score or {"": "logp", "orm": "orm", "prm": "prm_min"}[head]
        if rule not in SCORES:
            raise unknown(f"score {rule!r}", rule, SCORES)
        needed = next(kind for kind, rules in KINDS.items() if rule in rules)
        fault = f"score {rule!r} needs a model with a value head {needed!r}; this has {head or 'none'}"
        require(
            (needed in ("dpo", head), fault),
            (rule != "logratio" or self.reference is not None, "score 'logratio' needs a reference model, G_SFT"),
        )
        return rule

    def reads(self, tokenizer: Tokenizer) -> bool:
        """Whether token ids of `tokenizer` mean the same to the model and to its reference."""
        models = [self.model] if self.reference is None else [self.model, self.reference]
        return all(m.tokenizer is not None and m.tokenizer.spells_as(tokenizer) for m in models)


def score(
    verifier: Verifier | Model | str | os.PathLike, prompts: Sequence[Any], completions: Sequence[Any]
) -> np.ndarray:
    """Scores solutions, whoever wrote them; larger is better.

    Args:
      verifier: a Verifier, a model, or the folder of one (see `qstar export --verifier`).
      prompts: N texts, lists of chat messages, or lists of token ids.
      completions: N, or N lists of n each: texts, to which the model's EOS is appended, or lists of token ids, which
        are used unchanged (with their EOS, if they have one; without it a solution counts as truncated).

    Returns:
      float32 [N] or [N, n]: `logp` sums log V(token) over the completion, EOS included; `mean_logp` divides it by the
      number of tokens; `logratio` subtracts the reference's; `orm` is the probability of correctness at the last token;
      `prm_min` and `prm_product` are the minimum and the product of the steps' probabilities.

    Raises:
      UserError: see `model.logprobs`; a score that does not fit the model.
    """
    if not isinstance(verifier, Verifier):
        verifier = Verifier(verifier if isinstance(verifier, Model) else load(verifier))
    rule = verifier.rule
    if isinstance(prompts, str) or isinstance(completions, str) or len(prompts) != len(completions):
        raise UserError("prompts and completions are lists of one length; several completions of a prompt are a list")
    first = completions[0] if len(completions) else ""
    nested = not isinstance(first, str) and len(first) > 0 and isinstance(first[0], (str, list, tuple, np.ndarray))
    if nested and len({len(c) for c in completions}) > 1:
        raise UserError("every prompt needs equally many completions: pad the lists, or score them one by one")
    prompts = [as_text(verifier.model.tokenizer, p) for p in prompts]
    flat = [(p, c) for p, cs in zip(prompts, completions) for c in (cs if nested else [cs])]
    # Samples of an easy problem are often equal: each distinct one costs a single forward pass.
    rows: dict[tuple, int] = {}
    key = lambda x: x if isinstance(x, str) else tuple(int(t) for t in x)  # noqa: E731
    index = [rows.setdefault((key(p), key(c)), len(rows)) for p, c in flat]
    found = _scores(verifier, rule, list(rows))
    out = found[np.asarray(index, int)] if flat else np.zeros(0, np.float32)
    return out.reshape(len(prompts), -1) if nested else out


def _scores(v: Verifier, rule: str, pairs: Sequence[tuple[Any, Any]]) -> np.ndarray:
    rows = [_to_ids(v.model, p, c) for p, c in pairs]
    prompts, completions = [e.prompt for e in rows], [e.completion for e in rows]
    if rule in KINDS["dpo"]:
        each = logprobs(v.model, prompts, completions)
        sums = np.array([x.sum() for x in each], np.float32)
        if rule == "mean_logp":
            return sums / np.array([max(1, len(x)) for x in each], np.float32)
        if v.reference is None or rule != "logratio":
            return sums
        return sums - _scores(Verifier(v.reference), "logp", pairs)
    # float64, so that a product over many steps does not underflow in between
    chances = [expit(np.asarray(x, np.float64)) for x in values(v.model, prompts, completions)]
    if rule == "orm":
        # A slice, so that an empty completion scores 0 instead of raising.
        return np.array([x[-1:].sum() for x in chances], np.float32)
    tokenizer = v.model.tokenizer
    if tokenizer is None:
        raise UserError(f"score {rule!r} needs texts, and this model has no tokenizer to read where steps end")
    out = np.zeros(len(pairs), np.float32)
    for i, ((_, text), row, x) in enumerate(zip(pairs, rows, chances)):
        if not len(x):
            continue  # an empty completion has no step: 0, as for an ORM
        text = text if isinstance(text, str) else tokenizer.decode(row.completion, after=row.prompt)
        # Steps that a tokenizer merges into one token count once in the product.
        ends = dict.fromkeys(step_ends(v.steps or Task().steps, tokenizer, row, text))
        out[i] = x[list(ends)].min() if rule == "prm_min" else x[list(ends)].prod()
    return out


def _to_ids(model: Model, prompt: Any, completion: Any) -> Example:
    tokenizer = model.tokenizer
    if not isinstance(prompt, str) and not isinstance(completion, str):
        return Example(list(prompt), list(completion))
    if tokenizer is None:
        raise UserError("this model has no tokenizer (no tokenizer files in its folder): pass lists of token ids")
    if isinstance(prompt, str) and isinstance(completion, str):
        return to_example(tokenizer, prompt, completion)
    head = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
    if isinstance(completion, str):
        return Example(head, tokenizer.ended(tokenizer.encode_behind(head, completion)))
    return Example(head, list(completion))


# -------------------------------------------------------------------------------------------------------- training

Bar = Callable[[str, int], contextlib.AbstractContextManager]  # see `runs.console.Screen.bar`


def train_dpo(
    sft: Model,
    pairs: Sequence[Pair],
    stage: Stage,
    *,
    bar: Bar | None = None,
    watch: Callable[[int, Params], None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains V by DPO: initial policy and reference are both G_SFT.

    FOLDER/pairs.jsonl holds the pairs with the reference's log-probabilities. A repeated call ends with the same bits.

    Args:
      stage: with VerifierSettings; its `steps`, `name` and `data` are set here.
      bar: opens the progress bar; None: the stage has its own. watch: see `runs.stages.train_stage`.

    Raises UserError if no pair fits into a row.
    """
    s = stage.settings

    def encode(p: Pair) -> tuple[Example, Example]:
        sides = ((p.chosen, p.chosen_tokens), (p.rejected, p.rejected_tokens))
        chosen, rejected = (to_example(tokenizer_of(sft), p.prompt, text, ids) for text, ids in sides)
        return chosen, rejected

    def with_reference() -> list[dict[str, Any]]:
        encoded = [encode(p) for p in pairs]
        fits = [sum(map(len, e)) <= s.row_length for e in encoded]
        some = [e for e, fit in zip(encoded, fits) if fit]  # longer ones may exceed the model's context, too
        prompts, both = [e[0].prompt for e in some], [[x.completion for x in e] for e in some]
        scores = iter(score(Verifier(sft, "logp"), prompts, both).astype(float).tolist() if some else ())
        # Pairs that do not fit stay in the file without a reference, so that a resumed call counts them, too.
        return [{**dataclasses.asdict(p), "reference": next(scores) if fit else None} for p, fit in zip(pairs, fits)]

    # The reference is frozen, so that its log-probabilities are data: no second model is on the devices in training.
    rows = cached_jsonl(stage.folder / "pairs.jsonl", with_reference)
    kept = [row for row in rows if row["reference"] is not None]
    require((bool(kept), f"config.dpo.row_length={s.row_length}: none of {len(rows)} pairs fits into a row"))
    reference = np.array([row["reference"] for row in kept], np.float32)
    # From the file, not from `pairs`, so that a resumed call trains on what the first one recorded.
    groups = [encode(Pair(**{k: v for k, v in row.items() if k != "reference"})) for row in kept]
    arrays = pair_arrays(groups, reference, s.row_length, s.packed)
    model, summary = _train(sft, stage, "dpo", arrays, Preference, bar, watch)
    return model, {**summary, "pairs": len(kept), "dropped_pairs": len(rows) - len(kept)}


def train_head(
    sft: Model,
    kind: str,
    solutions: Sequence[Solution],
    task: Task,
    problems: dict[str, Problem],
    stage: Stage,
    labels: Mapping[tuple[str, str, bool], Sequence[float]] | None = None,
    *,
    bar: Bar | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Trains an ORM or a PRM on the solutions of D_VER, from G_SFT with a fresh value head.

    `stage`, `bar`: see `train_dpo`. `labels`: for a PRM, by key of a solution the labels of its `task.steps`; None:
    `Task.step_labels`. Raises UserError if no solution fits into a row, or for a PRM on a task without labels of steps.
    """
    s, tokenizer = stage.settings, tokenizer_of(sft)
    examples = [to_example(tokenizer, x.prompt, x.completion, x.tokens) for x in solutions]
    fits = [i for i, e in enumerate(examples) if len(e) <= s.row_length]
    steps = None
    if kind == "prm":
        known = [labels[x.key] if labels else task.step_labels(problems[x.problem_id], x.completion) for x in solutions]
        step_labels = [some for some in known if some is not None]
        fault = f"config.loop.verifiers: task {task.name} has no labels of steps for a prm; set config.prm.rollouts"
        require((len(step_labels) == len(known), fault))
        ends = [step_ends(task.steps, tokenizer, examples[i], solutions[i].completion) for i in fits]
        steps = [step_targets(e, step_labels[i]) for e, i in zip(ends, fits)]
    fault = f"config.{kind}.row_length={s.row_length}: none of {len(solutions)} solutions fits into a row"
    require((bool(fits), fault))
    arrays = graded_arrays([solutions[i] for i in fits], tokenizer, s.row_length, s.packed, steps)
    # Labelled tokens per language-model token over all data, not of a batch: see `value_loss`.
    scale = arrays["weight"].sum() / max(1.0, arrays["mask"].sum())
    arrays["lm_scale"] = np.full(len(arrays["tokens"]), scale, np.float32)
    model, summary = _train(add_value_head(sft, kind), stage, kind, arrays, Graded, bar)
    return model, {**summary, "solutions": len(fits), "dropped_solutions": len(solutions) - len(fits)}


@functools.cache
def update_step(config: Any, s: VerifierSettings, kind: str) -> tuple[Any, Any]:
    """Returns (optimiser, jitted step) of a verifier, one per configuration, so that all calls share a compilation."""
    loss: Any = functools.partial(value_loss, config=config, lm_weight=s.lm_weight, dropout=s.dropout)
    if kind == "dpo":
        loss = functools.partial(dpo_loss, config=config, beta=s.beta, alpha=s.alpha)
    tx = s.optimiser()
    return tx, make_step(s.through(loss), tx, s.accumulate)


def _train(
    start: Model,
    stage: Stage,
    kind: str,
    arrays: dict[str, np.ndarray],
    rows_type: type,
    bar: Bar | None,
    watch: Callable[[int, Params], None] | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Runs the training stage; `arrays` are the fields of `rows_type` and of the `Batch` in it, flat."""
    s = stage.settings
    steps = s.updates_for(len(arrays["tokens"]))
    # Made when the first batch is drawn: a finished stage, which is only loaded, draws none.
    stream = functools.cache(lambda: batches(arrays, s.batch_size, seed=stage.seed))
    tx, step = update_step(start.config, s, kind)

    def batch_at(n: int) -> Any:
        rest: dict[str, Any] = dict(stream()[n])
        return rows_type(Batch(**{f.name: rest.pop(f.name) for f in dataclasses.fields(Batch)}), **rest)

    data = data_hash(part for key in sorted(arrays) for part in (key, arrays[key]))
    name = "rpo" if kind == "dpo" and s.alpha else kind
    with bar(stage.name, steps) if bar else contextlib.nullcontext(stage.progress) as progress:
        stage = dataclasses.replace(stage, steps=steps, progress=progress, name=name, data=data)
        return train_stage(start, stage, tx, lambda n: step, batch_at, watch=watch)
