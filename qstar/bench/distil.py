"""A step of distillation beside a plain PyTorch loop: imitated text, a teacher's whole predictions, and on-policy text (GKD).

Same weights, same text, one AdamW update each; the loss of the first step is compared. On-policy, both sides let the student
write first: qstar by its sampler, the loop by transformers' `generate`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from qstar.bench.common import SMALL_BLOCKS, matmul_rate, median, paired_ratio, random_model, show, torch_twin
from qstar.bench.sides import SIDES, Sides
from qstar.methods import distillation
from qstar.methods.distillation import DistilTrain, Pair
from qstar.models.config import preset
from qstar.models.encdec import EncDecConfig
from qstar.models.model import save
from qstar.models.scoring import AnyConfig
from qstar.train.distil import DistilSettings
from qstar.train.state import create_state

LR, BETA = 1e-5, 0.5


@dataclasses.dataclass(frozen=True)
class Load:
    """How much a step is."""

    rows: int = 32
    prompt: int = 96  # tokens
    new: int = 32
    vocab: int = 512
    repeats: int = 5

    def pairs(self) -> list[Pair]:
        """Random prompts and responses."""
        rng = np.random.default_rng(0)
        draw = lambda n: rng.integers(2, self.vocab, (self.rows, n)).tolist()  # noqa: E731
        return [Pair(tuple(p), tuple(r)) for p, r in zip(draw(self.prompt), draw(self.new))]


LOADS = (
    ("text, 3.4M Llama", "llama", DistilSettings()),
    ("text, T5 of 6 + 6 layers", "t5", DistilSettings()),
    ("forward KL from 20M", "llama", DistilSettings(kind="forward_kl")),
    ("on-policy JSD from 20M", "llama", DistilSettings(kind="jsd", beta=BETA, on_policy=1.0)),
)


def main(*, as_json: bool = False, quick: bool = False, device: str = "auto") -> None:
    """Measures a step of every kind and prints the table."""
    load, rows = Load(4, 8, 8, 64, 1) if quick else Load(), []
    with Sides(device) as sides, tempfile.TemporaryDirectory() as folder:
        rate = matmul_rate(*((256, 2) if quick else ()), sides=sides)
        for name, student, settings in LOADS[2:] if quick else LOADS:
            rows += measured(sides, folder, quick, load, name, student, settings)
    notes = {
        "matmul GFLOP/s": round(rate / 1e9),
        "shares": "rollout (the student writes), update (teacher, loss, gradients, AdamW)",
        "a step": f"{load.rows} rows of {load.prompt} + {load.new} tokens, float32",
    }
    show("a step of distillation", rows, notes, as_json)


def config(name: str, vocab: int, quick: bool) -> AnyConfig:
    """Returns the sizes of a student, "llama" or "t5", or of the "teacher"."""
    if name == "t5":
        width, depth = (32, 1) if quick else (256, 6)
        return EncDecConfig(vocab_size=vocab, hidden_size=width, num_layers=depth, num_decoder_layers=depth,
                            num_heads=width // 32, head_dim=32, intermediate_size=2 * width, eos_id=None)  # fmt: skip
    tiny = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 64}
    shapes = {"llama": tiny, "teacher": {**tiny, "num_layers": 2}} if quick else {"llama": SMALL_BLOCKS, "teacher": {}}
    return preset("llama_20m", **shapes[name], vocab_size=vocab, eos_id=None)


def measured(
    sides: Sides, folder: str, quick: bool, load: Load, name: str, student: str, settings: DistilSettings
) -> list[dict[str, Any]]:
    """Two rows of the table, ours and theirs."""
    common = {"folder": folder, "load": dataclasses.asdict(load), "settings": dataclasses.asdict(settings)}
    sides.make("qstar", ours_step, student=student, quick=quick, **common)
    sides.make("torch", torch_step, **common)
    first = [sides.call(side)["loss"] for side in SIDES]
    turns = sides.interleaved(load.repeats)
    same = {"load": name, "torch/qstar": paired_ratio(turns.seconds["qstar"], turns.seconds["torch"])}
    apart = None if settings.on_policy else abs(first[0] - first[1])
    found = {"qstar": (apart, turns.recompiles["qstar"]), "torch": (None, None)}
    out = []
    for side in SIDES:
        rollout = median([r["rollout"] / max(r["whole"], 1e-9) for r in turns.results[side]])
        out.append({"side": side, **same, "seconds": median(turns.seconds[side]), "rollout": rollout, "update": 1 - rollout,
                    "loss difference": found[side][0], "recompiles": found[side][1]})  # fmt: skip
    return out


def ours_step(
    folder: str, load: dict[str, int], settings: dict[str, Any], student: str, quick: bool
) -> Callable[[], dict[str, float]]:
    """Saves the models in the folder. Returns a function that makes one of our steps: its loss, and the seconds of its
    rollout and of the whole."""
    load, settings = Load(**load), DistilSettings(**settings)
    model, teacher = (random_model(config(name, load.vocab, quick)) for name in (student, "teacher"))
    save(model, f"{folder}/student")
    save(teacher, f"{folder}/teacher")
    train = DistilTrain(batch_size=load.rows, lr=LR, b2=0.999, max_new_tokens=load.new)
    tx, step = distillation.compiled(model.config, teacher.config, settings, model.config.vocab_size, train)
    params = {"policy": model.params} | ({"teacher": teacher.params} if settings.kind != "hard" else {})
    holder, pairs, count = [create_state(params, tx, seed=0)], load.pairs(), itertools.count()

    def run() -> dict[str, float]:
        began, rows, number = time.perf_counter(), pairs, next(count)
        if settings.on_policy:
            rows = distillation.sample_on_policy(model, holder[0].params["policy"], pairs, load.new, number)
        wrote = time.perf_counter()
        batch = distillation.make_batch(model.config, teacher.config, rows, [load.prompt, load.prompt], load.new)
        holder[0], metrics = step(holder[0], jax.device_put(batch), np.float32(LR))
        loss = float(metrics["loss"])
        return {"loss": loss, "rollout": wrote - began, "whole": time.perf_counter() - began}

    return run


def torch_step(folder: str, load: dict[str, int], settings: dict[str, Any]) -> Callable[[], dict[str, float]]:
    """The same in plain PyTorch."""
    import torch

    load, settings = Load(**load), DistilSettings(**settings)
    twin = torch_twin(f"{folder}/student")
    seq2seq = twin.config.is_encoder_decoder
    teacher_net = torch_twin(f"{folder}/teacher").eval() if settings.kind != "hard" else None
    optimiser = torch.optim.AdamW(twin.parameters(), lr=LR, betas=(0.9, 0.999), weight_decay=0.0)
    prompts, given = (torch.tensor([list(p[k]) for p in load.pairs()]) for k in (0, 1))

    def logp(net: Any, responses: Any) -> Any:
        if seq2seq:
            fed = torch.cat([torch.zeros_like(responses[:, :1]), responses[:, :-1]], dim=1)
            return torch.log_softmax(net(input_ids=prompts, decoder_input_ids=fed).logits, -1)
        full_rows = torch.cat([prompts, responses[:, :-1]], dim=1)
        return torch.log_softmax(net(full_rows).logits[:, load.prompt - 1 :], -1)

    def kl(a: Any, b: Any) -> Any:
        return (a.exp() * (a - b)).sum(-1)

    def divergence(p: Any, q: Any) -> Any:
        if settings.kind == "forward_kl":
            return kl(p, q)
        m = torch.logaddexp(p + math.log(BETA), q + math.log(1 - BETA))
        return BETA * kl(p, m) + (1 - BETA) * kl(q, m)

    def run() -> dict[str, float]:
        began, responses = time.perf_counter(), given
        if settings.on_policy:
            options = dict(max_new_tokens=load.new, min_new_tokens=load.new, pad_token_id=0, eos_token_id=None)
            with torch.no_grad():
                out = twin.eval().generate(
                    prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, **options
                )
            responses = out[:, load.prompt :]
        wrote = time.perf_counter()
        q = logp(twin.train(), responses)
        if teacher_net is None:
            loss = -q.gather(-1, responses[..., None]).mean()
        else:
            with torch.no_grad():
                p = logp(teacher_net, responses)
            loss = divergence(p, q).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return {"loss": loss.item(), "rollout": wrote - began, "whole": time.perf_counter() - began}

    return run
