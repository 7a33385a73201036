"""Quiet-STaR's accuracy on question answering, with thoughts and without (arXiv 2403.09629).

`expected_accuracy` is the official zero-shot metric. A question with its answer is one teacher-forced text; the score
is the product, over the answer's tokens, of their probabilities, renormalized over the tokens that are possible there
(digits or letters, and the end of the line): the probability that a sampled answer is correct. `exact` is exact match:
every token of the answer has the largest probability of those, as greedy decoding among them would generate.

`zero_shot_cot` lets the model reason aloud first ("Let's think step by step."), and votes over k answers.

Deviation from the official code: it takes an answer that does not begin with a digit (-3, $5) for a letter, so that
only the end of its line counts. Here its digits count.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from qstar import tree
from qstar.errors import UserError, require
from qstar.mesh import mesh_jit, put_global_batch, to_host
from qstar.models import decoder
from qstar.models.config import ModelConfig
from qstar.models.model import Model
from qstar.models.scoring import MIN_LENGTH
from qstar.models.thought_config import ThoughtConfig
from qstar.models.vocabulary import head_logits
from qstar.runs.evaluate import problems_of, votes
from qstar.runs.folder import stable_seed
from qstar.runs.rollouts import generate, tokenizer_of
from qstar.tasks.base import Problem, Task, ZeroShot
from qstar.text.tokenizer import Tokenizer
from qstar.thoughts import forward, layout
from qstar.thoughts import rollout as thinking
from qstar.train.stats import summarise
from qstar.types import Params


class Row(NamedTuple):
    """The tokens of one problem."""

    tokens: list[int]
    positions: list[int]  # that predict the answer's symbols
    correct: list[int]  # index of the next token among the allowed ids, per position


class AnswerLogits(NamedTuple):
    """Logits of the V allowed ids at the M positions that predict the answer's symbols."""

    base: jax.Array  # [B, M, V] float32, without thoughts
    mixed: jax.Array  # [B, P, M, V] with them; P = 0 without thoughts
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

    Each has its 95% bootstrap interval over problems.

    Args:
      limit: first so many problems; 0: all.
      thoughts: how to think, True for the model's own config, False for the base numbers alone.
      passes: thoughts per position; a problem's score is the mean over them.
      temperature: of the thoughts, 0 is greedy (the paper); None: as in training (the official code: 1).
      batch_size: texts per forward pass. seed: of the thoughts.

    Raises:
      UserError: a model without tokenizer, or that cannot think; a task that has no short answers; a tokenizer that
        does not write them symbol by symbol; a text that is longer than the model's context.
    """
    config = thinking_config(model, thoughts)
    tokenizer = tokenizer_of(model)
    problems = problems_of(task, split, limit)
    texts = [text for p in problems if (text := task.zero_shot(p)) is not None]
    fault = f"task {task.name} has no zero-shot text to score; metric 'expected' needs one"
    require((len(texts) == len(problems), fault))
    allowed = symbol_ids(tokenizer, texts[0].symbols)
    rows = [tokenize(model, p, text, allowed) for p, text in zip(problems, texts)]
    ids, key = jnp.asarray(list(allowed.values()), jnp.int32), tree.random_key(seed)
    if temperature is None:
        temperature = config.thoughts.temperature if config.thoughts else 0.0
    names = ("expected", "exact", "expected_base", "exact_base", "weight")
    scores = {name: np.zeros(len(rows)) for name in (names if config.thoughts else names[2:4])}
    # Rows of similar length are batched together: few shapes compile, and there is little padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
    for number, begin in enumerate(range(0, len(order), batch_size)):
        batch = order[begin : begin + batch_size]
        *inputs, correct, counts = answer_arrays([rows[i] for i in batch], batch_size)
        placed = put_global_batch(inputs, model.mesh)
        # The temperature is traced, not static: greedy and sampled thoughts share one compilation.
        draw = jax.random.fold_in(key, number), jnp.float32(temperature)
        found = answer_logits(model.params, config, *placed, ids, *draw, passes if config.thoughts else 0)
        for name, values in score_answers(to_host(found), correct, counts).items():
            scores[name][batch] = values[: len(batch)]
    groups = [p.group for p in problems] if len({p.group for p in problems}) > 1 else [""] * len(problems)
    result: dict[str, Any] = {"problems": len(problems)}
    for name, values in scores.items():
        result |= summarise(name, values.tolist(), groups)
    return result


def thinking_config(model: Model, thoughts: ThoughtConfig | bool) -> ModelConfig:
    """Returns the model's config with the thoughts to evaluate, or with none; UserError if the model cannot think."""
    config = model.config
    if not isinstance(config, ModelConfig):
        raise UserError("the metrics 'expected' and 'cot' are for decoders, not for an encoder-decoder (T5)")
    if not thoughts:
        return config.replace(thoughts=None)
    chosen = config.thoughts if thoughts is True else thoughts
    if chosen is None or not {"thoughts", "mixing"} <= model.params.keys():
        why = "it has no start and end vectors and no mixing head; evaluate without thoughts"
        raise UserError(f"this model cannot think: {why}")
    chosen.check_trained(config.thoughts)
    # One talk token, as in the official evaluation: each answer token is scored by the thought right before it.
    return config.replace(thoughts=chosen.replace(talk_tokens=1))


# ---------------------------------------------------------------------------------------------------------- tokens


def symbol_ids(tokenizer: Tokenizer, symbols: Sequence[str]) -> dict[str, int]:
    """Returns the token id of every symbol within an answer; UserError if one has no token of its own."""
    found: dict[str, int] = {}
    for symbol in symbols:
        # Encoded in context: at the start of a text a symbol may have another id. The end of the line begins no answer,
        # so it follows another symbol, and ends the text: two of them may be one token.
        answer = f" {symbol}\n" if symbol.strip() else f" {symbols[0]}{symbol}"
        _, tail = tokenizer.encode_pair("Q:\nA:", answer)
        ids = [i for i in tail if _symbol(tokenizer, i) == symbol]
        line = f"this tokenizer has no token of its own for {symbol!r} in an answer; the metric 'expected' compares answers"
        require((bool(ids), f"{line} symbol by symbol"))
        found[symbol] = ids[0]
    return found


def _symbol(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.show(token).strip(" ")


def tokenize(model: Model, problem: Problem, text: ZeroShot, allowed: dict[str, int]) -> Row:
    """Returns a problem's `Row`; UserError if it is too long, or if its answer is not written symbol by symbol."""
    tokenizer = tokenizer_of(model)
    head, tail = tokenizer.encode_pair(text.prompt, text.answer)
    length, room = len(head) + len(tail), model.config.max_positions
    if length > room:
        raise UserError(f"problem {problem.id}: its {length} tokens exceed the model's context of {room}")
    order = list(allowed.values())
    places = [(len(head) + k - 1, order.index(i)) for k, i in enumerate(tail) if i in order]
    # A token of two digits is no allowed id and would be left out of the product, which would then be too large.
    written = "".join(_symbol(tokenizer, order[correct]) for _, correct in places)
    if written != "".join(c for c in text.answer if c in allowed):
        line = f"problem {problem.id}: this tokenizer does not write the answer {text.answer.strip()!r}"
        raise UserError(f"{line} symbol by symbol; the metric 'expected' needs one that does")
    return Row([*head, *tail], *map(list, zip(*places)))


def answer_arrays(rows: Sequence[Row], size: int) -> tuple[np.ndarray, ...]:
    """Returns tokens and mask [B, N], positions, correct ids and counts [B, M], int32, of B = `size` rows."""
    # Lengths are rounded up and the last row fills the batch, so that few shapes compile.
    N = max(MIN_LENGTH, -(-max(len(row.tokens) for row in rows) // 32) * 32)
    M = -(-max(len(row.positions) for row in rows) // 4) * 4
    tokens, mask = np.zeros((2, size, N), np.int32)
    positions, correct, counts = np.zeros((3, size, M), np.int32)
    for r in range(size):
        row = rows[min(r, len(rows) - 1)]
        n, m = len(row.tokens), len(row.positions)
        tokens[r, :n], mask[r, :n] = row.tokens, 1
        # Padding repeats a position that thinks anyway; its count is 0.
        positions[r] = row.positions[-1]
        positions[r, :m], correct[r, :m], counts[r, :m] = row.positions, row.correct, 1
    return tokens, mask, positions, correct, counts


# ----------------------------------------------------------------------------------------------------------- scores


@partial(mesh_jit, static_argnames=("config", "passes"))
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
      tokens, mask: [B, N]. positions: [B, M]. allowed: [V] token ids. passes: thoughts per position; 0: none.
    """
    head = decoder.head(params, config)
    # Only the allowed columns: full logits [B, N, V] would be the largest array by far.
    head = head._replace(kernel=head.kernel[:, allowed], bias=None if head.bias is None else head.bias[allowed])

    def logits(hidden: jax.Array) -> jax.Array:  # [..., D] -> [..., V], as `decoder.unembed` of these columns
        return head_logits(hidden, *head)

    batch = layout.text_batch(tokens, mask)
    texts = forward.read(params, config, batch)
    base = logits(layout.take_rows(texts.hidden, positions))
    if not passes:
        B, M, V = base.shape
        return AnswerLogits(base, jnp.zeros((B, 0, M, V)), jnp.zeros((B, 0, M)))
    draw = thinking.sampler(params, config, batch, positions, key, passes, temperature)
    threads, _ = forward.rollout_and_talk(params, config, batch, texts, positions, passes, draw)
    states = forward.thought_states(params, config, batch, texts, positions, threads)
    return AnswerLogits(base, logits(states.mixed[:, :, :, 0]), states.weight[..., 0])


def score_answers(found: AnswerLogits, correct: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Returns per text [B]: `expected` and `exact` (means over the passes), the same `_base`, and the mean `weight`.

    Args:
      correct: [B, M] index of the true token among the allowed ones. counts: [B, M] 1 where a token counts.
    """
    out = {}
    for suffix, logits in (("_base", rearrange(found.base, "b m v -> b 1 m v")), ("", found.mixed)):
        P = logits.shape[1]
        if not P:
            continue
        # float64: the products over the tokens of long answers lose digits in float32.
        x = np.asarray(logits, np.float64)
        log_z = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
        target, used = repeat(correct, "b m -> b p m", p=P), rearrange(counts, "b m -> b 1 m")
        logp = np.take_along_axis(x, rearrange(target, "b p m -> b p m 1"), axis=-1)[..., 0] - log_z
        # The product comes before the mean: one pass draws the thoughts of the whole answer.
        out[f"expected{suffix}"] = np.exp((logp * used).sum(-1)).mean(-1)
        out[f"exact{suffix}"] = ((x.argmax(-1) == target) | (used == 0)).all(-1).mean(-1)
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
    """Returns majority@k and pass@k (k = 1, 2, 4 ... up to `samples`) of zero-shot chains of thought.

    The model reasons after "Let's think step by step.", is then asked for the answer, and the first whole number of the
    next few tokens is taken (official code: `zero-shotcot-eval.py`; k = 8, on 128 questions). With thoughts, the
    numbers without them are returned, too (`_base`).

    Args:
      thoughts: as in `expected_accuracy`. temperature: of the text, in both halves. answer_tokens: limit of the answer.

    Raises:
      UserError: see `expected_accuracy`; a task without such prompts, or prompts with no room for `max_new_tokens`.
    """
    config = thinking_config(model, thoughts)
    tokenizer_of(model)  # raises
    problems = problems_of(task, split, limit)
    asked = [words for p in problems if (words := task.step_by_step(p)) is not None]
    require((len(asked) == len(problems), f"task {task.name} has no step-by-step prompt; metric 'cot' needs one"))
    prompts = [prompt for prompt, _ in asked]
    result: dict[str, Any] = {"problems": len(problems)}
    for suffix, t in (("_base", None), ("", config.thoughts)):
        if not suffix and t is None:
            continue
        options: dict[str, Any] = {"thoughts": t, "temperature": temperature, "seed": seed}
        # The official code stops where the model begins another question.
        chains = generate(model, prompts, max_new_tokens=max_new_tokens, n=samples, stop=("Q:",), **options)
        closing = [prompt + (chain.text or "") + words for (prompt, words), row in zip(asked, chains) for chain in row]
        # Another seed: closing i would be drawn with the random numbers of question i's first chain.
        options["seed"] = stable_seed(seed, "closing")
        texts = [c[0].text or "" for c in generate(model, closing, max_new_tokens=answer_tokens, **options)]
        answers = [[task.parse_closing(x) for x in texts[i : i + samples]] for i in range(0, len(texts), samples)]
        correct = [[task.correct(p, a) for a in row] for p, row in zip(problems, answers)]
        counted = votes([task.ballots(a) for a in answers], correct, [""] * len(problems), samples)
        result |= {f"{k}{suffix}": v for k, v in counted.items()}
    return result
