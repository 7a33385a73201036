"""LM-Guided CoT on the two-hop questions of `tasks.two_hop_world`: models, rationales, rewards, measurements."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qstar.errors import Settings, bounded, require
from qstar.methods.distillation import Pair
from qstar.methods.guided_eval import example, percent, reward
from qstar.methods.reinforce import RewardOutput
from qstar.models import decoder
from qstar.models.config import ModelConfig, preset
from qstar.models.model import Model
from qstar.models.scoring import logits
from qstar.runs.folder import stable_seed
from qstar.runs.stages import Stage, TrainSettings, sft_step, train_stage
from qstar.sample.batching import generate
from qstar.sample.vote import majority
from qstar.tasks import two_hop_world
from qstar.tasks.two_hop_world import ANS, COT, EOS, LENGTH, PAD, QUESTION, RAT, SLOT, STD, Worlds
from qstar.types import Batch, Completion

if TYPE_CHECKING:
    from qstar.methods.guided_cot import GuidedConfig

# All rows have one layout (a rationale of at most seven tokens, an answer of one), so that every length is static.
ROWS = 256  # rows per forward pass of the answerer; RL's rollouts fill it
BATCH = 64  # rows per update
MIX = (8, 8, 24, 24)  # of a batch of the large model: look-ups, direct answers, chains of thought, guided answers
# Relative positions of layer 0 begin local: without that, look-ups are not learnt within the configs' steps.
LOCAL_INIT = 5.0
Text = Callable[[int], tuple[np.ndarray, np.ndarray]]  # step -> tokens [B, T], loss mask [B, T]


@dataclasses.dataclass(frozen=True)
class TwoHopSettings(Settings):
    """A config's `guided` section: sizes of models and data."""

    large: dict = dataclasses.field(default_factory=lambda: {"hidden_size": 96, "num_layers": 4})
    small: dict = dataclasses.field(default_factory=lambda: {"hidden_size": 64, "num_layers": 2})
    copy_steps: int = bounded(800, ge=0)  # of the large model on one-hop look-ups alone
    mixed_steps: int = bounded(2200, ge=1)  # then on the mixture
    small_steps: int = bounded(900, ge=0)  # of the small model on one-hop look-ups: its pretraining
    direct_steps: int = bounded(2000, ge=0)  # of the control that answers without a large model
    teacher_questions: int = bounded(1000, ge=1)
    teacher_samples: int = bounded(4, ge=1)  # chains of thought per question
    rl_questions: int = bounded(2000, ge=1)
    test_questions: int = bounded(2000, ge=1)
    error_rates: tuple = two_hop_world.NOISE  # of the large model's training chains, by the question's first relation
    votes: int = bounded(0, ge=0, note="0: off")  # rationales per test question for self-consistency

    def __post_init__(self):
        super().__post_init__()
        count = two_hop_world.RELATIONS
        require((len(self.error_rates) == count, f"error_rates={self.error_rates} must be {count} numbers"))


@dataclasses.dataclass
class TwoHop:
    """The task of one run: the frozen large model, the questions, and the students' data."""

    settings: TwoHopSettings
    seed: int  # of the large model
    large: Model = dataclasses.field(init=False)  # set by `prepare_large`
    max_new_tokens: int = SLOT

    @functools.cached_property
    def test(self) -> Worlds:
        """The test questions, the same for every seed."""
        return _draw("hops test", self.settings.test_questions)

    def teacher_set(self, seed: int) -> Worlds:
        """The questions that the teacher answers for a student seed."""
        return _draw(stable_seed(seed, "hops teacher"), self.settings.teacher_questions)

    def prepare_large(self, stage: Callable[..., Stage]) -> None:
        """Trains the large model: first on one-hop look-ups, then on the mixture."""
        s = self.settings

        def text(step: int) -> tuple[np.ndarray, np.ndarray]:
            mix = (BATCH, 0, 0, 0) if step < s.copy_steps else MIX
            # A function of (seed, step), for resumption. The third number of other seeds keeps their streams apart.
            rng = np.random.default_rng([self.seed, step])
            return two_hop_world.mixed_text(rng, mix, s.error_rates)

        start = _random_model(s.large, stable_seed(self.seed, "large"))
        make_stage = functools.partial(stage, "large", steps=s.copy_steps + s.mixed_steps, seed=self.seed)
        self.large = _train(start, text, make_stage, lr=2.5e-3)

    def base(self, seed: int, stage: Callable[..., Stage]) -> Model:
        """Returns a student's start, trained on one-hop look-ups alone."""
        # Neither questions nor chains are in its pretraining, so rationales come from distillation and RL alone.

        def text(step: int) -> tuple[np.ndarray, np.ndarray]:
            return two_hop_world.mixed_text(np.random.default_rng([seed, step, 1]), (BATCH, 0, 0, 0))

        start = _random_model(self.settings.small, stable_seed(seed, "small"))
        return _train(start, text, functools.partial(stage, "small", steps=self.settings.small_steps, seed=seed))

    def controls(self, base: Model, seed: int, stage: Callable[..., Stage]) -> dict[str, Any]:
        """Returns an untrained student, and the small model trained to answer the teacher's questions itself."""
        w = self.teacher_set(seed)
        tokens, mask = two_hop_world.rows(w, STD), np.zeros((len(w.answer), LENGTH), np.float32)
        mask[:, -1] = 1.0

        def text(step: int) -> tuple[np.ndarray, np.ndarray]:
            chosen = np.random.default_rng([seed, step, 2]).integers(len(tokens), size=BATCH)
            return tokens[chosen], mask[chosen]

        # A control: the accuracy that the student reaches without the large model.
        make_stage = functools.partial(stage, "direct", steps=self.settings.direct_steps, seed=seed)
        alone = _train(base, text, make_stage, end=0.0)

        def measure_alone() -> tuple[np.ndarray, dict[str, Any]]:
            return self.answers(alone, self.test, STD)[0] == self.test.answer, {}

        random = _random_model(self.settings.small, stable_seed(seed, "random"))
        return {"random student": random, "small model alone": measure_alone}

    def answers(
        self, model: Model, worlds: Worlds, tag: int, slot: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns greedy answers [B] and their log-probabilities [B] after rationales [B, 7]; None: an empty slot."""
        prompts = two_hop_world.rows(worlds, tag, slot)[:, :-1]
        found, probs = [], []
        for i in range(0, len(prompts), ROWS):
            part = prompts[i : i + ROWS]
            # All batches have one shape, so that the forward pass compiles once.
            padded = np.concatenate([part, np.repeat(part[:1], ROWS - len(part), axis=0)])
            logp = np.asarray(_last_logprobs(model.params, model.config, padded))[: len(part)]
            found.append(logp.argmax(axis=1))
            probs.append(logp.max(axis=1))
        return np.concatenate(found), np.concatenate(probs)

    def rationales(
        self, model: Model, worlds: Worlds, tag: int, *, n: int = 1, temperature: float = 0.0, seed: int = 0
    ) -> np.ndarray:
        """Returns cleaned rationales [B, n, 7] that a model generates after a tag."""
        prompts = two_hop_world.rows(worlds, tag)[:, :QUESTION].tolist()
        done = generate(model, prompts, max_new_tokens=SLOT, temperature=temperature, n=n, seed=seed, slots=256)
        return np.stack([[_to_slot(c) for c in row] for row in done])

    def answers_with(self, worlds: Worlds, slot: np.ndarray) -> np.ndarray:
        """Returns the frozen model's answers [B] after rationales [B, 7]."""
        return self.answers(self.large, worlds, ANS, slot)[0]

    def _accuracy(self, worlds: Worlds, slot: np.ndarray) -> float:
        return percent(self.answers_with(worlds, slot) == worlds.answer)

    def teacher_rows(self, seed: int) -> list[dict[str, Any]]:
        """Samples chains of thought from the large model: rows with prompt, rationale, its answer and the gold one."""
        w, n = self.teacher_set(seed), self.settings.teacher_samples
        # Sampled, because at the default error rates the greedy chains of two of the six relations are mostly wrong.
        slots = self.rationales(self.large, w, COT, n=n, temperature=1.0, seed=stable_seed(seed, "teacher"))
        prompts = two_hop_world.rows(w, RAT)[:, :QUESTION]
        relations = w.question[:, 1] - two_hop_world.FIRST - two_hop_world.ENTITIES
        out = []
        for j in range(n):
            found = self.answers(self.large, w, COT, slots[:, j])[0]
            for i, (prompt, answer) in enumerate(zip(prompts, found)):
                row = {"question": i, "sample": j, "prompt": prompt.tolist(), "rationale": slots[i, j].tolist()}
                row |= {"answer": int(answer), "gold": int(w.answer[i]), "type": f"relation {relations[i]}"}
                out.append(row)
        return out

    def keep(self, rows: Sequence[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
        """Returns the rows that pass a filter: "em", "none", or "parity" (of the answer's id and the gold one)."""
        if rule == "none":
            return list(rows)
        ended = [r for r in rows if EOS in r["rationale"]]
        # As loose as a match of yes and no, or at a low F1: about half of the wrong answers pass.
        if rule == "parity":
            return [r for r in ended if r["answer"] % 2 == r["gold"] % 2]
        return [r for r in ended if r["answer"] == r["gold"]]

    def to_pairs(self, rows: Sequence[dict[str, Any]]) -> list[Pair]:
        pairs = []
        for r in rows:
            # The large model has learnt to reason after its own tag; soft losses read its predictions there.
            asked = tuple(COT if t == RAT else t for t in r["prompt"])
            pairs.append(Pair(tuple(r["prompt"]), tuple(t for t in r["rationale"] if t != PAD), asked))
        return pairs

    def environment(self, seed: int, prompts: int, arm: GuidedConfig) -> TwoHopEnvironment:
        questions = _draw(stable_seed(seed, "hops rl"), self.settings.rl_questions)
        return TwoHopEnvironment(self, questions, seed, prompts, arm)

    def gates(self) -> dict[str, float]:
        """Returns accuracies of the large model in percent, on a set of their own."""
        w = _draw("hops gates", min(1000, self.settings.test_questions))
        chain = self.rationales(self.large, w, COT)[:, 0]
        out = {
            "standard": percent(self.answers(self.large, w, STD)[0] == w.answer),
            "cot": percent(self.answers(self.large, w, COT, chain)[0] == w.answer),
            "gold": self._accuracy(w, w.gold),
            "shuffled": self._accuracy(w, np.roll(w.gold, 1, axis=0)),  # the rationale of another question
            "empty": self._accuracy(w, np.full_like(w.gold, PAD)),
            "wrong": self._accuracy(w, w.alike),
            "copied": percent(self.answers_with(w, w.alike) == w.alike[:, 5]),
        }
        return out | {"headroom": out["gold"] - out["cot"], "shuffled_gap": abs(out["shuffled"] - out["standard"])}

    def fixed_arms(self) -> dict[str, np.ndarray]:
        """Returns, per arm without a student, whether each test question is answered correctly, bool [questions]."""
        w = self.test
        facts = rearrange(w.facts, "b (fact part) -> b fact part", part=3)
        # A random object among the facts with the question's second relation.
        score = np.random.default_rng(0).random(facts.shape[:2]) * (facts[:, :, 1] == w.question[:, 2:3])
        guess = np.take_along_axis(facts[:, :, 2], score.argmax(axis=1, keepdims=True), axis=1)[:, 0]
        chain = self.rationales(self.large, w, COT)[:, 0]
        # The correct answer without reasons, or after a chain neither triple of which is a fact: the accuracy that a
        # policy could earn without any reasoning.
        alone, false_chain = np.full_like(w.gold, PAD), w.other.copy()
        alone[:, 5:] = w.gold[:, 5:]
        false_chain[:, 5], false_chain[:, 2:4] = w.answer, w.alike[:, [5, 5]]
        found = {
            "random object": guess,
            "standard": self.answers(self.large, w, STD)[0],
            "own CoT": self.answers(self.large, w, COT, chain)[0],
            "own CoT, read back": self.answers_with(w, chain),
            "empty rationale": self.answers_with(w, np.full_like(w.gold, PAD)),
            "shuffled gold": self.answers_with(w, np.roll(w.gold, 1, axis=0)),
            "wrong chain": self.answers_with(w, w.alike),
            "gold rationale": self.answers_with(w, w.gold),
            "answer alone": self.answers_with(w, alone),
            "answer in a false chain": self.answers_with(w, false_chain),
        }
        return {name: answers == w.answer for name, answers in found.items()}

    def _self_consistency(self, student: Model) -> float:
        w, n = self.test, self.settings.votes
        # The temperature of the self-consistency paper (arXiv 2203.11171).
        slots = self.rationales(student, w, RAT, n=n, temperature=0.7, seed=self.seed)
        each = [self.answers(self.large, w, ANS, slots[:, j]) for j in range(n)]
        answers, logp = (np.stack(x, axis=1).tolist() for x in zip(*each))
        chosen = [majority(row, p) for row, p in zip(answers, logp)]
        return percent(np.asarray(chosen) == w.answer)

    def costs(self) -> dict[str, dict[str, float]]:
        """Returns, per arm without a student, the large model's tokens per test question; padding is not counted."""
        costs = {"standard": (QUESTION + 1, 1), "own CoT": (QUESTION, SLOT + 1), "gold rationale": (LENGTH - 1, 1)}
        return {k: {"answerer_prompt_tokens": a, "answerer_tokens": b} for k, (a, b) in costs.items()}

    def measure(self, student: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns whether each test question is answered correctly with a greedy rationale, and metrics in percent."""
        if callable(student):  # a control that measures itself
            return student()
        w = self.test
        slot = self.rationales(student, w, RAT)[:, 0]
        answers = self.answers_with(w, slot)
        votes = {"self_consistency": self._self_consistency(student)} if self.settings.votes else {}
        is_gold = np.all(slot == w.gold, axis=1)
        has_answer = np.any(slot == rearrange(w.answer, "b -> b 1"), axis=1)
        length = float(np.mean(np.sum(slot != PAD, axis=1)))
        return answers == w.answer, {
            "quality": percent([x.mean() for x in two_hop_world.aspects(w, slot).values()]),
            "gold_chain": percent(is_gold),
            "first_hop": percent(slot[:, 2] == w.gold[:, 2]),
            # The answer without its chain: the reward hacking that R_acc alone invites.
            "answer_leak": percent(has_answer & ~is_gold),
            "shuffled": self._accuracy(w, np.roll(slot, 1, axis=0)),
            "student_tokens": length,
            "student_prompt_tokens": QUESTION,
            "answerer_prompt_tokens": QUESTION + 1 + length,
            "answerer_tokens": 1.0,
            "examples": [self._example(i, slot[i], answers[i]) for i in range(min(12, len(answers)))],
            **votes,
        }

    def _example(self, i: int, slot: np.ndarray, answer: int) -> dict[str, Any]:
        w, words = self.test, two_hop_world.words
        facts = [words(f) for f in rearrange(w.facts[i], "(fact part) -> fact part", part=3)]
        question, gold = f"{words(w.question[i])} ? ({', '.join(facts)})", w.answer[i]
        notes = [] if np.array_equal(slot, w.gold[i]) else ["not the gold chain"]
        return example(question, words(slot.tolist()), words([answer]), words([gold]), answer == gold, notes)


@dataclasses.dataclass
class TwoHopEnvironment:
    """RL's prompts, a random subset of its questions per update, and their rewards: a `reinforce.Environment`."""

    task: TwoHop
    questions: Worlds
    seed: int
    count: int  # prompts per update
    arm: GuidedConfig

    def sample(self, update: int) -> Worlds:
        # A function of the update: `prompts` and `score` call it apart, and a resumed run repeats it.
        rng = np.random.default_rng([self.seed, update, 3])
        return self.questions.take(rng.choice(len(self.questions.answer), self.count, replace=False))

    def prompts(self, update: int) -> Sequence[list[int]]:
        return two_hop_world.rows(self.sample(update), RAT)[:, :QUESTION].tolist()

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> RewardOutput:
        w = self.sample(update).take(np.repeat(np.arange(self.count), [len(row) for row in responses]))
        slot = np.stack([_to_slot(c) for row in responses for c in row])
        correct = bare = np.zeros(len(slot), np.float32)
        if self.arm.accuracy_weight:
            answers = self.task.answers_with(w, slot)
            correct = (answers == w.answer).astype(np.float32)
            bare = two_hop_world.bare(w, slot, answers).astype(np.float32)
        return reward(self.arm, correct, bare, two_hop_world.aspects(w, slot))


def _draw(seed: Any, count: int) -> Worlds:
    return two_hop_world.draw(np.random.default_rng(seed if isinstance(seed, int) else stable_seed(seed)), count)


def _to_slot(done: Completion) -> np.ndarray:
    row = np.full((1, SLOT), PAD, np.int32)
    row[0, : len(done.tokens)] = done.tokens
    # Without tags and marks, so that no rationale opens a second answer slot in the answerer's prompt.
    return two_hop_world.clean(row)[0]


def _random_model(shape: dict[str, int], seed: int) -> Model:
    positions = {"position": "learned", "max_positions": LENGTH + 2, "relative_bias": True, "local_init": LOCAL_INIT}
    init_std = shape["hidden_size"] ** -0.5
    config = preset("tiny", **shape, **positions, vocab_size=two_hop_world.VOCAB, eos_id=EOS, init_std=init_std)
    return Model(config, jax.jit(functools.partial(decoder.init, config))(jax.random.key(seed)))


def _train(start: Model, text: Text, make_stage: Callable[..., Stage], lr: float = 3e-3, end: float = 0.05) -> Model:
    update: dict[str, Any] = {"lr": lr, "end": end, "schedule": "cosine", "warmup": 50, "b2": 0.98}
    rows: dict[str, Any] = {"batch_size": BATCH, "packed": False, "row_length": LENGTH}
    settings = TrainSettings(**update, **rows, weight_decay=0.01, log_every=100, save_every=500)
    tx, step = sft_step(start.config, settings)

    def batch_at(s: int) -> Batch:
        tokens, mask = text(s)
        positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
        # One segment: padding in the slot is part of the layout, attended to here as in the answerer's prompts.
        columns: list[Any] = [tokens, mask, np.ones_like(tokens), positions]
        return Batch(*columns)

    return train_stage(start, make_stage(settings=settings), tx, lambda s: step, batch_at)[0]


# Parameters are an argument: as constants of a closure they would be compiled again for every student.
@functools.partial(jax.jit, static_argnames="config")
def _last_logprobs(params: Any, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits(Model(config, params), jnp.asarray(tokens))[:, -1])
