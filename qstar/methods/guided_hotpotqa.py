"""LM-Guided CoT on real questions: HotpotQA and 2WikiMultiHopQA, any student, and a large model here or behind HTTP."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qstar.errors import UserError, require, unknown
from qstar.methods.answerer import Answerer, Cached, HttpAnswerer, ModelAnswerer
from qstar.methods.distillation import Pair
from qstar.methods.guided_eval import choices
from qstar.methods.guided_rewards import METRICS, RewardSettings, rationale_scores, task_score
from qstar.methods.reinforce import RewardOutput
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model, encoder_ids, load
from qstar.sample.batching import generate
from qstar.sample.vote import majority
from qstar.tasks import multihop as M
from qstar.tasks.aspects import ASPECTS, View, bare_answer
from qstar.tasks.base import Problem, stable_rng
from qstar.tasks.qa_metrics import answer_score, includes, normalise
from qstar.types import Completion


@dataclasses.dataclass(frozen=True)
class MultiHopSettings:
    """A config's `world` section: the two models, and how many questions each stage has."""

    small: str = ""  # folder of the model that writes rationales: T5 or a decoder
    large: dict = dataclasses.field(default_factory=dict)  # {"path": DIR, "slots": N} or {"url": ..., "model": ...}
    questions: int = 1000  # that the teacher explains
    rl_questions: int = 1000  # others, for RL
    test: int = 500
    small_limit: int = 1024  # tokens of a student's prompt, of which context is dropped
    large_limit: int = 1500  # of the large model's: tokens of a model here, words of one behind HTTP
    max_new_tokens: int = 96  # of a rationale
    cot_tokens: int = 192  # of the teacher's rationale and answer
    answer_tokens: int = 32
    metric: str = "em"  # what counts as right, also for RL: em, f1 or includes
    votes: int = 0  # rationales per test question for self-consistency; 0 = off
    vote_temperature: float = 0.7
    aspects: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(ASPECTS, 1.0))

    def __post_init__(self):
        counts = ("questions", "rl_questions", "test", "small_limit", "large_limit", "max_new_tokens", "cot_tokens")
        require(
            *((getattr(self, n) >= 1, f"{n}={getattr(self, n)} must be at least 1") for n in counts),
            (bool(self.small), "small is not set; name the folder of the model that writes rationales"),
            ("path" in self.large or "url" in self.large, "large has neither path nor url; say who answers"),
            (self.metric in METRICS, f"metric={self.metric!r} is not one of {', '.join(METRICS)}"),
            (self.votes >= 0, f"votes={self.votes} must be 0 (off) or more"),
        )
        for name in self.aspects:
            if name not in ASPECTS:
                raise unknown(f"aspects.{name}", name, ASPECTS)


@dataclasses.dataclass
class MultiHop:
    """Questions, a student's start and the frozen large model: see `guided_cot.GuidedTask`."""

    settings: MultiHopSettings
    task: M.MultiHop
    seed: int
    workdir: Path
    mesh: Any = None
    truncated: int = 0  # prompts that lost a paragraph, of `built`
    built: int = 0

    @property
    def max_new_tokens(self) -> int:
        """Of a rationale."""
        return self.settings.max_new_tokens

    # ------------------------------------------------------------------------------------------------- models

    @functools.cached_property
    def small(self) -> Model:
        """The student before distillation, float32 or as stored."""
        model = load(self.settings.small, mesh=self.mesh)
        no_text = f"config.world.small={self.settings.small}: has no tokenizer files; rationales are text"
        require((model.tokenizer is not None, no_text))
        return model

    @functools.cached_property
    def _large(self) -> Callable[..., Answerer]:
        """Makes an answerer that writes so many tokens."""
        options = dict(self.settings.large)
        if "url" in options:
            return functools.partial(HttpAnswerer, **options)
        extra, slots = options.keys() - {"path", "dtype", "slots"}, options.get("slots")
        require(
            (
                not extra,
                f"config.world.large.{next(iter(extra), '')} is unknown; it has path, dtype, slots, or url, model",
            ),
            (slots is None or slots >= 1, f"config.world.large.slots={slots} must be at least 1"),
        )
        model = load(options["path"], mesh=self.mesh, dtype=options.get("dtype"))
        return functools.partial(ModelAnswerer, model, name=str(options["path"]), slots=slots)

    @functools.cached_property
    def answerer(self) -> Cached:
        """The frozen model as it answers."""
        return Cached(self._large(max_new_tokens=self.settings.answer_tokens), self.workdir / "large" / "answers.jsonl")

    @functools.cached_property
    def explainer(self) -> Cached:
        """The same model as it explains and answers at once: the teacher. A chain may have several lines."""
        large = self._large(max_new_tokens=self.settings.cot_tokens, stop=M.RUN_ON)
        return Cached(large, self.workdir / "large" / "chains.jsonl")

    def train_large(self, stage: Any) -> None:
        """It is trained already. Reads it, so that a fault shows now."""
        _ = self.answerer, self.small

    def gates(self) -> dict[str, float]:
        """Nothing is known in advance of real models."""
        return {}

    def base(self, seed: int, stage: Any) -> Model:
        """The small model as it is."""
        return self.small

    def controls(self, base: Model, seed: int, stage: Any) -> dict[str, Any]:
        """No model beside the arms'."""
        return {}

    # ---------------------------------------------------------------------------------------------- questions

    @functools.cached_property
    def test(self) -> list[Problem]:
        """The test questions."""
        return self.task.problems("test")[: self.settings.test]

    @functools.cached_property
    def _train(self) -> list[Problem]:
        problems = list(self.task.problems("train"))
        stable_rng(self.task.name, "guided", self.seed).shuffle(problems)
        return problems

    def teacher_problems(self) -> list[Problem]:
        """Questions for the teacher: at most half of the training questions, and none of RL's."""
        return self._train[: min(self.settings.questions, max(1, len(self._train) // 2))]

    def rl_problems(self) -> list[Problem]:
        """Questions for RL."""
        rest = self._train[len(self.teacher_problems()) :]
        require(
            (len(rest) > 0, "config.task: too few training questions for both distillation and RL; give it more data")
        )
        return rest[: self.settings.rl_questions]

    def prompt(self, problem: Problem, style: str, rationale: str = "", *, training: bool = False) -> str:
        """Returns a prompt that fits its reader; counts those whose context was cut."""
        limit = self.settings.small_limit if style == "student" else self.settings.large_limit
        frame, count = M.frame_for(style, problem.question, rationale), functools.partial(self.length, style=style)
        text, cut = M.fit(M.paragraphs(problem, self.task.context), frame, limit, count, keep_gold=training)
        self.built, self.truncated = self.built + 1, self.truncated + cut
        return text

    def length(self, text: str, style: str) -> int:
        """Tokens of a prompt for its reader, an end among them; words where the reader is behind HTTP."""
        models = getattr(self._large, "args", ()) if style != "student" else (self.small,)
        if not models or not isinstance(models[0], Model):
            return len(text.split())
        return len(models[0].tokenizer.encode(text)) + 1

    # ------------------------------------------------------------------------------------- teaching and rewards

    def teacher_rows(self, seed: int) -> list[dict[str, Any]]:
        """The large model's chains of thought, one per question, split into rationale and answer; an answer may be None."""
        problems = self.teacher_problems()
        replies = self.explainer.answer([self.prompt(p, "cot", training=True) for p in problems])
        rows = []
        for p, said in zip(problems, replies):
            rationale, answer = M.split_reasoning(said.text)
            row = {"question": p.id, "prompt": self.prompt(p, "student", training=True), "rationale": rationale}
            rows.append(
                row | {"answer": answer, "gold": p.meta["answer"], "type": p.group, "teacher": self.explainer.name}
            )
        return rows

    def kept(self, rows: list[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
        """Rows with a rationale whose answer is right by the rule ("f1": half of it), once each."""
        if rule == "parity":
            raise UserError("filter='parity' belongs to the two-hop world; use em, f1, includes or none")
        right = {
            "none": lambda r: True,
            "em": lambda r: answer_score(r["answer"] or "", r["gold"]).em == 1.0,
            "f1": lambda r: answer_score(r["answer"] or "", r["gold"]).f1 >= 0.5,
            "includes": lambda r: includes(r["answer"] or "", r["gold"]),
        }[rule]
        unique = {(r["prompt"], r["rationale"]): r for r in rows if M.clean_rationale(r["rationale"]) and right(r)}
        return list(unique.values())

    def to_pairs(self, rows: list[dict[str, Any]]) -> list[Pair]:
        """Rows as ids; a rationale that is too long is cut at the limit, without an end."""
        tokenizer, out = self.small.tokenizer, []
        for r in rows:
            text = M.clean_rationale(r["rationale"])
            if isinstance(self.small.config, EncDecConfig):
                head, tail = encoder_ids(self.small, r["prompt"]), tokenizer.encode(text)
            else:
                head, tail = tokenizer.encode_pair(r["prompt"], " " + text)
            out.append(Pair(tuple(head), tuple([*tail, tokenizer.eos_id][: self.max_new_tokens])))
        return out

    def environment(self, seed: int, group: int, prompts: int, recipe: Any) -> MultiHopEnvironment:
        """RL's prompts and rewards."""
        aspects = {k: v for k, v in self.settings.aspects.items() if not (recipe.weak and k == "factuality")}
        reward = RewardSettings(recipe.accuracy, recipe.aspect, aspects, self.settings.metric, recipe.guard)
        problems = self.rl_problems()
        line = f"config.train.prompts={prompts} is more than the {len(problems)} questions that RL has; lower it"
        require((prompts <= len(problems), line))
        return MultiHopEnvironment(self, problems, seed, group, prompts, reward)

    def views(self, problems: Sequence[Problem], rationales: Sequence[str]) -> list[View]:
        """What aspects see: the question, the whole context of the mode, the rationale."""
        mode = self.task.context
        contexts = [" ".join(q.text() for q in M.paragraphs(p, mode)) for p in problems]
        return [View(p.question, c, r) for p, c, r in zip(problems, contexts, rationales)]

    # ------------------------------------------------------------------------------------------- measurements

    def fixed_arms(self) -> dict[str, np.ndarray]:
        """Standard prompting, the large model's own chain, and supporting sentences in the place of a rationale."""
        golds = [p.meta["answer"] for p in self.test]
        own = [
            M.split_reasoning(a.text)[1] or ""
            for a in self.explainer.answer([self.prompt(p, "cot") for p in self.test])
        ]
        facts = [" ".join(x.text() for x in M.paragraphs(p, "supporting_only")) for p in self.test]
        shuffled = [*facts[1:], facts[0]]
        asked = {
            "standard": [self.prompt(p, "standard") for p in self.test],
            "supporting sentences": [self.prompt(p, "guided", r) for p, r in zip(self.test, facts)],
            "shuffled supporting": [self.prompt(p, "guided", r) for p, r in zip(self.test, shuffled)],
        }
        said = {"own CoT": own} | {k: [a.text for a in self.answerer.answer(v)] for k, v in asked.items()}
        return {
            k: np.asarray([task_score(a, g, self.settings.metric) for a, g in zip(v, golds)]) >= 0.5
            for k, v in said.items()
        }

    def rationales(self, student: Model, n: int = 1, temperature: float = 0.0) -> list[list[Completion]]:
        """The student's rationales for the test questions."""
        prompts = [self.prompt(p, "student") for p in self.test]
        return generate(
            student, prompts, max_new_tokens=self.max_new_tokens, temperature=temperature, n=n, seed=self.seed
        )

    def guided(self, rationales: Sequence[str]) -> list[Any]:
        """The large model's answers to the test questions with these rationales."""
        return self.answerer.answer([self.prompt(p, "guided", r) for p, r in zip(self.test, rationales)])

    def measure(self, student: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Whether each test question is answered right; EM, F1, inclusion, coverage, aspects, tokens, cuts."""
        self.built = self.truncated = 0
        done = [row[0] for row in self.rationales(student)]
        texts, golds = [c.text for c in done], [p.meta["answer"] for p in self.test]
        asked = [self.prompt(p, "guided", r) for p, r in zip(self.test, texts)]
        answers = self.answerer.answer(asked)
        read = [self.prompt(p, "student") for p in self.test]
        each = {m: np.asarray([task_score(a.text, g, m) for a, g in zip(answers, golds)]) for m in METRICS}
        quality = {n: [a(v) for v in self.views(self.test, texts)] for n, a in ASPECTS.items()}
        right = each[self.settings.metric] >= 0.5
        found = {m: 100.0 * float(x.mean()) for m, x in each.items()}
        found |= {f"aspect/{n}": 100.0 * float(np.mean(x)) for n, x in quality.items()}
        found |= {
            "quality": 100.0 * float(np.mean(list(quality.values()))),
            "coverage": 100.0 * float(np.mean([M.coverage(p, t) for p, t in zip(self.test, texts)])),
            "bare": 100.0 * float(np.mean([bare_answer(t, a.text) for t, a in zip(texts, answers)])),
            "unended": 100.0 * float(np.mean([not c.stopped for c in done])),
            "student_reads": float(np.mean([self.length(x, "student") for x in read])),
            "student_tokens": float(np.mean([len(c.tokens) for c in done])),
            "answerer_reads": float(np.mean([self.length(x, "guided") for x in asked])),
            "answerer_tokens": float(np.mean([a.tokens for a in answers])),
            "truncated": 100.0 * self.truncated / max(1, self.built),
        }
        for kind in sorted({p.group for p in self.test}):
            found[f"right/{kind}"] = 100.0 * float(np.mean([r for r, p in zip(right, self.test) if p.group == kind]))
        found["examples"] = [
            {"question": p.question, "rationale": t, "answer": a.text, "gold": g, "right": bool(r), "notes": [p.group]}
            for p, t, a, g, r in list(zip(self.test, texts, answers, golds, right))[:12]
        ]
        if self.settings.votes:
            found["self_consistency"] = self._vote(student, golds)
        return right, found

    def costs(self) -> dict[str, dict[str, float]]:
        """Tokens per test question of arms without a student, read and written by the large model."""
        out = {}
        for arm, style, answerer in (("standard", "standard", self.answerer), ("own CoT", "cot", self.explainer)):
            asked = [self.prompt(p, style) for p in self.test]
            wrote = np.mean([a.tokens for a in answerer.answer(asked)])
            read = np.mean([self.length(x, style) for x in asked])
            out[arm] = {"answerer_reads": float(read), "answerer_tokens": float(wrote)}
        return out

    def own_votes(self) -> dict[str, float]:
        """Answerers are greedy: there are no samples of theirs to vote."""
        return {}

    def study(self, student: Model) -> dict[str, float]:
        """Whether the best-rated of several rationales are the most useful ones; needs `votes`."""
        n = self.settings.votes
        if not n:
            return {}
        rows = self.rationales(student, n, 1.0)
        texts = [[row[j].text for row in rows] for j in range(n)]
        golds = [p.meta["answer"] for p in self.test]
        right = [[task_score(a.text, g, self.settings.metric) for a, g in zip(self.guided(t), golds)] for t in texts]
        views = [self.views(self.test, t) for t in texts]
        rated = {
            name: np.asarray([[aspect(v) for v in column] for column in views]).T for name, aspect in ASPECTS.items()
        }
        rated["mean of the aspects"] = np.mean(list(rated.values()), axis=0)
        return {f"choice/{k}": v for k, v in choices(np.asarray(right).T, rated).items()}

    def _vote(self, student: Model, golds: Sequence[str]) -> float:
        """Percent right by the vote of the answers with several sampled rationales; ties by summed log-probability."""
        rows = self.rationales(student, self.settings.votes, self.settings.vote_temperature)
        replies = [self.guided([row[j].text for row in rows]) for j in range(self.settings.votes)]
        chosen = [majority([normalise(a.text) for a in said], [a.logprob for a in said]) for said in zip(*replies)]
        return 100.0 * float(
            np.mean([task_score(c or "", g, self.settings.metric) >= 0.5 for c, g in zip(chosen, golds)])
        )


@dataclasses.dataclass
class MultiHopEnvironment:
    """RL's prompts, shuffled anew for every pass over its questions, and their rewards."""

    world: MultiHop
    problems: list[Problem]
    seed: int
    group: int
    count: int
    reward: RewardSettings

    def _problems(self, update: int) -> list[Problem]:
        chosen = np.random.default_rng([self.seed, update, 3]).choice(len(self.problems), self.count, replace=False)
        return [self.problems[i] for i in chosen]

    def prompts(self, update: int) -> list[str]:
        """See `reinforce.Environment`."""
        return [self.world.prompt(p, "student", training=True) for p in self._problems(update)]

    def score(self, update: int, responses: Sequence[Sequence[Completion]]) -> RewardOutput:
        """See `reinforce.Environment`."""
        pairs = [(p, c.text) for p, row in zip(self._problems(update), responses) for c in row]
        problems, texts = [p for p, _ in pairs], [t for _, t in pairs]
        asked = [self.world.prompt(p, "guided", t, training=True) for p, t in pairs]
        golds = [p.meta["answer"] for p in problems]
        return rationale_scores(self.reward, self.world.views(problems, texts), asked, golds, self.world.answerer)[0]
