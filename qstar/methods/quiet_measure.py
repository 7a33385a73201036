"""Held-out metrics of Quiet-STaR by kind of token, the thoughts for the viewer, and early stopping.

A mean over all tokens hides the effect of thoughts, which help at hard tokens. The kinds are those of the corpus or,
for any text, the difficulty of a token for the base model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qstar import distributed
from qstar.data.corpus import Rows
from qstar.data.sources import read_jsonl, write_jsonl
from qstar.mesh import to_host
from qstar.methods.quiet_data import AnyArray, QuietContext, holds_steps
from qstar.models.config import ModelConfig
from qstar.models.hf import read_json
from qstar.models.model import Model
from qstar.runs.folder import cached_jsonl, intact, once_json, stable_seed
from qstar.thoughts import measure as thought_measure
from qstar.thoughts.measure import Scores
from qstar.train.checkpoint import Checkpoints
from qstar.train.stats import bootstrap_ci
from qstar.types import Batch, Params

BUCKETS = ((0.5, "easy (< 0.5 nats)"), (2.0, "middle (0.5 to 2)"), (np.inf, "hard (> 2 nats)"))  # of the base's NLL
# Alarms: mean |mixing weight|, and the share of distinct thoughts.
MIN_WEIGHT, MIN_DISTINCT = 0.01, 0.02
# Columns of the table that is printed: short titles, for 80 columns of a terminal.
TITLES = ("base NLL", "NLL", "base acc", "acc", "greedy", "random", "thoughts", "weight")
KEYS = "nll_base nll accuracy_base accuracy accuracy_greedy accuracy_random thought_accuracy weight".split()


class EarlyStopping:
    """Evaluates a model during training; stops after `patience` ones without a lower NLL and keeps the best model.

    Decisions are read from the files of the evaluations, so that a resumed run takes the same ones.
    """

    def __init__(self, ctx: QuietContext, arm: str, like: Model, thought_source: str, every: int, patience: int):
        """`like`: a model of the arm's configuration. every: steps, 0: no evaluation. patience: 0: no stopping."""
        self.ctx, self.arm, self.like, self.thought_source = ctx, arm, like, thought_source
        self.every, self.patience = every, patience
        # Apart from the arm's `training/`, which keeps the newest checkpoints, not the best.
        self.folder = ctx.workdir / arm / "stopping"

    def __call__(self, step: int, params: Params) -> bool:
        """Returns whether to stop after this step."""
        if not self.every or not step or step % self.every:
            return False
        # `train_stage` also calls this where a run resumes: measurements that exist are read, not repeated.
        model = self.like.replace(params=params)
        found = measure(self.ctx, self.arm, model, self.thought_source, step)
        for text in alarms(found) if self.thought_source == "sampled" else ():
            self.ctx.say(f"[yellow]{self.arm}, step {step}: {text}")
            self.ctx.writer.write(stage="alarm", arm=self.arm, step=step, text=text)
        if not self.patience:
            return False
        # On text of its own: choosing a step by the reported text would make its numbers too good.
        path = self.folder / f"step_{step:06d}.json"
        once_json(path, lambda: {"nll": stopping_nll(self.ctx, model, self.thought_source)})
        scores, best = self._scores(step), self.best(step)
        if best == step:
            with contextlib.closing(Checkpoints(self.folder / "best")) as kept:
                kept.save(step, params)
        return sum(s > best for s in scores) >= self.patience

    def _scores(self, last: int) -> dict[int, float]:
        found = {int(p.stem.removeprefix("step_")): p for p in sorted(self.folder.glob("step_*.json"))}
        return {step: read_json(path)["nll"] for step, path in found.items() if step <= last}

    def best(self, last: int) -> int:
        """Returns the step with the least NLL up to `last`, of equal ones the first; 0 if there is none."""
        scores = self._scores(last)
        return min(scores, key=scores.__getitem__, default=0)

    def choose(self, params: Params, summary: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        """Returns the best parameters instead of the last ones, and the summary with their step (`best_step`)."""
        best = self.best(summary["steps"]) if self.patience else 0
        if not best:
            return params, summary
        # The last step may be the best, and its parameters are at hand.
        if best != summary["steps"]:
            with contextlib.closing(Checkpoints(self.folder / "best")) as kept:
                params, _ = kept.restore(params, best)
        return params, {**summary, "best_step": best}


def stopping_nll(ctx: QuietContext, model: Model, thought_source: str) -> float:
    """Returns the mean NLL in nats on the held-out text of early stopping, which is not reported."""
    rows = ctx.corpus.stopping_rows(ctx.settings.evaluate.rows)
    if thought_source == "none":
        nll, _, counted = _score_text(ctx, model, rows)
        return float(nll[counted].mean())
    s = _score_thoughts(ctx, model, rows, thought_source, 1.0)
    return float(s.nll.mean(1)[s.counted].mean())


def alarms(found: dict[str, Any]) -> list[str]:
    """Returns warnings about degenerate thoughts."""
    out = []
    if found["weight_abs"] < MIN_WEIGHT:
        out.append(f"thoughts are ignored: their mean weight is {found['weight_abs']:.4f}")
    if found["distinct"] < MIN_DISTINCT:
        out.append(f"thoughts are alike: {found['distinct']:.1%} of them are distinct")
    return out


# ---------------------------------------------------------------------------------------------------------- metrics


def measure(ctx: QuietContext, arm: str, model: Model, thought_source: str, step: int) -> dict[str, Any]:
    """Returns (and writes once) the metrics of a model on the held-out text: WORKDIR/<arm>/evaluation/step_N.json.

    Keys are `<metric>/<kind of token>`: nll_base and accuracy_base without thoughts; nll, accuracy and weight with
    sampled thoughts (accuracy_low and _high: 95% over documents); nll_greedy and accuracy_greedy with greedy ones;
    nll_random and accuracy_random with random token ids; thought_accuracy, the share of thoughts that hold the true
    steps.
    """
    path = ctx.workdir / arm / "evaluation" / f"step_{step:06d}.json"
    known = intact(path)

    def make() -> dict[str, Any]:
        found = _measure(ctx, arm, model, thought_source, step)
        # Before the file, with which a killed run goes on: the metrics row would be lost. Sums per row stay out of it.
        numbers = {key: value for key, value in found.items() if key not in ("rows", "documents")}
        ctx.writer.write(stage="evaluation", arm=arm, step=step, **numbers)
        return found

    found = once_json(path, make)
    if not known:
        used = {title: key for title, key in zip(TITLES, KEYS) if f"{key}/all" in found}
        kinds = ("all", *found["classes"])
        table = [{"tokens": kind, **{t: found.get(f"{key}/{kind}") for t, key in used.items()}} for kind in kinds]
        ctx.table(f"{arm}, step {step}", table)
    return found


def _measure(ctx: QuietContext, arm: str, model: Model, thought_source: str, step: int) -> dict[str, Any]:
    rows = ctx.corpus.test_rows(ctx.settings.evaluate.rows)
    names, kinds = _kinds(ctx, rows)
    if thought_source == "none":
        nll, hit, counted = _score_text(ctx, model, rows)
        values: dict[str, AnyArray] = {"nll_base": nll, "accuracy_base": hit}
        kinds = np.where(counted, kinds, -2)
        means = means_by_kind(names, kinds, values, ("accuracy_base",), rows.documents)
        return {"classes": names, **means, **_row_sums(ctx, names, kinds, {"nll": nll}, rows.documents)}
    modes = {"": (thought_source, 1.0)}
    if thought_source == "sampled":
        # Random ids carry no content, so "_random" shows whether the trained model uses the content of its thoughts.
        modes |= {"_greedy": ("sampled", 0.0), "_random": ("random", 1.0)}
    out: dict[str, Any] = {"classes": names}
    for suffix, (source, temperature) in modes.items():
        s = _score_thoughts(ctx, model, rows, source, temperature)
        where = np.where(s.counted, kinds, -2)
        values = {f"nll{suffix}": s.nll.mean(1), f"accuracy{suffix}": s.hit.mean(1)}
        if not suffix:
            values |= {"nll_base": s.base_nll, "accuracy_base": s.base_hit}
            values |= {"weight": s.weight.mean(1), "reward": s.reward.mean(1)}
            out |= _diagnostics(s)
            out |= _row_sums(ctx, names, where, {"nll": s.nll.mean(1), "nll_base": s.base_nll}, rows.documents)
            _write_thoughts(ctx, arm, step, rows, names, kinds, s)
        if rows.expected is not None:
            values[f"thought_accuracy{suffix}"] = holds_steps(s.thoughts, rows.expected[:, :-1]).mean(1)
        out |= means_by_kind(names, where, values, () if suffix else ("accuracy",), rows.documents)
    return out


def means_by_kind(
    names: list[str],
    kinds: np.ndarray,
    values: dict[str, AnyArray],
    intervals: tuple[str, ...] = (),
    documents: np.ndarray | None = None,
) -> dict[str, float | None]:
    """Returns the means of values [B, M] over the tokens of each kind.

    Args:
      kinds: [B, M] index into `names`; -1: of no kind, -2: not counted. intervals: values that get a 95% interval.
      documents: [B] the document of each row, None where every row is one of its own.
    """
    out: dict[str, float | None] = {}
    for i, name in ((-1, "all"), *enumerate(names)):
        mine = kinds >= -1 if name == "all" else kinds == i
        for key, x in values.items():
            out[f"{key}/{name}"] = float(x[mine].mean()) if mine.any() else None
            if key in intervals and mine.any():
                _, low, high = _over_documents(np.where(mine, x, 0.0).sum(axis=1), mine.sum(axis=1), documents)
                out |= {f"{key}_low/{name}": low, f"{key}_high/{name}": high}
    return out


def _over_documents(sums: AnyArray, counts: AnyArray, documents: AnyArray | None) -> tuple[float, float, float]:
    # Returns the mean per token and its 95% interval. Documents are resampled, not their rows or tokens, which are not
    # independent. sums, counts: [B] per row.
    sums, counts = np.asarray(sums), np.asarray(counts)
    if documents is not None:
        _, place = np.unique(documents, return_inverse=True)
        sums, counts = (np.bincount(place, weights=x) for x in (sums, counts))
    low, high = bootstrap_ci(sums[counts > 0], counts=counts[counts > 0])
    return float(sums.sum() / counts.sum()), low, high


def _row_sums(
    ctx: QuietContext, names: list[str], kinds: np.ndarray, values: dict[str, AnyArray], documents: np.ndarray | None
) -> dict[str, Any]:
    """Returns sums of values [B, M] over each row's tokens of a kind, and their counts, for `compare_arms`."""
    # Generated corpora have a kind that thoughts are for, and thousands of rows: their means say enough.
    if ctx.corpus.classes:
        return {}
    out: dict[str, Any] = {}
    for i, name in ((-1, "all"), *enumerate(names)):
        mine = kinds >= -1 if name == "all" else kinds == i
        sums = {key: np.where(mine, x, 0.0).sum(axis=1).round(4).tolist() for key, x in values.items()}
        out[name] = {"count": mine.sum(axis=1).tolist(), **sums}
    return {"rows": out} | ({} if documents is None else {"documents": documents.tolist()})


def compare_arms(ctx: QuietContext, found: dict[str, dict[str, Any]]) -> None:
    """Writes WORKDIR/comparison.jsonl, once: differences of NLL in nats per token, first minus second, with intervals.

    Pairs are the arms with sampled thoughts and every other arm, and each arm's NLL with and without thoughts. All
    are measured on the same held-out tokens. Intervals (95%) resample documents; a difference below 0 favours the first.

    Args:
      found: the `measure` of every arm's kept model. Arms without "rows" (generated corpora) are left out.
    """
    rows = {name: x["rows"] for name, x in found.items() if "rows" in x}
    thinking = [name for name in rows if "nll_greedy/all" in found[name]]
    sides = [(a, b, "nll") for a in thinking for b in rows if b != a and (b not in thinking or a < b)]
    sides += [(name, name, "nll_base") for name in rows if "nll_base" in rows[name]["all"]]

    def make() -> list[dict[str, Any]]:
        out = []
        for a, b, key in sides:
            for kind, first in rows[a].items():
                if not any(first["count"]):
                    continue
                change = np.asarray(first["nll"]) - np.asarray(rows[b][kind][key])
                difference, low, high = _over_documents(change, first["count"], found[a].get("documents"))
                name = f"{b}, without thoughts" if key == "nll_base" else b
                row = {"first": a, "second": name, "tokens": kind}
                out.append(row | {"difference": difference, "low": low, "high": high})
        return out

    if sides:
        table = cached_jsonl(ctx.workdir / "comparison.jsonl", make)
        ctx.table("differences of NLL, first minus second, 95% over documents", table)


def _diagnostics(s: Scores) -> dict[str, Any]:
    # The weight may be negative or above 1 (the official code has no sigmoid), so the histogram widens to what occurs.
    w = rearrange(s.weight, "b p m -> b m p")[s.counted]
    edges = np.linspace(min(-0.1, float(w.min())), max(1.0, float(w.max())), 41)
    thoughts = rearrange(rearrange(s.thoughts, "b p m s -> b m p s")[s.counted], "n p s -> (n p) s")
    return {
        "weight_abs": float(np.abs(w).mean()),
        "weight_histogram": {"edges": edges.round(4).tolist(), "counts": np.histogram(w, edges)[0].tolist()},
        # Given thoughts (controls) were not sampled and have NLL nan.
        "thought_entropy": float(np.nanmean(s.thought_nll)) if not np.isnan(s.thought_nll).all() else None,
        "reward_positive": float((rearrange(s.reward, "b p m -> b m p")[s.counted] > 0).mean()),
        "distinct": len(np.unique(thoughts, axis=0)) / len(thoughts),
    }


# ----------------------------------------------------------------------------------------------------- scoring of rows


def control_thoughts(
    thought_source: str, config: ModelConfig, key: jax.Array, shape: tuple[int, ...]
) -> jax.Array | None:
    """Returns the thoughts of a control, int32 token ids of the given shape; None for sampled thoughts."""
    # A pause (Goyal et al. 2023) is the first forbidden id: no text holds it, so its embedding is free to be learned.
    if thought_source == "random":
        return thought_measure.random_thoughts(key, config, shape)
    return jnp.full(shape, config.required_thoughts.forbidden_ids[0], jnp.int32) if thought_source == "pause" else None


def _score_thoughts(ctx: QuietContext, model: Model, rows: Rows, thought_source: str, temperature: float) -> Scores:
    config, P = cast(ModelConfig, model.config), ctx.settings.evaluate.thoughts_per_position
    S = config.required_thoughts.thought_tokens

    def score(i: int, batch: Batch) -> Scores:
        # The same keys at every evaluation, so that differences between steps and arms are less noisy.
        key = jax.random.key(stable_seed("evaluate", i))
        B, N = batch.tokens.shape
        given = control_thoughts(thought_source, config, key, (B, P, N - 1, S))
        options = {"passes": P, "temperature": temperature, "thoughts": given}
        return thought_measure.score(model.params, config, batch, key, **options)

    return _over_batches(ctx, rows, score)


def _score_text(ctx: QuietContext, model: Model, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _over_batches(ctx, rows, lambda i, batch: thought_measure.score_text(model.params, model.config, batch))


def _over_batches(ctx: QuietContext, rows: Rows, score: Callable[[int, Batch], Any]) -> Any:
    size = min(ctx.settings.evaluate.batch_size, len(rows.tokens))
    parts = []
    for i, begin in enumerate(range(0, len(rows.tokens), size)):
        part = [x[begin : begin + size] for x in rows[:4]]
        n = len(part[0])
        # All batches have one size, so that scoring compiles once: the last one is filled up with copies of a row.
        filled = Rows(*(np.concatenate([x, np.repeat(x[:1], size - n, axis=0)]) for x in part))
        found = to_host(score(i, ctx.global_batch(filled)))
        parts.append(jax.tree.map(lambda x, n=n: x[:n], found))
    return jax.tree.map(lambda *xs: np.concatenate(xs), *parts)


def measure_difficulty(ctx: QuietContext, base: Model) -> None:
    """Writes the base's NLL of every held-out token, WORKDIR/base/difficulty.jsonl, where the corpus names no kinds."""
    # Measured on the base, once: all arms' tables group the same tokens.
    model = base.replace(config=base.config.replace(thoughts=ctx.thoughts))

    def make() -> list[dict[str, Any]]:
        nll, _, _ = _score_text(ctx, model, ctx.corpus.test_rows(ctx.settings.evaluate.rows))
        return [{"nll": np.round(x, 4).tolist()} for x in nll]

    if not ctx.corpus.classes:
        cached_jsonl(ctx.workdir / "base" / "difficulty.jsonl", make)


def _kinds(ctx: QuietContext, rows: Rows) -> tuple[list[str], np.ndarray]:
    if rows.classes is not None:
        return list(ctx.corpus.classes), rows.classes[:, 1:]
    nll = np.asarray([r["nll"] for r in read_jsonl(ctx.workdir / "base" / "difficulty.jsonl")])
    return [name for _, name in BUCKETS], np.searchsorted([edge for edge, _ in BUCKETS[:-1]], nll)


def _write_thoughts(
    ctx: QuietContext, arm: str, step: int, rows: Rows, names: list[str], kinds: np.ndarray, s: Scores
) -> None:
    if not distributed.is_first():
        return
    text = functools.cache(ctx.corpus.tokenizer.show)
    out = []
    for b in range(min(ctx.settings.evaluate.viewer_texts, len(rows.tokens))):
        counted = s.counted[b]
        thoughts = [
            {
                "tokens": [[text(int(t)) for t in c] for c in s.thoughts[b, p]],
                "nll": _rounded(s.nll[b, p], counted),
                "weight": _rounded(s.weight[b, p], counted),
                "reward": _rounded(s.reward[b, p], counted),
            }
            for p in range(s.nll.shape[1])
        ]
        is_text = rows.segment_ids[b] > 0
        tokens = [text(int(t)) if real else "" for t, real in zip(rows.tokens[b], is_text)]
        # Kinds [N-1] are of the token after each position; the first token of a text has none.
        classes = ["", *(names[k] if k >= 0 else "" for k in kinds[b])]
        row = {"text": b, "tokens": tokens, "classes": classes, "base_nll": _rounded(s.base_nll[b], counted)}
        out.append({**row, "thoughts": thoughts})
    write_jsonl(ctx.workdir / arm / "thoughts" / f"step_{step:06d}.jsonl", out, checksum=True)


def _rounded(x: AnyArray, counted: AnyArray) -> list[float | None]:
    return [round(float(v), 4) if c else None for v, c in zip(x, counted)]
