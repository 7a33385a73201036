"""A step of reinforcement learning beside a plain PyTorch loop (`generate`, the same loss, AdamW), and where its time goes.

Both sides draw the same number of responses of the same length to the same prompts (no response ends early), score them
with the same function, and make one update: GRPO or RLOO with the divergence from a reference. The plain loop takes the
detached log-probabilities of the update for the old ones, as is usual where there is one gradient step; qstar measures them,
since RLOO and PPO need them before. With an answerer, a larger frozen model reads every response and writes eight tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from qstar.bench.common import matmul_rate, median, paired_ratio, random_model, show, torch_twin
from qstar.bench.sides import Sides
from qstar.methods import reinforce
from qstar.models.config import preset
from qstar.models.encdec import EncDecConfig
from qstar.models.model import save
from qstar.models.scoring import AnyConfig
from qstar.sample.batching import generate
from qstar.train.rl import RLSettings, measure_jit
from qstar.train.state import create_state

PARTS = ("rollout", "answerer", "scoring", "update")
LR, CLIP, EPS, BETA, ANSWER = 1e-5, 1.0, 0.2, 0.05, 8


@dataclasses.dataclass(frozen=True)
class Load:
    """How much an update is."""

    prompts: int = 8
    group: int = 4
    prompt: int = 32  # tokens
    new: int = 32
    vocab: int = 512
    repeats: int = 3


@dataclasses.dataclass
class World:
    """Random prompts, and a reward that any function of the response may be; `answerer` reads prompt and response."""

    load: Load
    answerer: Callable[[Sequence[list[int]]], Any] | None = None

    def prompts(self, update: int) -> list[list[int]]:
        """The same for both sides."""
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


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto") -> None:
    """Measures one update of three set-ups and prints the table."""
    load, rows = Load(4, 2, 8, 8, 64, 1) if quick else Load(), []
    with Sides(device) as sides, tempfile.TemporaryDirectory() as folder:
        rate = matmul_rate(*((256, 2) if quick else ()), sides=sides)
        bench = partial(measured, sides, folder, quick, load)
        if not quick:
            rows += bench("GRPO, 20M Llama, checked answers", "llama", "grpo", "")
            rows += bench("RLOO, 20M Llama, checked answers", "llama", "rloo", "")
        rows += bench("RLOO, T5, a frozen 20M Llama answers", "t5", "rloo", "llama")
    notes = {
        "matmul GFLOP/s": round(rate / 1e9),
        "shares": "rollout, answerer (rewards), scoring (log-probabilities beforehand), update (loss, gradients, AdamW)",
        "difference": "largest, of log-probabilities of the same responses",
        "an update": f"{load.prompts} prompts of {load.prompt} tokens x {load.group} responses of {load.new}, float32",
    }
    show("a step of RL", rows, notes, as_json)


def config(name: str, vocab: int, quick: bool) -> AnyConfig:
    """Returns the sizes of "llama" or "t5"."""
    if name == "llama":
        tiny = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 64}
        return preset("llama_20m", **(tiny if quick else {}), vocab_size=vocab, eos_id=None)
    width, depth = (32, 1) if quick else (256, 6)
    return EncDecConfig(vocab_size=vocab, hidden_size=width, num_layers=depth, num_decoder_layers=depth,
                        num_heads=width // 32, head_dim=32, intermediate_size=2 * width, eos_id=None)  # fmt: skip


def measured(
    sides: Sides, folder: str, quick: bool, load: Load, name: str, policy: str, estimator: str, answerer: str
) -> list[dict[str, Any]]:
    """Two rows of the table, ours and theirs: seconds, and the shares of an update's parts (medians)."""
    common = {"folder": folder, "load": dataclasses.asdict(load), "estimator": estimator, "answerer": answerer}
    sides.make("qstar", ours_step, policy=policy, quick=quick, **common)
    sides.make("torch", torch_step, **common)
    turns = sides.interleaved(load.repeats)
    ours, theirs = (np.asarray(sides.call(side, "logprobs")) for side in ("qstar", "torch"))
    same = {"load": name, "torch/qstar": paired_ratio(turns.seconds["qstar"], turns.seconds["torch"])}
    found = {"recompiles": turns.recompiles["qstar"], "difference": float(np.abs(ours - theirs).max())}
    rows = []
    for side, more in (("qstar", found), ("torch", {"difference": None, "recompiles": None})):
        parts = {k: median([s[k] for s in turns.results[side]]) for k in PARTS}
        shares = {k: v / sum(parts.values()) for k, v in parts.items()}
        rows.append({"side": side, **same, "seconds": median(turns.seconds[side]), **shares, **more})
    return rows


def ours_step(
    folder: str, load: dict[str, int], estimator: str, answerer: str, policy: str, quick: bool
) -> dict[str, Callable[[], Any]]:
    """Saves the models in the folder. Returns "run", which makes one of our updates and returns its seconds by part, and
    "logprobs", of what `same_text` draws."""
    size = Load(**load)
    model, answer = random_model(config(policy, size.vocab, quick)), None
    save(model, f"{folder}/policy")
    if answerer:
        reader = random_model(config(answerer, size.vocab, quick))
        save(reader, f"{folder}/answerer")
        answer = lambda rows: generate(reader, rows, max_new_tokens=ANSWER, temperature=0)  # noqa: E731
    settings = RLSettings(estimator=estimator, group=size.group, clip=EPS, kl_weight=BETA, no_eos_penalty=0.0)
    train = reinforce.ReinforceSettings(prompts=size.prompts, batch_size=size.prompts * size.group, lr=LR, b2=0.999,
                                        max_new_tokens=size.new, clip=CLIP)  # fmt: skip
    run = reinforce.Run(model, World(size, answer), settings, train, 0, list)
    tx, step = reinforce.compiled(**run.static, update=train)
    holder, count = [create_state({"policy": model.params}, tx, seed=0)], itertools.count()

    def update() -> dict[str, float]:
        holder[0], metrics = reinforce.one_update(run, step, holder[0], next(count), BETA, np.float32(LR))
        return dict(zip(PARTS, (float(metrics[k]) for k in reinforce.SECONDS)))

    def logprobs() -> list[list[float]]:
        prompts, responses = same_text(size)
        found = measure_jit({"policy": model.params}, prompts, np.ones_like(prompts), responses, config=model.config,
                            settings=settings, limit=model.config.vocab_size)[0]  # fmt: skip
        return np.asarray(found).tolist()

    return {"run": update, "logprobs": logprobs}


def same_text(load: Load) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts and responses [8, n] int32 on which both sides are asked for their log-probabilities."""
    rng = np.random.default_rng(1)
    return tuple(rng.integers(2, load.vocab, (8, n)).astype(np.int32) for n in (load.prompt, load.new))


def torch_step(folder: str, load: dict[str, int], estimator: str, answerer: str) -> dict[str, Callable[[], Any]]:
    """The same in plain PyTorch."""
    import torch

    load = Load(**load)
    twin, frozen = torch_twin(f"{folder}/policy"), torch_twin(f"{folder}/policy").eval()
    reader = torch_twin(f"{folder}/answerer").eval() if answerer else None
    seq2seq, world, count = twin.config.is_encoder_decoder, World(load), itertools.count()
    optimiser = torch.optim.AdamW(twin.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)

    def logprobs(net: Any, prompts: Any, responses: Any) -> Any:
        if seq2seq:
            fed = torch.cat([torch.zeros_like(responses[:, :1]), responses[:, :-1]], dim=1)
            logits = net(input_ids=prompts, decoder_input_ids=fed).logits
        else:
            full_rows = torch.cat([prompts, responses[:, :-1]], dim=1)
            logits = net(full_rows).logits[:, prompts.shape[1] - 1 :]
        return torch.log_softmax(logits, -1).gather(-1, responses[..., None])[..., 0]

    def advantages(scores: Any) -> Any:
        s = scores.reshape(-1, load.group)
        if estimator == "grpo":
            return ((s - s.mean(1, keepdim=True)) / (s.std(1, keepdim=True) + 1e-4)).reshape(-1, 1)
        return (s - (s.sum(1, keepdim=True) - s) / (load.group - 1)).reshape(-1, 1)

    def update() -> dict[str, float]:
        clock = [time.perf_counter()]
        rows = torch.tensor(world.prompts(next(count)))
        prompts = rows.repeat_interleave(load.group, dim=0)
        out = _torch_generate(twin.eval(), prompts, load.new)
        responses = out[:, 1:] if seq2seq else out[:, load.prompt :]
        clock.append(time.perf_counter())
        if reader is not None:
            _torch_generate(reader, torch.cat([prompts, responses], dim=1), ANSWER, sample=False)
        scores = torch.from_numpy(worth(responses.tolist()))
        clock.append(time.perf_counter())
        with torch.no_grad():
            ref = logprobs(frozen, prompts, responses)
        clock.append(time.perf_counter())
        new = logprobs(twin.train(), prompts, responses)
        old = new.detach()
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
        clock.append(time.perf_counter())
        return dict(zip(PARTS, np.diff(clock).tolist()))

    def of_same_text() -> list[list[float]]:
        with torch.no_grad():
            return logprobs(frozen, *(torch.from_numpy(x).long() for x in same_text(load))).tolist()

    return {"run": update, "logprobs": of_same_text}


def _torch_generate(net: Any, prompts: Any, new: int, sample: bool = True) -> Any:
    import torch

    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    with torch.no_grad():
        return net.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, min_new_tokens=new,
                            pad_token_id=0, eos_token_id=None, **options)  # fmt: skip
