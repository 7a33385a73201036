"""Benchmark of an RL update beside a plain PyTorch loop (`generate`, the same loss, AdamW), with the time of its parts.

Both sides sample as many responses of the same length, score them with the same function, and make one update: GRPO or
RLOO with the divergence from a reference. With an answerer, a frozen model reads every response and writes 8 tokens.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from qstar.bench.common import in_turn, matmul_rate, paired_ratio, random_model, show, torch_twin
from qstar.bench.generate import torch_generate
from qstar.methods import reinforce
from qstar.models.config import preset
from qstar.models.encdec import EncDecConfig
from qstar.models.scoring import AnyConfig
from qstar.sample.batching import generate
from qstar.train.rl import RLSettings, measure_jit
from qstar.train.state import create_state

PARTS = ("rollout", "answerer", "scoring", "update")
LR, CLIP, EPS, BETA, ANSWER = 1e-5, 1.0, 0.2, 0.05, 8
CASES = (
    ("RLOO, T5, a frozen 20M Llama answers", dict(policy="t5", estimator="rloo", answerer="llama")),
    ("GRPO, 20M Llama, checked answers", dict(policy="llama", estimator="grpo", answerer="")),
    ("RLOO, 20M Llama, checked answers", dict(policy="llama", estimator="rloo", answerer="")),
)


class Load(NamedTuple):
    """Size of an update."""

    prompts: int = 8
    group: int = 4
    prompt: int = 32  # tokens
    new: int = 32
    vocab: int = 512


class World(NamedTuple):
    """Random prompts, and the share of even tokens as the reward; `answerer` reads prompt and response."""

    load: Load
    answerer: Callable[[Sequence[list[int]]], Any] | None = None

    def prompts(self, update: int) -> list[list[int]]:
        """Returns the prompts of an update, the same on both sides."""
        shape = (self.load.prompts, self.load.prompt)
        return np.random.default_rng(update).integers(2, self.load.vocab, shape).tolist()

    def score(self, update: int, responses: Sequence[Sequence[Any]]) -> reinforce.RewardOutput:
        """See `reinforce.Environment`."""
        rows = [c.tokens for row in responses for c in row]
        if self.answerer is not None:
            prompts = [p for p in self.prompts(update) for _ in range(self.load.group)]
            self.answerer([p + r for p, r in zip(prompts, rows)])
        return reinforce.RewardOutput(worth(rows), {})


def worth(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns float32 [N]: the share of even tokens."""
    return np.asarray([np.mean([t % 2 == 0 for t in row]) for row in rows], np.float32)


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto", rounds: int = 0) -> None:
    """Measures one update of three set-ups and prints the table; 0 rounds are 3, or 1 if `quick`."""
    load, rows, rounds = Load(4, 2, 8, 8, 64) if quick else Load(), [], rounds or (1 if quick else 3)
    rate = matmul_rate(256, 2) if quick else matmul_rate()
    for name, case in CASES[: 1 if quick else 3]:
        with tempfile.TemporaryDirectory() as folder:
            options = dict(folder=folder, load=load, quick=quick, **case)
            found = in_turn({"qstar": ours_step, "torch": torch_step}, rounds, 1, device, **options)
        ratio = paired_ratio(found["qstar"]["seconds"], found["torch"]["seconds"])
        for side, f in found.items():
            parts = dict(zip(PARTS, map(median, zip(*f["results"]))))
            row = {"load": name, "side": side, "torch/qstar": ratio, "seconds": median(f["seconds"])}
            rows.append(row | {k: v / sum(parts.values()) for k, v in parts.items()} | {"recompiles": f["recompiles"]})
        # Both sides start from the same weights: a difference would mean that they compute something else.
        difference = np.abs(np.subtract(found["qstar"]["logprobs"], found["torch"]["logprobs"])).max()
        rows[-2] |= {"difference": float(difference)}
        rows[-1] |= {"difference": None, "recompiles": None}
    notes = {
        "matmul GFLOP/s": round(rate / 1e9),
        "shares": "rollout, answerer (rewards), scoring (log-probabilities beforehand), update (loss, gradients, AdamW)",
        "difference": "largest, of log-probabilities of the same responses",
        "an update": f"{load.prompts} prompts of {load.prompt} tokens x {load.group} responses of {load.new}, float32",
    }
    show("a step of RL", rows, notes, as_json)


def config(name: str, vocab: int, quick: bool) -> AnyConfig:
    """Returns the sizes of "llama" or "t5"."""
    # No EOS: a response that ends early would be less work on one side.
    if name == "llama":
        tiny = dict(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=64)
        return preset("llama_20m", **(tiny if quick else {}), vocab_size=vocab, eos_id=None)
    width, depth = (32, 1) if quick else (256, 6)
    base = EncDecConfig(vocab_size=vocab, hidden_size=width, head_dim=32, eos_id=None)
    return base.replace(num_layers=depth, num_decoder_layers=depth, num_heads=width // 32, intermediate_size=2 * width)


def same_text(load: Load) -> tuple[np.ndarray, ...]:
    """Returns prompts and responses [8, n] int32 whose log-probabilities are compared."""
    rng = np.random.default_rng(1)
    return tuple(rng.integers(2, load.vocab, (8, n)).astype(np.int32) for n in (load.prompt, load.new))


def ours_step(
    folder: str, load: Sequence[int], estimator: str, answerer: str, policy: str, quick: bool
) -> dict[str, Callable[[], Any]]:
    """Saves the models. Returns "run", one update and its seconds by part, and "logprobs", of `same_text`."""
    size, answer = Load(*load), None
    model = random_model(config(policy, size.vocab, quick), f"{folder}/policy")
    if answerer:
        reader = random_model(config(answerer, size.vocab, quick), f"{folder}/answerer")
        answer = lambda rows: generate(reader, rows, max_new_tokens=ANSWER, temperature=0)  # noqa: E731
    settings = RLSettings(estimator=estimator, group=size.group, clip=EPS, kl_weight=BETA, no_eos_penalty=0.0)
    sizes: dict[str, Any] = dict(prompts=size.prompts, batch_size=size.prompts * size.group, max_new_tokens=size.new)
    train = reinforce.ReinforceSettings(lr=LR, b2=0.999, clip=CLIP, **sizes)
    env = reinforce.Run(model, World(size, answer), settings, train, 0, list)
    tx, step = reinforce.compiled(**env.static, update=train)
    state, count = create_state({"policy": model.params}, tx, seed=0), itertools.count()

    def run() -> list[float]:
        nonlocal state
        sampled = reinforce.sample(env, state.params, next(count), BETA)
        state, metrics = reinforce.learn(env, step, state, sampled, np.float32(LR))
        return [float(metrics[k]) for k in reinforce.SECONDS]

    def logprobs() -> Any:
        prompts, responses = same_text(size)
        static = dict(config=model.config, settings=settings, limit=model.config.vocab_size)
        found = measure_jit({"policy": model.params}, prompts, np.ones_like(prompts), responses, **static)
        return np.asarray(found[0]).tolist()

    return {"run": run, "logprobs": logprobs}


def torch_step(
    folder: str, load: Sequence[int], estimator: str, answerer: str, policy: str, quick: bool
) -> dict[str, Callable[[], Any]]:
    """Returns the same in plain PyTorch."""
    import torch

    size = Load(*load)
    twin, frozen = torch_twin(f"{folder}/policy"), torch_twin(f"{folder}/policy").eval()
    reader = torch_twin(f"{folder}/answerer").eval() if answerer else None
    seq2seq, world, count = twin.config.is_encoder_decoder, World(size), itertools.count()
    optimiser = torch.optim.AdamW(twin.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)

    def logprobs(net: Any, prompts: Any, responses: Any) -> Any:
        if seq2seq:
            # The decoder of T5 starts from the padding id, 0.
            fed = torch.cat([torch.zeros_like(responses[:, :1]), responses[:, :-1]], dim=1)
            logits = net(input_ids=prompts, decoder_input_ids=fed).logits
        else:
            logits = net(torch.cat([prompts, responses[:, :-1]], dim=1)).logits[:, prompts.shape[1] - 1 :]
        return torch.log_softmax(logits, -1).gather(-1, responses[..., None])[..., 0]

    def advantages(scores: Any) -> Any:
        s = scores.reshape(-1, size.group)
        if estimator == "grpo":
            return ((s - s.mean(1, keepdim=True)) / (s.std(1, keepdim=True) + 1e-4)).reshape(-1, 1)
        return (s - (s.sum(1, keepdim=True) - s) / (size.group - 1)).reshape(-1, 1)

    def run() -> list[float]:
        clock = [time.perf_counter()]
        tick = lambda: clock.append(time.perf_counter())  # noqa: E731
        prompts = torch.tensor(world.prompts(next(count))).repeat_interleave(size.group, dim=0)
        written = torch_generate(twin.eval(), prompts.tolist(), size.new, eos=None)
        responses = written[:, 1 if seq2seq else size.prompt :]
        tick()
        if reader is not None:
            texts = torch.cat([prompts, responses], dim=1).tolist()
            torch_generate(reader, texts, ANSWER, eos=None, greedy=True)
        scores = torch.from_numpy(worth(responses.tolist()))
        tick()
        with torch.no_grad():
            ref = logprobs(frozen, prompts, responses)
        tick()
        new = logprobs(twin.train(), prompts, responses)
        # The usual shortcut with one gradient step: the policy has not moved since the rollout. qstar computes the old
        # log-probabilities before, since RLOO and PPO need them.
        old = new.detach()
        # RLOO takes the divergence as part of the reward, GRPO as a term of the loss.
        if estimator == "rloo":
            scores = scores - BETA * (old - ref).sum(1)
        a, ratio = advantages(scores), torch.exp(new - old)
        loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - EPS, 1 + EPS))
        if estimator == "grpo":
            loss = loss + BETA * 0.5 * (ref - new).square()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        tick()
        return np.diff(clock).tolist()

    def same() -> list[list[float]]:
        with torch.no_grad():
            return logprobs(frozen, *(torch.from_numpy(x).long() for x in same_text(size))).tolist()

    return {"run": run, "logprobs": same}
