"""Measuring a model on question answering, with thoughts and without: the metrics of Quiet-STaR (arXiv 2403.09629).

`expected_accuracy` is the official zero-shot number. A question with its answer is one teacher-forced text; the score is the
product, over the answer's tokens, of their probabilities, renormalised over the tokens that could stand there (digits and the
end of the line; letters and the end of the line). It is the chance that a sampled answer is right. Beside it stands exact
match: whether every token of the answer is the likeliest of those, which is what greedy decoding among them would write.

`zero_shot_cot` lets the model reason aloud first ("Let's think step by step."), and votes over k answers.

One thing is not copied: official code that meets an answer which does not begin with a digit (-3, $5) takes it for a letter,
so that the end of its line is all that counts. Here its digits count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qstar import tree
from qstar.errors import UserError, require
from qstar.mesh import put_global_batch, to_host
from qstar.models import decoder
from qstar.models.attention import precision
from qstar.models.config import ModelConfig
from qstar.models.model import Model
from qstar.models.scoring import MIN_LENGTH
from qstar.models.thought_config import ThoughtConfig
from qstar.runs.evaluate import votes
from qstar.runs.rollouts import generate
from qstar.tasks.base import Problem, Task, ZeroShot
from qstar.text.tokenizer import Tokenizer
from qstar.thoughts import forward, layout
from qstar.thoughts import rollout as thinking
from qstar.train.stats import summarise
from qstar.types import Params


class Row(NamedTuple):
    """One problem, tokenised."""

    tokens: list[int]
    positions: list[int]  # that predict a token which counts
    right: list[int]  # which of the allowed ids comes next, an index, per position


class AnswerLogits(NamedTuple):
    """Logits of the A allowed ids at the M positions that count."""

    base: jax.Array  # [B, M, A] float32, without thoughts
    mixed: jax.Array  # [B, P, M, A] with them; P = 0 without thoughts
    weight: jax.Array  # [B, P, M] of the thought


def expected_accuracy(
    model: Model,
    task: Task,
    *,
    split: str = "test",
    limit: int = 0,
    thoughts: ThoughtConfig | bool = True,
    passes: int = 1,
    temperature: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns the official zero-shot accuracy (`expected`) and exact match, with thoughts and (`_base`) without.

    Each comes with its 95% bootstrap interval over problems. All numbers are from one forward per problem, in which only the
    positions before answer tokens think; no logits but those of the allowed ids are ever computed.

    Args:
      limit: first so many problems; 0: all.
      thoughts: how to think, True for the model's own config, False for the base numbers alone.
      passes: thoughts per position; a problem's score is the mean over them.
      temperature: of the thoughts, 0 is greedy (the paper); None: as the config trains (the official code: 1).
      batch_size: texts at once. seed: of the thoughts.

    Raises:
      UserError: a model without tokenizer, or that cannot think; a task that has no short answers; a tokenizer that does not
      write them symbol by symbol; a text that is longer than the model's context.
    """
    config = thinking_config(model, thoughts)
    problems = _problems(model, task, split, limit)
    texts = [task.zero_shot(p) for p in problems]
    require((None not in texts, f"task {task.name} has no zero-shot text to score; metric 'expected' needs one"))
    allowed = symbol_ids(model.tokenizer, texts[0].symbols)
    rows = [tokenise(model, p, text, allowed) for p, text in zip(problems, texts)]
    scores = {name: np.zeros(len(rows)) for name in ("expected", "exact", "expected_base", "exact_base", "weight")}
    ids = jnp.asarray(list(allowed.values()), jnp.int32)
    key = tree.random_key(seed)
    for number, (length, some) in enumerate(batches(rows, batch_size)):
        arrays = _arrays([rows[i] for i in some], length, batch_size)
        thought_temperature = jnp.float32(
            config.thoughts.temperature if config.thoughts and temperature is None else temperature or 0.0
        )
        given = put_global_batch(arrays[:3], model.mesh)
        found = answer_logits(
            model.params,
            config,
            *given,
            ids,
            jax.random.fold_in(key, number),
            thought_temperature,
            passes if config.thoughts else 0,
        )
        for name, values in judge(to_host(found), arrays[3], arrays[4]).items():
            scores[name][some] = values[: len(some)]
    if not config.thoughts:
        scores = {name: scores[name] for name in ("expected_base", "exact_base")}
    groups = [p.group for p in problems]
    groups = groups if len(set(groups)) > 1 else [""] * len(groups)
    result: dict[str, Any] = {"problems": len(problems)}
    for name, values in scores.items():
        result |= summarise(name, values.tolist(), groups)
    return result


def thinking_config(model: Model, thoughts: ThoughtConfig | bool) -> ModelConfig:
    """Returns the model's config with the thoughts to evaluate (T = 1), or with none.

    Raises:
      UserError: thoughts of a model that cannot think.
    """
    if not thoughts:
        return model.config.replace(thoughts=None)
    chosen = model.config.thoughts if thoughts is True else thoughts
    able = isinstance(chosen, ThoughtConfig) and {"thoughts", "mixing"} <= model.params.keys()
    require(
        (able, "this model cannot think: it has no start and end vectors and no mixing head; evaluate without thoughts")
    )
    return model.config.replace(thoughts=chosen.replace(talk_tokens=1))


def _problems(model: Model, task: Task, split: str, limit: int) -> list[Problem]:
    if model.tokenizer is None:
        raise UserError("evaluation needs a tokenizer, and this model has none (no tokenizer files in its folder)")
    problems = task.problems(split)[: limit or None]
    if not problems:
        raise UserError(f"task {task.name} has no problems in split {split!r}")
    return problems


# ---------------------------------------------------------------------------------------------------------- tokens


def symbol_ids(tokenizer: Tokenizer, symbols: Sequence[str]) -> dict[str, int]:
    """Returns the token id of every symbol where it stands in an answer (after a space, if it is the first).

    Raises:
      UserError: the tokenizer has no token of its own for one.
    """
    found: dict[str, int] = {}
    for symbol in symbols:
        _, tail = tokenizer.encode_pair("Q:\nA:", f" {symbol if symbol.strip() else symbols[0] + symbol}\n")
        ids = [i for i in tail if _symbol(tokenizer, i) == symbol]
        if not ids:
            raise UserError(
                f"this tokenizer has no token of its own for {symbol!r} in an answer; the metric 'expected' "
                "compares answers symbol by symbol"
            )
        found[symbol] = ids[0]
    return found


def _symbol(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.show(token).strip(" ")


def tokenise(model: Model, problem: Problem, text: ZeroShot, allowed: dict[str, int]) -> Row:
    """Returns a problem's tokens, and where in them the answer's symbols are.

    Raises:
      UserError: a text that is too long, or an answer that is not written symbol by symbol.
    """
    head, tail = model.tokenizer.encode_pair(text.prompt, text.answer)
    if len(head) + len(tail) > model.config.max_positions:
        raise UserError(
            f"problem {problem.id}: its {len(head) + len(tail)} tokens exceed the model's context of "
            f"{model.config.max_positions}"
        )
    order = list(allowed.values())
    places = [(len(head) + k - 1, order.index(i)) for k, i in enumerate(tail) if i in order]
    written = "".join(_symbol(model.tokenizer, order[right]) for _, right in places)
    wanted = "".join(c for c in text.answer if c in allowed)
    if written != wanted:
        raise UserError(
            f"problem {problem.id}: this tokenizer does not write the answer {text.answer.strip()!r} symbol by symbol; "
            "the metric 'expected' needs one that does"
        )
    return Row([*head, *tail], *map(list, zip(*places)))


def batches(rows: Sequence[Row], size: int) -> Iterator[tuple[int, list[int]]]:
    """Yields (padded length, indices): rows of like length together, so that few shapes compile and little is padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for begin in range(0, len(order), size):
        some = order[begin : begin + size]
        longest = len(rows[some[-1]].tokens)
        yield max(MIN_LENGTH, -(-longest // 32) * 32), some


def _arrays(rows: Sequence[Row], length: int, size: int) -> tuple[np.ndarray, ...]:
    """Tokens and mask [size, length], positions [size, M], right [size, M] and counts [size, M]; the last row fills up."""
    most = -(-max(len(row.positions) for row in rows) // 4) * 4
    tokens, mask = np.zeros((2, size, length), np.int32)
    positions, right, counts = np.zeros((3, size, most), np.int32)
    for r in range(size):
        row = rows[min(r, len(rows) - 1)]
        n, m = len(row.tokens), len(row.positions)
        tokens[r, :n], mask[r, :n] = row.tokens, 1
        positions[r] = row.positions[-1]  # a position more of those that think anyway; it counts nothing
        positions[r, :m], right[r, :m], counts[r, :m] = row.positions, row.right, 1
    return tokens, mask, positions, right, counts


# ----------------------------------------------------------------------------------------------------------- scores


@partial(jax.jit, static_argnames=("config", "passes"))
def answer_logits(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    mask: jax.Array,
    positions: jax.Array,
    allowed: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
    passes: int,
) -> AnswerLogits:
    """Runs texts once, thinking at the given positions alone.

    Args:
      tokens, mask: [B, N]. positions: [B, M]. allowed: [A] token ids. passes: thoughts per position; 0: none.
    """
    kernel, bias = decoder.head(params, config)
    kernel, bias = kernel[:, allowed], None if bias is None else bias[allowed]

    def logits(hidden: jax.Array) -> jax.Array:  # [..., E] -> [..., A]: as `decoder.unembed`, of these columns
        exact = precision(hidden.dtype)
        out = jnp.matmul(hidden, kernel.astype(hidden.dtype), precision=exact, preferred_element_type=jnp.float32)
        return out if bias is None else out + bias.astype(jnp.float32)

    batch = layout.text_batch(tokens, mask)
    texts = forward.read(params, config, batch)
    base = logits(jax.vmap(lambda hidden, at: hidden[at])(texts.hidden, positions))
    if not passes:
        B, M, A = base.shape
        return AnswerLogits(base, jnp.zeros((B, 0, M, A)), jnp.zeros((B, 0, M)))
    draw = thinking.sampler(params, config, batch, positions, key, passes, temperature)
    threads, _ = forward.rollout_and_talk(params, config, batch, texts, positions, passes, draw)
    paths = forward.thought_states(params, config, batch, texts, positions, threads)
    return AnswerLogits(base, logits(paths.mixed[:, :, :, 0]), paths.weight[..., 0])


def judge(found: AnswerLogits, right: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns per text [B]: `expected` and `exact` (means over the passes), the same `_base`, and the mean `weight`.

    Args:
      right: [B, M] index of the true token among the allowed ones. counts: [B, M] 1 where a token counts.
    """
    out = {}
    for suffix, logits in (("_base", np.asarray(found.base)[:, None]), ("", np.asarray(found.mixed))):
        B, P, M, _ = logits.shape
        if not P:
            continue
        x = logits.astype(np.float64)
        log_z = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
        goal = np.broadcast_to(right[:, None], (B, P, M))
        logp = np.take_along_axis(x, goal[..., None], axis=-1)[..., 0] - log_z
        out[f"expected{suffix}"] = np.exp((logp * counts[:, None]).sum(-1)).mean(-1)
        out[f"exact{suffix}"] = ((x.argmax(-1) == goal) | (counts[:, None] == 0)).all(-1).mean(-1)
    if found.weight.shape[1]:
        out["weight"] = (np.asarray(found.weight).mean(1) * counts).sum(-1) / counts.sum(-1)
    return out


# ------------------------------------------------------------------------------------------------- chain of thought


def zero_shot_cot(
    model: Model,
    task: Task,
    *,
    split: str = "test",
    limit: int = 0,
    samples: int = 8,
    thoughts: ThoughtConfig | bool = True,
    temperature: float = 0.9,
    max_new_tokens: int = 384,
    answer_tokens: int = 12,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns majority@k and pass@k (k = 1, 2, 4 ... up to `samples`) of zero-shot reasoning, thinking before every token.

    The model reasons after "Let's think step by step.", is then asked for the answer, and the first whole number of the next
    few tokens is taken (official code: `zero-shotcot-eval.py`; k = 8, on 128 questions). With thoughts, the numbers without
    come with it (`_base`).

    Args:
      thoughts: as in `expected_accuracy`. temperature: of the text, in both halves. answer_tokens: at most, of the answer.

    Raises:
      UserError: see `expected_accuracy`; a task without such prompts, or prompts with no room for `max_new_tokens`.
    """
    config = thinking_config(model, thoughts)
    problems = _problems(model, task, split, limit)
    asked = [task.step_by_step(p) for p in problems]
    require((None not in asked, f"task {task.name} has no step-by-step prompt; metric 'cot' needs one"))
    result: dict[str, Any] = {"problems": len(problems)}
    for suffix, t in (("_base", None), ("", config.thoughts)):
        if suffix or t is not None:
            drawn = dict(thoughts=t, temperature=temperature, seed=seed)
            found = _reasoned(model, asked, drawn, samples, max_new_tokens, answer_tokens)
            answers = [[task.parse_closing(text) for text in some] for some in found]
            right = [[task.correct(p, a) for a in some] for p, some in zip(problems, answers)]
            counted = votes([task.ballots(a) for a in answers], right, [""] * len(problems), samples)
            result |= {f"{k}{suffix}": v for k, v in counted.items()}
    return result


def _reasoned(
    model: Model,
    asked: Sequence[tuple[str, str]],
    drawn: dict[str, Any],
    samples: int,
    max_new_tokens: int,
    answer_tokens: int,
) -> list[list[str]]:
    """Returns what the model writes when it is asked for its answers: `samples` texts per problem."""
    prompts = [prompt for prompt, _ in asked]
    chains = generate(model, prompts, max_new_tokens=max_new_tokens, n=samples, stop=("Q:",), **drawn)
    closing = [
        prompt + chain.text + words for (prompt, words), some in zip(asked, chains) for chain in some
    ]  # the official code breaks where a second "Q:" appears
    texts = [c[0].text for c in generate(model, closing, max_new_tokens=answer_tokens, **drawn)]
    return [texts[begin : begin + samples] for begin in range(0, len(texts), samples)]
