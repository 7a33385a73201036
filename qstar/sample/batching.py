"""The host half of sampling: length buckets, the queue that keeps the slots full, stop strings, and `generate`."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qstar import tree
from qstar.errors import UserError, require
from qstar.mesh import SAMPLING, Rules, to_host
from qstar.models.encdec import EncDecConfig
from qstar.models.int8 import KINDS, quantise_jit
from qstar.models.model import Model
from qstar.sample import sampler as S
from qstar.sample import seq2seq
from qstar.sample.logits import SamplingParams
from qstar.types import Completion

MAX_SLOTS = 256
STOP_STRIDE = 16  # decode steps between two looks for stop strings
FILL_SHARE = 4  # a refill seats a quarter of the slots: one compiled shape for the first fill and for all later ones


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to sample: which prompt, which of its n samples, and the prompt's tokens."""

    prompt: int
    sample: int
    tokens: tuple[int, ...]


def generate(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    n: int = 1,
    stop: Sequence[str] = (),
    seed: int = 0,
    prefix: str | Sequence[int] = "",
    slots: int | None = None,
    weights: str = "",
) -> list[list[Completion]]:
    """Samples n completions of every prompt.

    Args:
      model: from `qstar.load`.
      prompts: texts (a BOS token is put in front where the model has one), or lists of token ids taken as they are.
      max_new_tokens: most tokens of a completion. temperature: 0 is greedy.
      top_k, top_p: filters, applied in this order; 0 and 1 switch them off. None of these recompiles.
      stop: strings that end a completion (they are cut off it); the EOS token always does.
      prefix: text or ids in front of every prompt, run once and shared (few-shot examples).
      seed: draws depend on (seed, prompt index, sample index) alone, not on batching.
      slots: rows decoded side by side; default: as many as there are requests, up to 256.
      weights: "int8" samples with the blocks' weights in 8 bits (`models.int8`), a decoder's; "" as they are.

    Returns:
      Per prompt, a list of n `Completion(text, tokens, logprobs, sample_logprobs, stopped)`.

    Raises:
      UserError: text for a model without tokenizer, an empty prompt, or a prompt that leaves no room in the context.
    """
    out: list[list[Completion | None]] = [[None] * n for _ in prompts]
    for prompt, sample, completion in stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        n=n,
        stop=stop,
        seed=seed,
        prefix=prefix,
        slots=slots,
        weights=weights,
    ):
        out[prompt][sample] = completion
    return out  # type: ignore[return-value]


def stream(
    model: Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    n: int = 1,
    stop: Sequence[str] = (),
    seed: int = 0,
    prefix: str | Sequence[int] = "",
    slots: int | None = None,
    weights: str = "",
) -> Iterator[tuple[int, int, Completion]]:
    """Like `generate`, but yields (prompt index, sample index, completion) as completions finish."""
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    _check_knobs(max_new_tokens, temperature, top_k, top_p, n, stop)
    decoder = not isinstance(model.config, EncDecConfig)
    require(
        (weights in KINDS, f"weights={weights!r} is not one of '', int8"),
        (decoder or not weights, "weights='int8' is for decoders, and this model is an encoder-decoder; leave it out"),
    )
    if not decoder:
        yield from _read_and_write(
            model, prompts, prefix, max_new_tokens, temperature, top_k, top_p, n, stop, seed, slots
        )
        return
    prefix_ids, rows = _encode(model, prompts, prefix)
    _check_lengths(model, prefix_ids, rows, max_new_tokens)
    if stop and model.tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this model has none; pass tokens and rely on the EOS id")
    if weights:
        model = model.replace(params=quantise_jit(model.params))
    params = S.prepare(model.params, model.config)
    shared = _prefill_prefix(model, params, prefix_ids)
    sampling_params = SamplingParams.make(temperature, top_k, top_p)
    for length, members in _buckets([len(r) for r in rows], n):
        requests = [Request(i, j, tuple(rows[i])) for i in members for j in range(n)]
        queue = _Queue(model, params, shared, prefix_ids, requests, n, length, max_new_tokens, slots, seed, stop)
        yield from queue.run(sampling_params)


def _read_and_write(model, prompts, prefix, max_new_tokens, temperature, top_k, top_p, n, stop, seed, slots):
    """`stream` of an encoder-decoder: its prompts (with the prefix in front) go into the encoder."""
    rows = seq2seq.encode_prompts(model, prompts, prefix)
    if stop and model.tokenizer is None:
        raise UserError("stop strings need a tokenizer, and this model has none; pass tokens and rely on the EOS id")
    yield from seq2seq.stream(
        model,
        rows,
        _buckets([len(r) for r in rows], n),
        max_new_tokens=max_new_tokens,
        sampling_params=SamplingParams.make(temperature, top_k, top_p),
        n=n,
        stop=stop,
        seed=seed,
        slots=slots or default_slots(len(rows) * n),
    )


class _Queue:
    """Requests of one length bucket, and the slots that work them off."""

    def __init__(self, model, params, prefix, context, requests, n, length, max_new, slots, seed, stop):
        self.model, self.params, self.prefix, self.stop = model, params, prefix, stop
        self.context = tuple(context)  # the ids of `prefix`
        self.waiting = collections.deque(requests)
        slots = slots or default_slots(len(requests))
        self.group = min(n, max(1, slots // FILL_SHARE))  # samples of one prompt that share a prefill
        self.prompts_per_fill = max(1, slots // FILL_SHARE // self.group)
        tokenizer, config = model.tokenizer, model.config
        self.sampler = S.Sampler(
            config=config,
            stop_ids=model.stop_ids,
            slots=slots,
            prompt_length=length,
            max_new=max_new,
            vocab_limit=min(tokenizer.vocab_size, config.vocab_size) if tokenizer else config.vocab_size,
        )
        self.seed = tree.random_key(seed)
        self.max_new = max_new
        self.occupant: list[Request | None] = [None] * slots

    def run(self, sampling_params: SamplingParams) -> Iterator[tuple[int, int, Completion]]:
        state = _placed(self.model, lambda: S.empty_state(self.sampler))
        cancel = np.zeros(self.sampler.slots, bool)
        per_fill = self.prompts_per_fill * self.group
        while self.waiting or any(self.occupant):
            free = [i for i, r in enumerate(self.occupant) if r is None]
            while self.waiting and (len(free) >= per_fill or len(free) == len(self.occupant)):
                fill, free = self._next_fill(free)
                cancel[fill.slot[fill.slot < len(cancel)]] = False  # that was the row before
                state = S.insert_requests(
                    self.params, self.sampler, self.prefix, state, fill, self.seed, sampling_params
                )
            min_active_rows = max(0, len(self.occupant) - per_fill) if self.waiting else 0
            steps = STOP_STRIDE if self.stop else self.max_new
            state = S.decode(
                self.params,
                self.sampler,
                self.prefix,
                state,
                sampling_params,
                cancel,
                np.int32(min_active_rows),
                np.int32(steps),
            )
            cancel = np.zeros(self.sampler.slots, bool)
            yield from self._harvest(state, cancel)

    def _next_fill(self, free: list[int]) -> tuple[S.PrefillBatch, list[int]]:
        """Takes the next prompts off the queue for the free slots (whole groups of samples of one prompt)."""
        N, M = self.prompts_per_fill, self.prompts_per_fill * self.group
        tokens, lengths = np.zeros((N, self.sampler.prompt_length), np.int32), np.ones(N, np.int32)
        slot, source, request = (
            np.full(M, self.sampler.slots, np.int32),
            np.zeros(M, np.int32),
            np.zeros((M, 2), np.int32),
        )
        row = 0
        for p in range(N):
            if not self.waiting:
                break
            head = self.waiting[0]
            tokens[p, : len(head.tokens)], lengths[p] = head.tokens, len(head.tokens)
            for _ in range(self.group):
                if not self.waiting or self.waiting[0].prompt != head.prompt or not free:
                    break
                r = self.waiting.popleft()
                slot[row], source[row] = free.pop(0), p
                request[row] = r.prompt, r.sample
                self.occupant[slot[row]] = r
                row += 1
        limit = np.full(M, self.max_new, np.int32)
        return S.PrefillBatch(tokens, lengths, slot, source, limit, request), free

    def _harvest(self, state: S.SampleState, cancel: np.ndarray) -> Iterator[tuple[int, int, Completion]]:
        """Yields the rows that are done and frees their slots; marks rows that a stop string ends in `cancel`."""
        active, stopped, count, tokens, logprobs, sample_logprobs = to_host(
            (state.active, state.stopped, state.count, state.tokens, state.logprobs, state.sample_logprobs)
        )
        for i, request in enumerate(self.occupant):
            if request is None:
                continue
            ids, ended = tokens[i, : int(count[i])].tolist(), bool(stopped[i])
            if active[i] and not self.stop:
                continue
            text, length = None, len(ids)
            if (tokenizer := self.model.tokenizer) is not None:
                prompt = self.context + request.tokens
                text, length, ended = tokenizer.finish(ids, self.stop, after=prompt, stopped=ended)
            if active[i] and not ended:
                continue
            cancel[i] = bool(active[i])
            self.occupant[i] = None
            yield (
                request.prompt,
                request.sample,
                Completion(
                    text, ids[:length], logprobs[i, :length].tolist(), sample_logprobs[i, :length].tolist(), ended
                ),
            )


# --------------------------------------------------------------------------------------------------------- details


def _check_knobs(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, n: int, stop: tuple[str, ...]
) -> None:
    require(
        (max_new_tokens >= 1, f"max_new_tokens={max_new_tokens} must be at least 1"),
        (temperature >= 0, f"temperature={temperature} must be 0 (greedy) or more"),
        (top_k >= 0, f"top_k={top_k} must be 0 (off) or more"),
        (0 < top_p <= 1, f"top_p={top_p} must be in (0, 1]"),
        (n >= 1, f"n={n} must be at least 1"),
        ("" not in stop, f"stop={stop} holds an empty string, which every text contains; leave it out"),
    )


def _encode(model: Model, prompts: Sequence, prefix: str | Sequence[int]) -> tuple[list[int], list[list[int]]]:
    """Returns the ids that all rows begin with (if there is a prefix), and what follows them in each row.

    Text is encoded with its prefix in front, since tokens may straddle the seam; what the rows then really share is
    the prefix. Without one nothing is shared: prompts of one task begin alike by chance.
    """
    tokenizer = model.tokenizer
    if isinstance(prompts, str):
        raise UserError("prompts is a list of texts, or of lists of token ids: put the text in [ ]")
    if tokenizer is None and (isinstance(prefix, str) and prefix or any(isinstance(p, str) for p in prompts)):
        raise UserError(
            "this model has no tokenizer (no tokenizer files in its folder): pass lists of token ids, not text"
        )
    texts = [prefix + p for p in prompts if isinstance(p, str)] if isinstance(prefix, str) else []
    if texts and len(texts) == len(prompts):
        rows = tokenizer.encode_batch(texts, bos=True)
    else:
        head = tokenizer.encode(prefix, bos=True) if isinstance(prefix, str) and prefix else list(prefix)
        rows = [head + (tokenizer.encode(p, bos=not head) if isinstance(p, str) else list(p)) for p in prompts]
    for i, row in enumerate(rows):
        if not row:
            raise UserError(
                f"prompt {i} is empty: give it at least one token (the model has no BOS token to start from)"
            )
    shared = _common_length(rows) if len(prefix) else 0
    return rows[0][:shared] if rows else [], [row[shared:] for row in rows]


def _common_length(rows: list[list[int]]) -> int:
    """How many leading ids all rows share, leaving each at least one of its own."""
    if not rows:
        return 0
    low, high = min(rows), max(rows)  # the two that differ earliest, in lexicographic order
    most = min(len(row) for row in rows) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def _check_lengths(model: Model, prefix: list[int], rows: list[list[int]], max_new_tokens: int) -> None:
    room = model.config.max_positions
    for i, row in enumerate(rows):
        need = len(prefix) + len(row) + max_new_tokens
        if need > room:
            raise UserError(
                f"prompt {i}: {len(prefix) + len(row)} prompt tokens + max_new_tokens={max_new_tokens} = {need} exceed the "
                f"model's context of {room} tokens; shorten the prompt or lower max_new_tokens"
            )
        bad = next((t for t in (row if i else [*prefix, *row]) if not 0 <= t < model.config.vocab_size), None)
        if bad is not None:
            raise UserError(
                f"prompt {i}: token id {bad} is outside the model's vocabulary of {model.config.vocab_size}"
            )


def _prefill_prefix(model: Model, params, prefix_ids: list[int]) -> S.Prefix:
    padded = np.zeros(padded_length(len(prefix_ids)) if prefix_ids else 0, np.int32)
    padded[: len(prefix_ids)] = prefix_ids
    return S.prefill_prefix(params, model.config, jnp.asarray(padded), jnp.int32(len(prefix_ids)))


def default_slots(requests: int) -> int:
    """Returns how many rows to decode side by side: the next power of two, up to 256."""
    return min(MAX_SLOTS, _power_of_two(requests))


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def padded_length(n: int) -> int:
    """Padded length: the next of 8, 12, 16, 24, 32, 48, 64, 96, ... (at most a third of it padding, from 8 up)."""
    size = max(8, _power_of_two(n))
    return size * 3 // 4 if size >= 16 and n <= size * 3 // 4 else size


def _buckets(lengths: Sequence[int], n: int) -> list[tuple[int, list[int]]]:
    """Groups prompt indices by padded length, shortest first; a group too small to fill the slots joins the next."""
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for i, length in enumerate(lengths):
        groups[padded_length(length)].append(i)
    out: list[tuple[int, list[int]]] = []
    carried: list[int] = []
    sizes = sorted(groups)
    for size in sizes:
        members = sorted(carried + groups[size])
        if size != sizes[-1] and len(members) * n < MAX_SLOTS:
            carried = members
            continue
        out.append((size, members))
        carried = []
    return out


def _placed(model: Model, make: Callable[[], S.SampleState]) -> S.SampleState:
    """Makes a state and splits its slots over the mesh's batch axes, if there is a mesh."""
    state = make()
    if model.mesh is None:
        return state
    where = state_shardings(state, model.mesh)
    if jax.process_count() == 1:
        return jax.device_put(state, where)
    return jax.jit(make, out_shardings=where)()  # no process could put what belongs to the others' devices


def state_shardings(state: S.SampleState, mesh: Mesh) -> S.SampleState:
    """Returns where the slots of a state lie: caches [B, G, R, K] split by their heads, as the parameters are for sampling
    (by rows, where the heads do not divide), the rest by rows over the data axis."""

    def place(x: Any, axes: tuple[str | None, ...], rules: Rules) -> NamedSharding:
        return NamedSharding(mesh, rules.spec(axes[: x.ndim], x.shape, mesh))

    heads = jax.tree.leaves(state.ring)[0].shape[1]
    over = math.prod(mesh.shape[a] for a in SAMPLING.heads)
    rules = SAMPLING if heads % over == 0 else Rules(heads=())
    cached = jax.tree.map(lambda x: place(x, ("batch", "heads", None, None), rules), (state.prompt, state.ring))
    rows = jax.tree.map(lambda x: place(x, ("batch", None), SAMPLING), state)
    return rows.replace(prompt=cached[0], ring=cached[1])
