"""LM-Guided CoT in the two-hop world of `tasks.hops`: its frozen large model, its teacher data, its measurements.

Everything is ids in rows of one fixed layout, so every length is static: a rationale is at most seven tokens, an answer one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar.errors import require
from qstar.methods import guided_eval
from qstar.methods.distillation import Pair
from qstar.methods.reinforce import RewardOutput
from qstar.models import decoder
from qstar.models.config import ModelConfig, preset
from qstar.models.model import Model
from qstar.models.scoring import logits
from qstar.runs.folder import stable_seed
from qstar.runs.stages import Stage, TrainSettings, sft_step, train_stage
from qstar.sample.batching import generate
from qstar.tasks import two_hop_world
from qstar.types import Batch, Completion

ROWS = 256  # rows per forward pass of the answerer: RL's rollouts fill it


@dataclasses.dataclass(frozen=True)
class SynthSettings:
    """A config's `world` section: sizes of models and data. Steps are of batches of 64."""

    large: dict = dataclasses.field(default_factory=lambda: {"hidden_size": 96, "num_layers": 4})
    small: dict = dataclasses.field(default_factory=lambda: {"hidden_size": 64, "num_layers": 2})
    local_init: float = 5.0  # of both models' relative positions, layer 0: without it the lookup is not learnt in time
    copy_steps: int = 800  # one-hop reading alone
    mixed_steps: int = 2200  # then the mixture
    mix: tuple = (8, 8, 24, 24)  # rows of copying, standard, chain of thought, answering per batch
    large_lr: float = 2.5e-3
    small_steps: int = 900  # one-hop reading of the small model: what a pretrained one would bring
    small_lr: float = 3e-3
    direct_steps: int = 2000  # of the small model that learns to answer by itself, a control
    direct_lr: float = 3e-3
    questions: int = 1000  # that the teacher answers
    samples: int = 4  # by the teacher, per question
    rl_questions: int = 2000  # others, for RL
    test: int = 2000
    noise: tuple = two_hop_world.NOISE  # how often the teacher's text is wrong, by the question's first relation
    two_ways: bool = False  # right chains are told backwards half the time, see `hops.mixed_text`
    votes: int = 10  # rationales per test question for self-consistency, where an arm is studied
    choose: int = 16  # rationales of which the best-rated one is compared with the most useful one, there

    def __post_init__(self):
        counts = ("mixed_steps", "questions", "samples", "rl_questions", "test", "votes", "choose")
        require(*((getattr(self, n) >= 1, f"{n}={getattr(self, n)} must be at least 1") for n in counts),
                (min(self.copy_steps, self.small_steps, self.direct_steps) >= 0, "a number of steps is below 0"),
                (len(self.noise) == two_hop_world.RELATIONS,
                 f"noise={self.noise} must be {two_hop_world.RELATIONS} numbers, one per relation"),
                (len(self.mix) == 4 and sum(self.mix) > 0, f"mix={self.mix} must be four numbers of rows"))  # fmt: skip


def model_config(shape: dict[str, int], local_init: float) -> ModelConfig:
    """Returns the decoder of the world: learned positions, and relative ones that begin local."""
    width = shape["hidden_size"]
    return preset(
        "tiny",
        **shape,
        vocab_size=two_hop_world.VOCAB,
        position="learned",
        max_positions=two_hop_world.LENGTH + 2,
        relative_bias=True,
        local_init=local_init,
        eos_id=two_hop_world.EOS,
        init_std=width**-0.5,
    )


def fresh(config: ModelConfig, seed: int) -> Model:
    """Returns the model with random weights."""
    return Model(config, jax.jit(functools.partial(decoder.init, config))(jax.random.key(seed)))


def read_facts(
    start: Model, text: Callable[[int], tuple[np.ndarray, np.ndarray]], stage: Stage
) -> tuple[Model, dict[str, Any]]:
    """Trains on generated rows (a function of the step), resumable like every stage."""
    tx, step = sft_step(start.config, stage.settings)

    def batch_at(s: int) -> Batch:
        tokens, mask = text(s)
        one = np.ones_like(tokens)
        return Batch(
            tokens, mask, one, np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape).copy()
        )

    return train_stage(start, stage, tx, lambda s: step, batch_at)


@dataclasses.dataclass
class Synth:
    """The world of one run: the frozen large model, a test set, and what students learn from."""

    settings: SynthSettings
    seed: int  # of the world's sets and of the large model
    large: Model = None
    max_new_tokens: int = two_hop_world.SLOT

    @functools.cached_property
    def test(self) -> two_hop_world.Worlds:
        """The test questions, the same for every model seed."""
        return two_hop_world.draw(np.random.default_rng(stable_seed("hops test")), self.settings.test)

    @functools.cached_property
    def gate_set(self) -> two_hop_world.Worlds:
        """Another draw: the gates see no test question."""
        return two_hop_world.draw(np.random.default_rng(stable_seed("hops gates")), min(1000, self.settings.test))

    def rl_set(self, seed: int) -> two_hop_world.Worlds:
        """Questions for RL."""
        return two_hop_world.draw(np.random.default_rng(stable_seed(seed, "hops rl")), self.settings.rl_questions)

    # ------------------------------------------------------------------------------------------------ models

    def train_large(self, stage: Callable[..., Stage]) -> Model:
        """Returns the large model, trained once and then frozen; first on one-hop reading, then on the mixture."""
        s = self.settings
        steps = s.copy_steps + s.mixed_steps

        def text(step: int) -> tuple[np.ndarray, np.ndarray]:
            rng = np.random.default_rng([self.seed, step])
            count = sum(s.mix)
            mix = (count, 0, 0, 0) if step < s.copy_steps else s.mix
            return two_hop_world.mixed_text(rng, mix, s.noise, two_ways=s.two_ways)

        start = fresh(model_config(s.large, s.local_init), stable_seed(self.seed, "large"))
        settings = _update(s.large_lr, sum(s.mix), "cosine", 0.05)
        self.large = read_facts(start, text, stage("large", settings, steps, self.seed))[0]
        return self.large

    def base(self, seed: int, stage: Callable[..., Stage]) -> Model:
        """Returns a student's start: it can read a fact, and knows no question and no chain."""
        s = self.settings
        start = fresh(model_config(s.small, s.local_init), stable_seed(seed, "small"))

        def text(step: int) -> tuple[np.ndarray, np.ndarray]:
            return two_hop_world.mixed_text(np.random.default_rng([seed, step, 1]), (64, 0, 0, 0))

        settings = _update(s.small_lr, 64, "cosine", 0.05)
        return read_facts(start, text, stage("small", settings, s.small_steps, seed))[0]

    def direct(self, start: Model, seed: int, stage: Callable[..., Stage], steps: int) -> Model:
        """Returns a small model that answers by itself: gold answers of the teacher's questions, as many steps."""
        w = self.teacher_questions(seed)
        tokens, mask = (
            two_hop_world.rows(w, two_hop_world.STD),
            np.zeros((len(w.answer), two_hop_world.LENGTH), np.float32),
        )
        mask[:, -1] = 1.0

        def text(step: int) -> tuple[np.ndarray, np.ndarray]:
            chosen = np.random.default_rng([seed, step, 2]).integers(len(tokens), size=64)
            return tokens[chosen], mask[chosen]

        return read_facts(
            start, text, stage("direct", _update(self.settings.direct_lr, 64, "cosine", 0.0), steps, seed)
        )[0]

    def controls(self, base: Model, seed: int, stage: Callable[..., Stage]) -> dict[str, Any]:
        """Returns a student that has learnt nothing at all, and the small model answering by itself."""
        alone = self.direct(base, seed, stage, self.settings.direct_steps)
        says = lambda: (self.answers(alone, self.test, two_hop_world.STD, None)[0] == self.test.answer, {})  # noqa: E731
        return {"random student": fresh(base.config, stable_seed(seed, "random")), "small model alone": says}

    # ------------------------------------------------------------------------------------- reading and writing

    def answers(
        self, model: Model, worlds: two_hop_world.Worlds, tag: int, slot: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns greedy answers [B] and their log-probabilities, after a rationale (None: an empty slot)."""
        prompts = two_hop_world.rows(worlds, tag, slot)[:, :-1]
        found, probs = [], []
        for at in range(0, len(prompts), ROWS):
            part = prompts[at : at + ROWS]
            padded = np.concatenate([part, np.repeat(part[:1], ROWS - len(part), axis=0)])  # one shape for all
            logp = np.asarray(_last(model.params, model.config, padded))[: len(part)]
            found.append(logp.argmax(axis=1))
            probs.append(logp.max(axis=1))
        return np.concatenate(found), np.concatenate(probs)

    def rationales(
        self,
        model: Model,
        worlds: two_hop_world.Worlds,
        tag: int,
        *,
        n: int = 1,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> np.ndarray:
        """Returns cleaned rationales [B, n, 7] that a model writes under a tag."""
        prompts = two_hop_world.rows(worlds, tag)[:, : two_hop_world.QUESTION].tolist()
        done = generate(
            model, prompts, max_new_tokens=two_hop_world.SLOT, temperature=temperature, n=n, seed=seed, slots=256
        )
        return np.stack([[in_slot(c) for c in row] for row in done])

    def guided(self, worlds: two_hop_world.Worlds, slot: np.ndarray) -> np.ndarray:
        """Returns the frozen model's answers [B] after rationales [B, 7]."""
        return self.answers(self.large, worlds, two_hop_world.ANS, slot)[0]

    def teacher_questions(self, seed: int) -> two_hop_world.Worlds:
        """The questions that the teacher answers for a student seed."""
        return two_hop_world.draw(np.random.default_rng(stable_seed(seed, "hops teacher")), self.settings.questions)

    def teacher_rows(self, seed: int) -> list[dict[str, Any]]:
        """Samples chains of thought from the large model: rows with prompt, rationale, its answer and the gold one."""
        w, s = self.teacher_questions(seed), self.settings
        slots = self.rationales(
            self.large, w, two_hop_world.COT, n=s.samples, temperature=1.0, seed=stable_seed(seed, "teacher")
        )
        out = []
        prompts = two_hop_world.rows(w, two_hop_world.RAT)[:, : two_hop_world.QUESTION]
        for j in range(s.samples):
            said = self.answers(self.large, w, two_hop_world.COT, slots[:, j])[0]
            for i in range(len(prompts)):
                row = {"question": i, "sample": j, "prompt": prompts[i].tolist(), "rationale": slots[i, j].tolist()}
                relation = int(w.question[i, 1]) - two_hop_world.FIRST - two_hop_world.ENTITIES
                out.append(row | {"answer": int(said[i]), "gold": int(w.answer[i]), "type": f"relation {relation}"})
        return out

    def kept(self, rows: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
        """See `kept`."""
        return kept(rows, rule)

    def to_pairs(self, rows: list[dict[str, Any]]) -> list[Pair]:
        """See `to_pairs`."""
        return to_pairs(rows)

    def environment(self, seed: int, group: int, prompts: int, recipe: Any) -> SynthEnvironment:
        """Returns RL's prompts, and rewards as an arm's recipe weighs them."""
        reward = Reward(recipe.accuracy, recipe.aspect, recipe.weak, recipe.guard)
        return SynthEnvironment(self, self.rl_set(seed), seed, group, prompts, reward)

    # ----------------------------------------------------------------------------------------------- measurements

    def gates(self) -> dict[str, float]:
        """Returns what must hold of the large model, on a set of its own; accuracies in percent."""
        w, n = self.gate_set, len(self.gate_set.answer)
        right = lambda said: 100.0 * float(np.mean(said == w.answer))  # noqa: E731
        chain = self.rationales(self.large, w, two_hop_world.COT)[:, 0]
        alike = self.guided(w, w.alike)
        out = {
            "standard": right(self.answers(self.large, w, two_hop_world.STD, None)[0]),
            "cot": right(self.answers(self.large, w, two_hop_world.COT, chain)[0]),
            "gold": right(self.guided(w, w.gold)),
            "shuffled": right(self.guided(w, np.roll(w.gold, 1, axis=0))),
            "empty": right(self.guided(w, np.full((n, two_hop_world.SLOT), two_hop_world.PAD))),
            "wrong": right(alike),
            "copied": 100.0 * float(np.mean(alike == w.alike[:, 5])),
        }
        return out | {"headroom": out["gold"] - out["cot"], "shuffled_gap": abs(out["shuffled"] - out["standard"])}

    def fixed_arms(self) -> dict[str, np.ndarray]:
        """Returns per arm that needs no student whether each test question is answered right, bool [test]."""
        w = self.test
        rng = np.random.default_rng(0)
        facts = w.facts.reshape(len(w.answer), 7, 3)
        score = rng.random((len(w.answer), 7)) * (facts[:, :, 1] == w.question[:, 2:3])
        guess = np.take_along_axis(facts[:, :, 2], score.argmax(axis=1)[:, None], axis=1)[:, 0]
        chain = self.rationales(self.large, w, two_hop_world.COT)[:, 0]
        said = {
            "random object": guess,
            "standard": self.answers(self.large, w, two_hop_world.STD, None)[0],
            "own CoT": self.answers(self.large, w, two_hop_world.COT, chain)[0],
            "own CoT, read back": self.guided(w, chain),
            "empty rationale": self.guided(w, np.full_like(w.gold, two_hop_world.PAD)),
            "shuffled gold": self.guided(w, np.roll(w.gold, 1, axis=0)),
            "look-alike": self.guided(w, w.alike),
            "gold rationale": self.guided(w, w.gold),
        }
        return {k: v == w.answer for k, v in said.items()} | guided_eval.smuggled_gold(self)

    def own_votes(self) -> dict[str, float]:
        """The large model's own chains: percent right by one greedy chain, by one sampled, and by a vote of several."""
        w, s = self.test, self.settings
        chains = self.rationales(self.large, w, two_hop_world.COT, n=s.votes, temperature=0.7, seed=self.seed)
        votes = [self.answers(self.large, w, two_hop_world.COT, chains[:, j]) for j in range(s.votes)]
        said, logp = (np.stack(x, axis=1) for x in zip(*votes))
        return {
            "sampled": 100.0 * float(np.mean(said == w.answer[:, None])),
            "self_consistency": guided_eval.votes(said, logp, w.answer),
        }

    def study(self, student: Model) -> dict[str, float]:
        """See `guided_study.studied`."""
        return guided_eval.studied(self, student)

    def costs(self) -> dict[str, dict[str, float]]:
        """Tokens per test question of arms without a student, padding not counted: read and written by the large model."""
        asked, answer = two_hop_world.QUESTION + 1, 1
        chain = {"answerer_reads": two_hop_world.QUESTION, "answerer_tokens": two_hop_world.SLOT + answer}
        return {"standard": {"answerer_reads": asked, "answerer_tokens": answer}, "own CoT": chain,
                "gold rationale": {"answerer_reads": asked + two_hop_world.SLOT, "answerer_tokens": answer}}  # fmt: skip

    def measure(self, student: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Returns whether each test question is answered right with the student's greedy rationale, and what it wrote."""
        if callable(student):
            return student()
        w = self.test
        slot = self.rationales(student, w, two_hop_world.RAT)[:, 0]
        said = self.guided(w, slot)
        right = said == w.answer
        strict, weak = (two_hop_world.aspects(w, slot, weak=x) for x in (False, True))
        shuffled = self.guided(w, np.roll(slot, 1, axis=0)) == w.answer
        chain_right = np.all(slot == w.gold, axis=1)
        named = np.any(slot == w.answer[:, None], axis=1)
        return right, {
            "quality": 100.0 * float(np.mean([x.mean() for x in strict.values()])),
            "quality_weak": 100.0 * float(np.mean([x.mean() for x in weak.values()])),
            "gold_chain": 100.0 * float(chain_right.mean()),
            "first_hop": 100.0 * float(np.mean(slot[:, 2] == w.gold[:, 2])),
            "smuggled": 100.0 * float(np.mean(named & ~chain_right)),
            "shuffled": 100.0 * float(shuffled.mean()),
            "student_tokens": (wrote := float(np.mean(np.sum(slot != two_hop_world.PAD, axis=1)))),
            "student_reads": two_hop_world.QUESTION,
            "answerer_reads": two_hop_world.QUESTION + 1 + wrote,
            "answerer_tokens": 1.0,
            "examples": self._examples(slot, said),
        }

    def _examples(self, slot: np.ndarray, said: np.ndarray, count: int = 12) -> list[dict[str, Any]]:
        """The first test questions in words."""
        w, out = self.test, []
        for i in range(min(count, len(w.answer))):
            facts = [two_hop_world.words(f) for f in w.facts[i].reshape(7, 3)]
            row = {
                "question": f"{two_hop_world.words(w.question[i])} ? ({', '.join(facts)})",
                "rationale": two_hop_world.words(slot[i]),
            }
            row |= {
                "answer": two_hop_world.words([said[i]]),
                "gold": two_hop_world.words([w.answer[i]]),
                "right": bool(said[i] == w.answer[i]),
            }
            out.append(row | {"notes": [] if np.array_equal(slot[i], w.gold[i]) else ["not the gold chain"]})
        return out


@dataclasses.dataclass(frozen=True)
class Reward:
    """What RL pays for: the answerer's exact match, and the mean of four aspects."""

    accuracy: float = 1.0
    aspect: float = 1.0
    weak: bool = False  # the weak factuality, which does not look at relations
    guard: bool = True  # a rationale that names the answer and tells no fact earns no accuracy


@dataclasses.dataclass
class SynthEnvironment:
    """RL's prompts, an endless shuffle of its questions, and their rewards."""

    synth: Synth
    worlds: two_hop_world.Worlds
    seed: int
    group: int
    count: int
    reward: Reward

    def _rows(self, update: int) -> np.ndarray:
        return np.random.default_rng([self.seed, update, 3]).choice(len(self.worlds.answer), self.count, replace=False)

    def prompts(self, update: int) -> Sequence[list[int]]:
        """See `reinforce.Environment`."""
        return two_hop_world.rows(self.worlds.take(self._rows(update)), two_hop_world.RAT)[
            :, : two_hop_world.QUESTION
        ].tolist()

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> RewardOutput:
        """See `reinforce.Environment`."""
        w = self.worlds.take(np.repeat(self._rows(update), self.group))
        slot = np.stack([in_slot(c) for row in responses for c in row])
        parts = two_hop_world.aspects(w, slot, weak=self.reward.weak)
        aspect = np.mean(list(parts.values()), axis=0)
        right = bare = np.zeros(len(slot), np.float32)
        if self.reward.accuracy:
            said = self.synth.guided(w, slot)
            right, bare = (said == w.answer).astype(np.float32), two_hop_world.bare(w, slot, said).astype(np.float32)
            right = right * (1.0 - bare) if self.reward.guard else right
        scores = self.reward.accuracy * right + self.reward.aspect * aspect
        return RewardOutput(scores.astype(np.float32), {"accuracy": right, "aspect": aspect, "bare": bare, **parts})


def kept(rows: Sequence[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
    """Returns the teacher's rows that a filter keeps: "em", "none", or "parity" (loose: the id is as odd as it should be)."""
    ended = [r for r in rows if two_hop_world.EOS in r["rationale"]]
    if rule == "none":
        return list(rows)
    if rule == "parity":
        return [r for r in ended if r["answer"] % 2 == r["gold"] % 2]
    return [r for r in ended if r["answer"] == r["gold"]]


def to_pairs(rows: Sequence[dict[str, Any]]) -> list[Pair]:
    """Returns rows as the student learns them: up to the end, padding left out."""
    return [Pair(tuple(r["prompt"]), tuple(t for t in r["rationale"] if t != two_hop_world.PAD)) for r in rows]


def in_slot(done: Completion) -> np.ndarray:
    """Returns a completion as the answerer may read it, [7]."""
    row = np.full((1, two_hop_world.SLOT), two_hop_world.PAD, np.int32)
    row[0, : len(done.tokens)] = done.tokens
    return two_hop_world.clean(row)[0]


def _update(lr: float, batch: int, schedule: str, end: float) -> TrainSettings:
    return TrainSettings(batch_size=batch, lr=lr, schedule=schedule, end=end, warmup=50, b2=0.98, weight_decay=0.01,
                         packed=False, row_length=two_hop_world.LENGTH, log_every=100, save_every=500)  # fmt: skip


@functools.partial(jax.jit, static_argnames="config")
def _last(params: Any, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Returns log-probabilities [B, V] of what follows rows [B, T]."""
    model = Model(config, params)
    return jax.nn.log_softmax(logits(model, jnp.asarray(tokens))[:, -1])
