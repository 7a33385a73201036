"""The host half of sampling: length buckets, the queue that fills the slots, stop strings, and `generate`."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from qstar import distributed, tree
from qstar.errors import require
from qstar.mesh import SAMPLING, Rules, put_global_batch, to_host
from qstar.models import scoring
from qstar.models.encdec import EncDecConfig
from qstar.models.int8 import quantise
from qstar.models.model import Model
from qstar.sample import sampler as S
from qstar.sample import seq2seq
from qstar.sample.logits import SamplingParams
from qstar.sample.prompts import SamplingOptions, encode_prompts, listed
from qstar.types import Completion, Params

MAX_SLOTS = 256
STOP_STRIDE = 16  # decode steps between two searches for stop strings, which need the host
FILL_SHARE = 4  # a refill fills a quarter of the slots: one compiled shape for the first fill and for all later ones
MOST_PADDING = 4  # a prompt is padded to this many times its own padded length at most, to fill the slots with others
# Once no request waits and at most a quarter of the slots is active, decoding goes on with those slots alone, down to
# this many: the last rows of a batch may take as many steps as all others, and a step costs what its slots cost.
LEAST_SLOTS = 16

Result = tuple[int, int, Completion]  # prompt index, sample index


@dataclasses.dataclass(frozen=True)
class Request:
    """One completion to sample: the prompt's index and tokens, and which of its n samples it is."""

    prompt: int
    sample: int
    tokens: tuple[int, ...]


def generate(
    model: Model, prompts: Sequence[str] | Sequence[Sequence[int]], *, n: int = 1, **options: Any
) -> list[list[Completion]]:
    """Samples n completions of every prompt.

    Args:
      model: from `qstar.load`. options: see `SamplingOptions`.
      prompts: texts (a BOS token is put in front where the model has one), lists of chat messages (see `text.chat`), or
        lists of token ids taken as they are.

    Raises:
      UserError: text for a model without tokenizer, an empty prompt, or a prompt that leaves no room in the context.
    """
    prompts, count = listed(prompts), SamplingOptions(n=n, **options).n
    out: list[list[Any]] = [[None] * count for _ in prompts]
    for prompt, sample, completion in stream(model, prompts, n=n, **options):
        out[prompt][sample] = completion
    return out


def stream(model: Model, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Any) -> Iterator[Result]:
    """Like `generate`, but yields (prompt index, sample index, completion) as completions finish."""
    o = SamplingOptions(**options)
    decoder = not isinstance(model.config, EncDecConfig)
    int8_decoder = "weights='int8' is for decoders, and this model is an encoder-decoder; leave it out"
    require((decoder or not o.weights, int8_decoder))
    context, rows = encode_prompts(model, prompts, o)
    stop_ids, texts = split_stops(model, o.stop)
    o = dataclasses.replace(o, stop=texts)
    sampling_params, key = o.sampling_params(), tree.random_key(o.seed)
    buckets = _buckets([len(r) for r in rows], o.n)
    if not decoder:
        params = seq2seq.prepare(model.params, model.config)
        for length, members in buckets:
            slots = o.slots or default_slots(len(rows) * o.n)
            sampler = _sampler(model, stop_ids, slots, length, o.max_new_tokens)
            yield from _respond(model, params, sampler, rows, members, o, key, sampling_params)
        return
    if o.weights:
        model = model.replace(params=quantise(model.params))
    distributed.return_freed_memory()
    params = S.prepare(model.params, model.config)
    prefix = _prefill_prefix(model, params, context)
    for length, members in buckets:
        requests = [Request(i, j, tuple(rows[i])) for i in members for j in range(o.n)]
        # At most as many as there are requests: a few long prompts would take a cache for all slots.
        slots = default_slots(len(requests))
        slots = min(o.slots, max(LEAST_SLOTS, slots)) if o.slots else slots
        sampler = _sampler(model, stop_ids, slots, length, o.max_new_tokens)
        yield from _Queue(model, params, sampler, prefix, tuple(context), requests, o).run(key, sampling_params)


def split_stops(model: Model, stop: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Returns the ids that end a completion, and the stop strings to search for in its text.

    A stop string that is a special token is an id: decoded text does not hold it.
    """
    special = {text: model.tokenizer.special_id(text) if model.tokenizer else None for text in stop}
    ids = [i for i in special.values() if i is not None and i not in model.stop_ids]
    return (*model.stop_ids, *ids), tuple(text for text in stop if special[text] is None)


def _sampler(model: Model, stop_ids: tuple[int, ...], slots: int, length: int, max_new: int) -> S.Sampler:
    limit = scoring.text_limit(model.config, model.tokenizer)
    return S.Sampler(model.config, stop_ids, slots, prompt_length=length, max_new=max_new, vocab_limit=limit)


class _Queue:
    """Requests of one length bucket to a decoder, and the slots that process them."""

    def __init__(self, model, params, sampler, prefix, context, requests, options):
        self.model, self.params, self.sampler, self.prefix, self.stop = model, params, sampler, prefix, options.stop
        self.context = context  # the ids of `prefix`
        self.waiting = collections.deque(requests)
        self.group = min(options.n, max(1, sampler.slots // FILL_SHARE))  # samples of one prompt that share a prefill
        self.prompts_per_fill = max(1, sampler.slots // FILL_SHARE // self.group)
        self.occupant: list[Request | None] = [None] * sampler.slots

    def run(self, key: jax.Array, sampling_params: SamplingParams) -> Iterator[Result]:
        state = _empty_state(self.sampler, self.model.mesh)
        per_fill = self.prompts_per_fill * self.group
        while self.waiting or any(self.occupant):
            free = [i for i, r in enumerate(self.occupant) if r is None]
            # A prefill has a fixed shape: it waits until a whole one fits, or until no slot is left to decode.
            while self.waiting and (len(free) >= per_fill or len(free) == len(self.occupant)):
                fill = self._next_fill(free)
                state = S.insert_requests(self.params, self.sampler, self.prefix, state, fill, key, sampling_params)
            if not self.waiting:
                state = self._drop_free_slots(state)
            # Decoding stops early once a whole refill fits, or once the active rows fit into fewer slots.
            least = np.int32(max(0, len(self.occupant) - per_fill) if self.waiting else self._fewer_slots())
            # Without stop strings the host has nothing to check before rows end.
            steps = np.int32(STOP_STRIDE if self.stop else self.sampler.max_new)
            # A row that a stop string has ended is still active on the device.
            cancel = np.asarray([r is None for r in self.occupant])
            state = S.decode(self.params, self.sampler, self.prefix, state, sampling_params, cancel, least, steps)
            yield from self._harvest(state)

    def _fewer_slots(self) -> int:
        """Returns the number of slots to go on with when few rows are active; 0 if that would gain nothing."""
        fewer = self.sampler.slots // FILL_SHARE
        mesh = self.model.mesh
        return fewer if fewer >= LEAST_SLOTS and (mesh is None or fewer % mesh.size == 0) else 0

    def _drop_free_slots(self, state: S.SampleState) -> S.SampleState:
        active = [i for i, r in enumerate(self.occupant) if r is not None]
        while len(active) <= (fewer := self._fewer_slots()):
            free = [i for i, r in enumerate(self.occupant) if r is None]
            rows = (active + free)[:fewer]
            state = S.keep_rows(state, np.asarray(rows, np.int32))
            self.occupant = [self.occupant[i] for i in rows]
            self.sampler = dataclasses.replace(self.sampler, slots=fewer)
            active = list(range(len(active)))
        return state

    def _next_fill(self, free: list[int]) -> S.PrefillBatch:
        """Takes requests from the queue, and their slots from `free`."""
        # Samples of one prompt are adjacent in the queue, and share one row of the prefill.
        N, M = self.prompts_per_fill, self.prompts_per_fill * self.group
        fill = S.PrefillBatch(
            tokens=np.zeros((N, self.sampler.prompt_length), np.int32),
            lengths=np.ones(N, np.int32),
            slot=np.full(M, self.sampler.slots, np.int32),  # out of range: dropped
            source=np.zeros(M, np.int32),
            request=np.zeros((M, 2), np.int32),
        )
        row = 0
        for p in range(N):
            if not self.waiting:
                break
            head = self.waiting[0]
            fill.tokens[p, : len(head.tokens)], fill.lengths[p] = head.tokens, len(head.tokens)
            for _ in range(self.group):
                if not self.waiting or self.waiting[0].prompt != head.prompt or not free:
                    break
                r = self.waiting.popleft()
                fill.slot[row], fill.source[row], fill.request[row] = free.pop(0), p, (r.prompt, r.sample)
                self.occupant[fill.slot[row]] = r
                row += 1
        return fill

    def _harvest(self, state: S.SampleState) -> Iterator[Result]:
        names = ("tokens", "logprobs", "sample_logprobs", "count", "stopped", "active")
        host = to_host({name: getattr(state, name) for name in names})
        for i, request in enumerate(self.occupant):
            active = bool(host["active"][i])
            if request is None or active and not self.stop:
                continue
            found = completion(self.model, {k: v[i] for k, v in host.items()}, self.stop, self.context + request.tokens)
            if active and not found.stopped:
                continue
            self.occupant[i] = None
            yield request.prompt, request.sample, found


def _respond(model, params, sampler, rows, members, options, key, sampling_params) -> Iterator[Result]:
    # Every call has the same shape: rows without a prompt have length 0, and are never active.
    calls = -(-options.n // sampler.slots)  # per prompt, whose samples may be more than the slots
    n = -(-options.n // calls)
    group = sampler.slots // n
    sampler = dataclasses.replace(sampler, slots=group * n)
    for at, first in itertools.product(range(0, len(members), group), range(0, options.n, n)):
        chosen = members[at : at + group]
        tokens, lengths = np.zeros((group, sampler.prompt_length), np.int32), np.zeros(group, np.int32)
        requests = np.zeros((group, n, 2), np.int32)
        requests[..., 1] = np.arange(first, first + n)
        for r, i in enumerate(chosen):
            tokens[r, : len(rows[i])], lengths[r], requests[r, :, 0] = rows[i], len(rows[i]), i
        arrays = put_global_batch((tokens, lengths, requests), model.mesh)
        host = to_host(seq2seq.sample_rows(params, sampler, *arrays, key, sampling_params))
        for r, i in enumerate(chosen):
            for j in range(min(n, options.n - first)):
                yield i, first + j, completion(model, {k: v[r, j] for k, v in host.items()}, options.stop)


def completion(model: Model, row: dict[str, Any], stop: Sequence[str], prompt: Sequence[int] = ()) -> Completion:
    """Returns a sampled row (tokens, logprobs, sample_logprobs, count, stopped) up to its end or first stop string."""
    count, ended, text = int(row["count"]), bool(row["stopped"]), None
    # A draw from NaN is an arbitrary token.
    nan = "the model's logits are NaN (does float16 overflow?); use --dtype=float32 or bfloat16, or other weights"
    require((not np.isnan(row["logprobs"][:count]).any(), nan))
    ids = row["tokens"][:count].tolist()
    # A special token that is a stop string is cut off, as all stop strings.
    cut = ended and ids[-1] not in model.stop_ids
    ids = ids[: count - cut]
    if model.tokenizer is not None:
        text, count, ended = model.tokenizer.finish(ids, stop, after=prompt, stopped=ended and not cut)
    logprobs, sample_logprobs = (row[k][:count].tolist() for k in ("logprobs", "sample_logprobs"))
    return Completion(text, ids[:count], logprobs, sample_logprobs, ended or cut)


def _prefill_prefix(model: Model, params: Params, prefix_ids: list[int]) -> S.Prefix:
    # Padded, so that prefixes of similar length share one compilation.
    padded = np.zeros(padded_length(len(prefix_ids)) if prefix_ids else 0, np.int32)
    padded[: len(prefix_ids)] = prefix_ids
    return S.prefill_prefix(params, model.config, jnp.asarray(padded), jnp.int32(len(prefix_ids)))


def default_slots(requests: int) -> int:
    """Returns the number of rows to decode side by side: the next power of two, up to 256."""
    return min(MAX_SLOTS, scoring.power_of_two(requests))


def padded_length(n: int) -> int:
    """Padded length: the next of 8, 12, 16, 24, 32, 48, 64, 96, ... (at most a third of it padding, from 8 up)."""
    size = max(8, scoring.power_of_two(n))
    return size * 3 // 4 if size >= 16 and n <= size * 3 // 4 else size


def _buckets(lengths: Sequence[int], n: int) -> list[tuple[int, list[int]]]:
    # A group too small to fill the slots joins the next longer one: more padding, but no steps with empty slots.
    groups: dict[int, list[int]] = collections.defaultdict(list)
    for i, length in enumerate(lengths):
        groups[padded_length(length)].append(i)
    out: list[tuple[int, list[int]]] = []
    carried: list[int] = []
    sizes = sorted(groups)
    for size, longer in zip(sizes, [*sizes[1:], math.inf]):
        members = sorted(carried + groups[size])
        shortest = padded_length(min(lengths[i] for i in members))
        # Prompts are prefilled at the length of their group: among long ones, short ones would cost many times their own.
        if len(members) * n < MAX_SLOTS and longer <= MOST_PADDING * shortest:
            carried = members
            continue
        out.append((size, members))
        carried = []
    return out


def _empty_state(sampler: S.Sampler, mesh: Mesh | None) -> S.SampleState:
    if mesh is None:
        return S.empty_state(sampler)
    where = state_shardings(jax.eval_shape(lambda: S.empty_state(sampler)), mesh)
    # Under jit, in its sharding: made outside, the whole cache would first be on one device.
    return jax.jit(S.empty_state, static_argnums=0, out_shardings=where)(sampler)


def state_shardings(state: S.SampleState, mesh: Mesh) -> S.SampleState:
    """Returns the shardings of a state: caches [B, G, R, K] by rows and heads, the rest by rows over the data axis."""

    def place(x: Any, axes: tuple[str | None, ...], rules: Rules) -> NamedSharding:
        return NamedSharding(mesh, rules.spec(axes[: x.ndim], x.shape, mesh))

    heads = jax.tree.leaves(state.ring)[0].shape[1]
    over = math.prod(mesh.shape[a] for a in SAMPLING.heads)
    # By heads, as the parameters are for sampling: attention then needs no exchange. By rows where they do not divide.
    rules = SAMPLING if heads % over == 0 else Rules(heads=())
    cached = jax.tree.map(lambda x: place(x, ("batch", "heads", None, None), rules), (state.prompt, state.ring))
    rows = jax.tree.map(lambda x: place(x, ("batch", None), SAMPLING), state)
    return rows.replace(prompt=cached[0], ring=cached[1])
