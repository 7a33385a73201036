"""LM-Guided CoT on HotpotQA and 2WikiMultiHopQA: any student, and a large model, loaded or behind an endpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qstar.errors import Settings, bounded, require, unknown
from qstar.methods.answerer import Answer, Cached, HttpAnswerer, ModelAnswerer
from qstar.methods.distillation import Pair
from qstar.methods.guided_eval import METRICS, example, percent, reward, task_score
from qstar.methods.reinforce import RewardOutput
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model, load
from qstar.runs.rollouts import tokenizer_of
from qstar.runs.settings import settings_from
from qstar.sample.batching import generate
from qstar.sample.vote import majority
from qstar.tasks import multihop
from qstar.tasks.aspects import ASPECTS, View, bare_answer
from qstar.tasks.base import Problem, stable_rng
from qstar.tasks.qa_metrics import normalise
from qstar.types import Completion

if TYPE_CHECKING:
    from qstar.methods.guided_cot import GuidedConfig


@dataclasses.dataclass(frozen=True)
class LocalModel(Settings):
    """A config's `guided.large` for a loaded model; for an endpoint it holds the fields of `HttpAnswerer`."""

    path: str
    dtype: str | None = None
    slots: int | None = bounded(None, ge=1)  # prompts decoded in parallel


@dataclasses.dataclass(frozen=True)
class MultiHopSettings(Settings):
    """A config's `guided` section: the two models, and the number of questions of each stage."""

    small: str = ""  # folder of the model that writes rationales: T5 or a decoder
    large: dict = dataclasses.field(default_factory=dict)  # {"path": DIR, "slots": N} or {"url": ..., "model": ...}
    teacher_questions: int = bounded(1000, ge=1)
    rl_questions: int = bounded(1000, ge=1)
    test_questions: int = bounded(500, ge=1)
    small_limit: int = bounded(1024, ge=1)  # tokens of a student's prompt, above which paragraphs are dropped
    large_limit: int = bounded(1500, ge=1)  # of the large model's: tokens of a local model, words behind an endpoint
    max_new_tokens: int = bounded(96, ge=1)  # of a rationale
    cot_tokens: int = bounded(192, ge=1)  # of the teacher's rationale and answer
    answer_tokens: int = 32
    metric: str = bounded("em", choices=METRICS)  # what counts as correct, also for RL
    votes: int = bounded(0, ge=0, note="0: off")  # rationales per test question for self-consistency
    aspects: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(ASPECTS, 1.0))

    def __post_init__(self):
        super().__post_init__()
        require(
            (bool(self.small), "small is not set; name the folder of the model that writes rationales"),
            ("path" in self.large or "url" in self.large, "large has neither path nor url; name the large model"),
        )
        for name in self.aspects:
            if name not in ASPECTS:
                raise unknown(f"aspects.{name}", name, ASPECTS)
        require(
            (all(w >= 0 for w in self.aspects.values()), "aspects: a weight below 0; leave the aspect out, or use 0"),
            (any(self.aspects.values()), "aspects: all weights are 0; to reward none, set aspect_weight=0 in the arms"),
        )


@dataclasses.dataclass
class MultiHop:
    """The task of one run: questions, the student's start and the frozen large model."""

    settings: MultiHopSettings
    task: multihop.MultiHop
    seed: int
    workdir: Path
    mesh: Any = None
    prompts_built: int = 0
    prompts_truncated: int = 0  # that lost a paragraph

    def __post_init__(self):
        large = self.settings.large
        self._large_settings = settings_from(HttpAnswerer if "url" in large else LocalModel, large, "guided.large")
        self.max_new_tokens = self.settings.max_new_tokens

    # --------------------------------------------------------------------------------------------------- models

    @functools.cached_property
    def small(self) -> Model:
        """The student before distillation, in the dtype that it is stored in."""
        model = load(self.settings.small, mesh=self.mesh)
        no_text = f"config.guided.small={self.settings.small}: has no tokenizer files; rationales are text"
        require((model.tokenizer is not None, no_text))
        return model

    @functools.cached_property
    def _large(self) -> functools.partial[Any]:  # makes an Answerer
        s = self._large_settings
        if isinstance(s, HttpAnswerer):
            return functools.partial(dataclasses.replace, s)
        # Teacher and answerer share these weights; they differ in their decoding options only.
        model = load(s.path, mesh=self.mesh, dtype=s.dtype)
        return functools.partial(ModelAnswerer, model, name=s.path, slots=s.slots)

    @functools.cached_property
    def answerer(self) -> Cached:
        """The frozen model as it answers."""
        return Cached(self._large(max_new_tokens=self.settings.answer_tokens), self.workdir / "large" / "answers.jsonl")

    @functools.cached_property
    def explainer(self) -> Cached:
        """The same model as the teacher, with an explanation (of several lines) and an answer in one completion."""
        large = self._large(max_new_tokens=self.settings.cot_tokens, stop=multihop.RUN_ON)
        return Cached(large, self.workdir / "large" / "chains.jsonl")

    def prepare_large(self, stage: Any) -> None:
        """Loads both models, so that their faults show before any work."""
        _ = self.answerer, self.small

    def gates(self) -> dict[str, float]:
        """Returns no measurement of the large model to bound."""
        return {}

    def base(self, seed: int, stage: Any) -> Model:
        return self.small

    def controls(self, base: Model, seed: int, stage: Any) -> dict[str, Any]:
        """Returns no model besides the arms' students."""
        return {}

    # ---------------------------------------------------------------------------------------------- questions

    @functools.cached_property
    def test(self) -> list[Problem]:
        return self.task.problems("test")[: self.settings.test_questions]

    @functools.cached_property
    def _golds(self) -> list[str]:
        return [p.meta["answer"] for p in self.test]

    @functools.cached_property
    def _train(self) -> list[Problem]:
        problems = list(self.task.problems("train"))
        stable_rng(self.task.name, "guided", self.seed).shuffle(problems)
        return problems

    def teacher_problems(self) -> list[Problem]:
        """Questions for the teacher: at most half of the training questions, and none of RL's."""
        # Disjoint, so that RL refines rationales of questions that the student was not distilled on.
        return self._train[: min(self.settings.teacher_questions, max(1, len(self._train) // 2))]

    def rl_problems(self) -> list[Problem]:
        rest = self._train[len(self.teacher_problems()) :]
        line = "config.task: too few training questions for both distillation and RL; give it more data"
        require((len(rest) > 0, line))
        return rest[: self.settings.rl_questions]

    def prompt(self, problem: Problem, style: str, rationale: str = "", *, training: bool = False) -> str:
        """Returns a prompt within its model's limit, and counts the prompts whose context was truncated."""
        limit = self.settings.small_limit if style == "student" else self.settings.large_limit
        frame = multihop.frame_for(style, problem.question, rationale)
        count = functools.partial(self.length, style=style)
        parts = multihop.paragraphs(problem, self.task.context)
        # In training, paragraphs without supporting facts are dropped first; at evaluation these labels are unknown.
        text, is_truncated = multihop.fit(parts, frame, limit, count, keep_gold=training)
        self.prompts_built, self.prompts_truncated = self.prompts_built + 1, self.prompts_truncated + is_truncated
        return text

    def length(self, text: str, style: str) -> int:
        """Returns the tokens of a prompt, EOS included; its words behind an endpoint, whose tokenizer is unknown."""
        if style != "student" and isinstance(self._large_settings, HttpAnswerer):
            return len(text.split())
        model = self.small if style == "student" else self._large.args[0]
        return len(tokenizer_of(model).encode(text)) + 1

    # ----------------------------------------------------------------------------------- distillation and RL

    def teacher_rows(self, seed: int) -> list[dict[str, Any]]:
        """Returns one chain of thought per question, split into rationale and answer; the answer may be None."""
        problems = self.teacher_problems()
        replies = self.explainer.answer([self.prompt(p, "cot", training=True) for p in problems])
        rows = []
        # The student is trained on the rationale alone: the answer remains the large model's part.
        for p, reply in zip(problems, replies):
            rationale, answer = multihop.split_reasoning(reply.text)
            prompt = self.prompt(p, "student", training=True)
            row: dict[str, Any] = {"question": p.id, "prompt": prompt, "rationale": rationale, "answer": answer}
            rows.append(row | {"gold": p.meta["answer"], "type": p.group, "teacher": self.explainer.name})
        return rows

    def keep(self, rows: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
        """Returns rows with a rationale and a correct answer by the rule ("f1": at least half), without duplicates."""
        kept = [r for r in rows if multihop.clean_rationale(r["rationale"])]
        if rule != "none":
            kept = [r for r in kept if task_score(r["answer"] or "", r["gold"], rule) >= 0.5]
        return list({(r["prompt"], r["rationale"]): r for r in kept}.values())

    def to_pairs(self, rows: list[dict[str, Any]]) -> list[Pair]:
        """Returns rows as token ids; a rationale beyond `max_new_tokens` is cut, without EOS."""
        # The cut comes after EOS is appended: a cut rationale must not teach the student to stop there.
        tokenizer, out = tokenizer_of(self.small), []
        for r in rows:
            text = multihop.clean_rationale(r["rationale"])
            text = text if isinstance(self.small.config, EncDecConfig) else f" {text}"
            head, tail = tokenizer.encode_pair(r["prompt"], text)
            out.append(Pair(tuple(head), tuple(tokenizer.ended(tail)[: self.max_new_tokens])))
        return out

    def environment(self, seed: int, prompts: int, arm: GuidedConfig) -> MultiHopEnvironment:
        problems = self.rl_problems()
        line = f"config.train.prompts={prompts} is more than the {len(problems)} questions that RL has; lower it"
        require((prompts <= len(problems), line))
        return MultiHopEnvironment(self, problems, seed, prompts, arm)

    def views(self, problems: Sequence[Problem], rationales: Sequence[str]) -> list[View]:
        """Returns the inputs of the aspects: the question, the whole context of the task's mode, the rationale."""
        mode = self.task.context
        contexts = [" ".join(q.text() for q in multihop.paragraphs(p, mode)) for p in problems]
        return [View(p.question, c, r) for p, c, r in zip(problems, contexts, rationales)]

    # ------------------------------------------------------------------------------------------- measurements

    def _scores(self, answers: Sequence[str], metric: str = "") -> np.ndarray:
        return np.asarray([task_score(a, g, metric or self.settings.metric) for a, g in zip(answers, self._golds)])

    def fixed_arms(self) -> dict[str, np.ndarray]:
        """Returns, per arm without a student, whether each test question is answered correctly, bool [questions]."""
        chains = self.explainer.answer([self.prompt(p, "cot") for p in self.test])
        facts = [" ".join(x.text() for x in multihop.paragraphs(p, "supporting_only")) for p in self.test]
        # An unparsed chain counts as wrong. Supporting sentences stand in for gold rationales, which the data lack.
        found = {
            "own CoT": [multihop.split_reasoning(a.text)[1] or "" for a in chains],
            "standard": [a.text for a in self.answerer.answer([self.prompt(p, "standard") for p in self.test])],
            "supporting sentences": [a.text for a in self.answers_with(facts)],
            "shuffled supporting": [a.text for a in self.answers_with([*facts[1:], facts[0]])],
        }
        # EM and inclusion are 0 or 1; an F1 of one half counts as correct.
        return {name: self._scores(answers) >= 0.5 for name, answers in found.items()}

    def rationales(self, student: Model, n: int = 1, temperature: float = 0.0) -> list[list[Completion]]:
        """Returns n rationales of the student per test question."""
        prompts = [self.prompt(p, "student") for p in self.test]
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "temperature": temperature, "seed": self.seed}
        return generate(student, prompts, n=n, **options)

    def answers_with(self, rationales: Sequence[str]) -> list[Answer]:
        """Returns the large model's answers to the test questions with these rationales."""
        return self.answerer.answer([self.prompt(p, "guided", r) for p, r in zip(self.test, rationales)])

    def measure(self, student: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Returns whether each test question is answered correctly with a greedy rationale, and metrics in percent."""
        self.prompts_built = self.prompts_truncated = 0  # the rate is of this evaluation's prompts
        done = [row[0] for row in self.rationales(student)]
        texts = [c.text or "" for c in done]
        asked = [self.prompt(p, "guided", r) for p, r in zip(self.test, texts)]
        answers = self.answerer.answer(asked)
        read = [self.prompt(p, "student") for p in self.test]
        each = {m: self._scores([a.text for a in answers], m) for m in METRICS}
        quality = {n: [a(v) for v in self.views(self.test, texts)] for n, a in ASPECTS.items()}
        correct = each[self.settings.metric] >= 0.5
        found: dict[str, Any] = {m: percent(x) for m, x in each.items()}
        found |= {f"aspect/{n}": percent(x) for n, x in quality.items()} | {
            "quality": percent(list(quality.values())),
            "coverage": percent([multihop.coverage(p, t) for p, t in zip(self.test, texts)]),
            "bare_answer": percent([bare_answer(t, a.text) for t, a in zip(texts, answers)]),
            "rationale_truncated": percent([not c.stopped for c in done]),
            "student_prompt_tokens": float(np.mean([self.length(x, "student") for x in read])),
            "student_tokens": float(np.mean([len(c.tokens) for c in done])),
            "answerer_prompt_tokens": float(np.mean([self.length(x, "guided") for x in asked])),
            "answerer_tokens": float(np.mean([a.tokens for a in answers])),
            "prompt_truncated": 100.0 * self.prompts_truncated / max(1, self.prompts_built),
        }
        for kind in sorted({p.group for p in self.test}):
            found[f"accuracy/{kind}"] = percent([x for x, p in zip(correct, self.test) if p.group == kind])
        shown = list(zip(self.test, texts, answers, self._golds, correct))[:12]
        found["examples"] = [example(p.question, t, a.text, g, x, [p.group]) for p, t, a, g, x in shown]
        if self.settings.votes:
            found["self_consistency"] = self._self_consistency(student)
        return correct, found

    def costs(self) -> dict[str, dict[str, float]]:
        """Returns, per arm without a student, the large model's tokens per test question."""
        out = {}
        for arm, style, answerer in (("standard", "standard", self.answerer), ("own CoT", "cot", self.explainer)):
            asked = [self.prompt(p, style) for p in self.test]
            # Free: `fixed_arms` asked the same prompts, and the cache answers them.
            written = float(np.mean([a.tokens for a in answerer.answer(asked)]))
            read = float(np.mean([self.length(x, style) for x in asked]))
            out[arm] = {"answerer_prompt_tokens": read, "answerer_tokens": written}
        return out

    def _self_consistency(self, student: Model) -> float:
        n = self.settings.votes
        # The temperature of the self-consistency paper (arXiv 2203.11171).
        rows = self.rationales(student, n, 0.7)
        replies = zip(*(self.answers_with([row[j].text or "" for row in rows]) for j in range(n)))
        # Normalized as for EM: spellings that score alike are one candidate of the vote, and empty ones none.
        chosen = [majority([normalise(a.text) or None for a in each], [a.logprob for a in each]) for each in replies]
        return percent(self._scores([c or "" for c in chosen]) >= 0.5)


@dataclasses.dataclass
class MultiHopEnvironment:
    """RL's prompts, a random subset of its questions per update, and their rewards: a `reinforce.Environment`."""

    task: MultiHop
    problems: list[Problem]
    seed: int
    count: int  # prompts per update
    arm: GuidedConfig

    def _sample(self, update: int) -> list[Problem]:
        # A function of the update: `prompts` and `score` call it apart, and a resumed run repeats it.
        rng = np.random.default_rng([self.seed, update, 3])
        return [self.problems[i] for i in rng.choice(len(self.problems), self.count, replace=False)]

    def prompts(self, update: int) -> list[str]:
        return [self.task.prompt(p, "student", training=True) for p in self._sample(update)]

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> RewardOutput:
        problems, texts = zip(*((p, c.text) for p, row in zip(self._sample(update), responses) for c in row))
        settings, views = self.task.settings, self.task.views(problems, texts)
        used = {name: weight for name, weight in settings.aspects.items() if weight}
        aspects = {f"aspect/{n}": np.asarray([ASPECTS[n](v) for v in views], np.float32) for n in used}
        correct, bare = np.zeros((2, len(views)), np.float32)
        # Without R_acc there is no call of the answerer, the most expensive part of a reward.
        if self.arm.accuracy_weight:
            asked = [self.task.prompt(p, "guided", t, training=True) for p, t in zip(problems, texts)]
            for i, (p, t, answer) in enumerate(zip(problems, texts, self.task.answerer.answer(asked))):
                correct[i] = task_score(answer.text, p.meta["answer"], settings.metric)
                bare[i] = bare_answer(t, answer.text)
        return reward(self.arm, correct, bare, aspects, [*used.values()])
