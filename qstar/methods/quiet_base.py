"""The model that learns to think: pretrained weights, or a small one trained on the corpus' own text first; and its gates.

A from-scratch base must be able to write the steps that help, and must not do so of its own accord, or there is nothing to
see. The gates check that, cheaply, before any arm is paid for.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from qstar.errors import require
from qstar.mesh import to_host
from qstar.methods.quiet_data import QuietContext
from qstar.models import heads
from qstar.models.model import Model
from qstar.runs.base_model import check_gates, train_base
from qstar.runs.folder import stable_seed
from qstar.runs.stages import Stage, TrainSettings, UpdateSettings, sft_step, train_stage
from qstar.tasks.fold_digits import Folds
from qstar.thoughts import measure


def prepare(ctx: QuietContext, model: Model) -> Model:
    """Trains the base for `config.base.steps` (0: as it is), and checks its gates.

    Raises:
      UserError: a gate that does not hold, or a training that diverged.
    """
    if ctx.settings.base.steps:
        model = train_base(ctx, lambda stage: _train(ctx, model, stage), UpdateSettings)
    if ctx.settings.gates:
        folds = isinstance(ctx.corpus, Folds)
        require((folds, "config.gates: there are measurements for data.name='folds' alone"))
        check_gates(ctx, ctx.workdir / "base", lambda: fold_measurements(ctx, model))
    return model


def _train(ctx: QuietContext, model: Model, stage: Stage) -> tuple[Model, dict[str, Any]]:
    tx, step = sft_step(model.config, TrainSettings(**vars(stage.settings)))
    size = stage.settings.batch_size
    return train_stage(model, stage, tx, lambda n: step, lambda n: ctx.batch(ctx.corpus.base_rows(n, size, ctx.seed)))


def fold_measurements(ctx: QuietContext, model: Model, size: int = 600) -> dict[str, float]:
    """What a base model knows of the steps, in nats and shares.

    direct_nll: of hard answers without steps, the dash left out. worked_nll, worked_accuracy: of hard answers after the
    right steps; step_nll: of the steps. right, right_greedy: share of thoughts that hold all steps, with the dash as
    start and end, before any training to think.
    """
    corpus, config = Folds(), model.config.replace(thoughts=ctx.thoughts)  # one document a row
    rows, hard = corpus.test_rows(size), len(corpus.classes) - 1
    batch, dashed = ctx.whole_batch(rows), rows.tokens.copy()
    dashed[:, -2] = ctx.start_id  # in place of the answers of one-document rows
    nll, dash_nll = (
        to_host(measure.score_text(model.params, config, b)[0])
        for b in (batch, ctx.whole_batch(rows._replace(tokens=dashed)))
    )
    at = rows.classes[:, 1:] == hard
    # The dash is fed nowhere: it swaps targets only where the answer stands, and no later score is read.
    direct = nll + np.log1p(-np.minimum(np.exp(-dash_nll), 1 - 1e-6))
    worked = corpus.worked_rows(size)
    w_nll, w_hit, _ = to_host(measure.score_text(model.params, config, ctx.whole_batch(worked)))
    answer, step = worked.classes[:, 1:] == hard, worked.classes[:, 1:] == 2
    out = {
        "direct_nll": float(direct[at].mean()),
        "worked_nll": float(w_nll[answer].mean()),
        "worked_accuracy": float(w_hit[answer].mean()),
        "step_nll": float(w_nll[step].mean()),
    }
    params = heads.attach_thoughts(model.params, config, jax.random.key(0), ctx.start_id)
    for name, temperature in (("right", 1.0), ("right_greedy", 0.0)):
        scores = measure.score(params, config, batch, jax.random.key(stable_seed("gates")), temperature=temperature)
        share = holds_steps(to_host(scores.thoughts), rows.expected[:, :-1])
        out[name] = float(share[:, 0][at].mean())
    return out


def holds_steps(thoughts: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Whether thoughts [B, P, M, S] begin with the expected tokens [B, M, K] (-1 beyond their end), as far as they reach:
    bool [B, P, M]; False where nothing is expected."""
    S, K = thoughts.shape[-1], expected.shape[-1]
    n = min(S, K)
    wanted = expected[:, None, :, :n]
    return np.all((thoughts[..., :n] == wanted) | (wanted < 0), axis=-1) & (expected[:, None, :, 0] >= 0)
