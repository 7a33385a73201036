"""Measuring a model that thinks on held-out text: by kind of token, with its thoughts, greedy ones, and random ones.

The average over all tokens hides the effect: thoughts help where tokens are hard, and there alone. Kinds are those of the
corpus, or, of any text, how hard its tokens are for the base model.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar import distributed
from qstar.data.corpus import Rows
from qstar.data.sources import read_jsonl, write_jsonl
from qstar.mesh import to_host
from qstar.methods.quiet_base import holds_steps
from qstar.methods.quiet_data import QuietContext
from qstar.models.hf import read_json
from qstar.models.model import Model
from qstar.runs.folder import cached_jsonl, intact, once_json, stable_seed
from qstar.thoughts import measure as m
from qstar.train.checkpoint import Checkpoints
from qstar.train.metrics import show_table
from qstar.train.stats import bootstrap_ci
from qstar.types import Params

BUCKETS = ((0.5, "easy (< 0.5 nats)"), (2.0, "middle (0.5 to 2)"), (np.inf, "hard (> 2 nats)"))  # of the base's own NLL
IGNORED, COLLAPSED = 0.01, 1e-3  # alarms: mean |weight|, and the spread of rewards at one position, in nats


class Watch:
    """Measures a model in training every so many steps; says when it no longer improves, and keeps the best one for that.

    What it decides by is read from the files of the measurements, so that a resumed run decides alike.
    """

    def __init__(self, ctx: QuietContext, arm: str, like: Model, thinker: str, every: int, patience: int):
        """`like` is a model of the arm's configuration; `every` 0 never measures."""
        self.study, self.arm, self.like, self.thinker = ctx, arm, like, thinker
        self.every, self.patience = every, patience

    def __call__(self, step: int, params: Params) -> bool:
        if not self.every or not step or step % self.every:
            return False
        model = self.like.replace(params=params)
        found = measure(self.study, self.arm, model, self.thinker, step)
        for text in alarms(found) if self.thinker == "sampled" else ():
            self.study.say(f"[yellow]{self.arm}, step {step}: {text}")
            self.study.writer.write(stage="alarm", arm=self.arm, step=step, text=text)
        if not self.patience:
            return False
        once_json(self._path(step), lambda: {"nll": stopping_nll(self.study, model, self.thinker)})
        best = self.best(step)
        if best == step:
            with contextlib.closing(Checkpoints(self.folder / "best")) as kept:
                kept.save(step, params)
        return sum(best < s <= step for s in self._steps()) >= self.patience

    @property
    def folder(self) -> Path:
        """WORKDIR/<arm>/stopping: the scores that the arm stops by, and its best parameters so far."""
        return self.study.workdir / self.arm / "stopping"

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.json"

    def _steps(self) -> list[int]:
        return sorted(int(p.stem.removeprefix("step_")) for p in self.folder.glob("step_*.json"))

    def best(self, last: int) -> int:
        """The step of the least NLL up to `last`, of equal ones the first; 0 if there is none."""
        scores = {s: read_json(self._path(s))["nll"] for s in self._steps() if s <= last}
        return min(scores, key=scores.get, default=0)

    def choose(self, params: Params, summary: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        """Returns the best parameters instead of the last ones, and their step in the summary (`best_step`)."""
        best = self.best(summary["steps"]) if self.patience else 0
        if not best:
            return params, summary
        if best != summary["steps"]:
            with contextlib.closing(Checkpoints(self.folder / "best")) as kept:
                params, _ = kept.restore(params, best)
        return params, {**summary, "best_step": best}


def stopping_nll(ctx: QuietContext, model: Model, thinker: str) -> float:
    """The mean NLL that an arm stops by: of held-out text that is not reported."""
    rows = ctx.corpus.stopping_rows(ctx.settings.evaluate.rows)
    if thinker == "none":
        nll, _, counted = _text(ctx, model, rows)
        return float(nll[counted].mean())
    s = _scores(ctx, model, rows, thinker, 1.0)
    return float(s.nll.mean(1)[s.counted].mean())


def alarms(found: dict[str, Any]) -> list[str]:
    """What is wrong with the thoughts of a measurement, in words."""
    out = []
    if abs(found.get("weight_abs", 1.0)) < IGNORED:
        out.append(f"thoughts are ignored: their mean weight is {found['weight_abs']:.4f}")
    if found.get("distinct", 1.0) < 0.02:
        out.append(f"thoughts are alike: {found['distinct']:.1%} of them are distinct")
    return out


def measure(ctx: QuietContext, arm: str, model: Model, thinker: str, step: int) -> dict[str, Any]:
    """Returns (and writes once) the metrics of a model on the held-out text: WORKDIR/<arm>/evaluation/step_N.json.

    Keys are `<metric>/<kind of token>`: nll_base, accuracy_base without thoughts; nll, accuracy, weight with sampled ones
    (accuracy_low and _high: 95% over rows); nll_greedy, accuracy_greedy; nll_swapped, accuracy_swapped with random ids in
    place of the model's thoughts; right, the share of thoughts that hold the true steps.
    """
    path = ctx.workdir / arm / "evaluation" / f"step_{step:06d}.json"
    if intact(path):
        return once_json(path, dict)
    found = once_json(path, lambda: _measure(ctx, arm, model, thinker, step))
    ctx.writer.write(stage="evaluation", arm=arm, step=step, **found)
    if distributed.is_first():
        show_table(ctx.console, f"{arm}, step {step}", table(found))
    return found


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row per kind of token."""
    columns = {"base NLL": "nll_base", "NLL": "nll", "base acc": "accuracy_base", "acc": "accuracy"}
    columns |= {"greedy": "accuracy_greedy", "swapped": "accuracy_swapped", "right": "right", "weight": "weight"}
    there = {title: key for title, key in columns.items() if f"{key}/all" in found}
    return [{"tokens": c, **{t: found.get(f"{k}/{c}") for t, k in there.items()}} for c in ("all", *found["classes"])]


def _measure(ctx: QuietContext, arm: str, model: Model, thinker: str, step: int) -> dict[str, Any]:
    rows = ctx.corpus.test_rows(ctx.settings.evaluate.rows)
    names, kinds = _kinds(ctx, rows)
    if thinker == "none":
        nll, hit, counted = _text(ctx, model, rows)
        values = {"nll_base": nll, "accuracy_base": hit}
        return {"classes": names, **_by_kind(names, np.where(counted, kinds, -2), values, ci=("accuracy_base",))}
    modes = {"": (1.0, thinker), "_greedy": (0.0, thinker), "_swapped": (1.0, "random")}
    out: dict[str, Any] = {"classes": names}
    for suffix, (temperature, way) in modes.items():
        if suffix and thinker != "sampled":
            continue
        s = _scores(ctx, model, rows, way, temperature)
        where = np.where(s.counted, kinds, -2)
        values = {f"nll{suffix}": s.nll.mean(1), f"accuracy{suffix}": s.hit.mean(1)}
        if not suffix:
            values |= {"nll_base": s.base_nll, "accuracy_base": s.base_hit, "weight": s.weight.mean(1)}
            values |= {"reward": s.reward.mean(1)}
            out |= _diagnostics(s, where >= -1)
            _write_thoughts(ctx, arm, step, rows, names, kinds, s)
        if rows.expected is not None:
            values[f"right{suffix}"] = holds_steps(s.thoughts, rows.expected[:, :-1]).mean(1)
        out |= _by_kind(names, where, values, ci=() if suffix else ("accuracy",))
    return out


def _by_kind(
    names: list[str], where: np.ndarray, values: dict[str, np.ndarray], ci: tuple[str, ...] = ()
) -> dict[str, float]:
    """Means of values [B, M] over the tokens of each kind (where [B, M]: kind, -1 = of no kind, -2 = not counted)."""
    out = {}
    for i, name in ((-1, "all"), *enumerate(names)):
        mine = where >= -1 if name == "all" else where == i
        for key, x in values.items():
            out[f"{key}/{name}"] = float(x[mine].mean()) if mine.any() else None
            if key in ci and mine.any():  # rows are the independent things, not their tokens
                counts = mine.sum(axis=1)
                sums = np.where(mine, x, 0.0).sum(axis=1)
                interval = bootstrap_ci(sums[counts > 0], counts=counts[counts > 0])
                out[f"{key}_low/{name}"], out[f"{key}_high/{name}"] = interval
    return out


def _diagnostics(s: m.Scores, counted: np.ndarray) -> dict[str, Any]:
    w = np.moveaxis(s.weight, 1, 2)[counted]
    edges = np.linspace(min(-0.1, float(w.min())), max(1.0, float(w.max())), 41)
    thoughts = np.moveaxis(s.thoughts, 1, 2)[counted].reshape(-1, s.thoughts.shape[-1])
    return {
        "weight_abs": float(np.abs(w).mean()),
        "weight_histogram": {"edges": edges.round(4).tolist(), "counts": np.histogram(w, edges)[0].tolist()},
        "thought_entropy": float(np.nanmean(s.thought_nll)) if not np.isnan(s.thought_nll).all() else None,
        "reward_positive": float((np.moveaxis(s.reward, 1, 2)[counted] > 0).mean()),
        "distinct": len(np.unique(thoughts, axis=0)) / len(thoughts),
    }


def _batches(ctx: QuietContext, rows: Rows) -> Any:
    """Yields parts of the rows of one and the same size; the last one is filled up, and says how many are its own."""
    size = min(ctx.settings.evaluate.batch_size, len(rows.tokens))
    for begin in range(0, len(rows.tokens), size):
        part = [x[begin : begin + size] for x in rows[:4]]
        own = len(part[0])
        yield ctx.whole_batch(Rows(*(np.concatenate([x, np.repeat(x[:1], size - own, axis=0)]) for x in part))), own


def _scores(ctx: QuietContext, model: Model, rows: Rows, thinker: str, temperature: float) -> m.Scores:
    """Scores of all rows, on the host."""
    config, P = model.config, ctx.settings.evaluate.passes
    parts = []
    for i, (batch, own) in enumerate(_batches(ctx, rows)):
        key = jax.random.key(stable_seed("evaluate", i))
        shape = (len(batch.tokens), P, batch.tokens.shape[1] - 1, config.thoughts.thought_tokens)
        given = None
        if thinker == "random":
            given = m.random_thoughts(key, config, shape)
        elif thinker == "pause":
            given = jnp.full(shape, config.thoughts.forbidden_ids[0], jnp.int32)
        found = m.score(model.params, config, batch, key, passes=P, temperature=temperature, thoughts=given)
        parts.append(jax.tree.map(lambda x, own=own: x[:own], to_host(found)))
    return m.Scores(*(np.concatenate(x) for x in zip(*parts)))


def _text(ctx: QuietContext, model: Model, rows: Rows) -> tuple[np.ndarray, ...]:
    parts = []
    for batch, own in _batches(ctx, rows):
        parts.append([x[:own] for x in to_host(m.score_text(model.params, model.config, batch))])
    return tuple(np.concatenate(x) for x in zip(*parts))


def measure_difficulty(ctx: QuietContext, base: Model) -> None:
    """Writes the base's NLL of every held-out token, WORKDIR/base/difficulty.jsonl, where the corpus names no kinds.

    Called before any arm trains: the kinds of all arms' tables are how hard a token is for the base.
    """
    model = base.replace(config=base.config.replace(thoughts=ctx.thoughts))

    def make() -> list[dict[str, Any]]:
        return [
            {"nll": np.round(x, 4).tolist()}
            for x in _text(ctx, model, ctx.corpus.test_rows(ctx.settings.evaluate.rows))[0]
        ]

    if not ctx.corpus.classes:
        cached_jsonl(ctx.workdir / "base" / "difficulty.jsonl", make)


def _kinds(ctx: QuietContext, rows: Rows) -> tuple[list[str], np.ndarray]:
    """Returns the kinds' names, and that of the token after each position, [B, N-1]."""
    if rows.classes is not None:
        return list(ctx.corpus.classes), rows.classes[:, 1:]
    nll = np.asarray([r["nll"] for r in read_jsonl(ctx.workdir / "base" / "difficulty.jsonl")])
    return [name for _, name in BUCKETS], np.searchsorted([edge for edge, _ in BUCKETS[:-1]], nll)


def _write_thoughts(
    ctx: QuietContext, arm: str, step: int, rows: Rows, names: list[str], kinds: np.ndarray, s: m.Scores
) -> None:
    """Writes WORKDIR/<arm>/thoughts/step_N.jsonl: the first texts, token by token, for the viewer."""
    text = functools.cache(ctx.corpus.tokenizer.show)
    out = []
    for b in range(min(ctx.settings.evaluate.shown, len(rows.tokens))):
        counted = s.counted[b]
        thoughts = [
            {
                "tokens": [[text(int(t)) for t in c] for c in s.thoughts[b, p]],
                "nll": _round(s.nll[b, p], counted),
                "weight": _round(s.weight[b, p], counted),
                "reward": _round(s.reward[b, p], counted),
            }
            for p in range(s.nll.shape[1])
        ]
        real = rows.segment_ids[b] > 0
        out.append(
            {
                "text": b,
                "tokens": [text(int(t)) if r else "" for t, r in zip(rows.tokens[b], real)],
                "classes": ["", *(names[k] if k >= 0 else "" for k in kinds[b])],
                "base_nll": _round(s.base_nll[b], counted),
                "thoughts": thoughts,
            }
        )
    if distributed.is_first():
        write_jsonl(ctx.workdir / arm / "thoughts" / f"step_{step:06d}.jsonl", out, checksum=True)


def _round(x: np.ndarray, counted: np.ndarray) -> list[float | None]:
    return [round(float(v), 4) if c else None for v, c in zip(x, counted)]
