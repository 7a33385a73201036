"""A tiny STaR run whose sampler is a script: what the loop does with attempts, whoever made them."""

from qstar.methods import star
from qstar.methods.answerer import Answer
from qstar.runs import context as run_context
from qstar.runs.context import Arm, RunContext
from qstar.runs.settings import arms_from
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.tokenizer import char_tokenizer
from qstar.types import Rollout


class FunctionAnswerer:
    """Answers by a function from prompts to texts."""

    def __init__(self, function, name="function"):
        self.function, self.name = function, name

    def answer(self, prompts):
        return [Answer(text.strip(), 0.0, 0) for text in self.function(prompts)]


class Silent:
    """A console that keeps what it is told."""

    is_terminal = False

    def __init__(self):
        from rich.console import Console

        self.inner, self.lines = Console(quiet=True), []

    def print(self, *args, **kwargs):
        self.lines.append(" ".join(map(str, args)))

    def __getattr__(self, name):
        return getattr(self.inner, name)


def config(**sections):
    """The smoke config of sums, with one layer; sections are updated, `loop` and `arms` replaced."""
    from configs.star_arithmetic import get_config

    made = get_config("smoke")
    made.model.update(hidden_size=16, num_layers=1, num_heads=2)
    made.task.update(pool={"1": 10, "2": 4}, seeds={"1": (4, 6), "2": (0, 4)}, eval_per_length=6)
    made.base.update(steps=2, batch_size=4)
    made.train.update(batch_size=4, lr=1e-2)
    made.loop = {"n_iters": 2, "steps": "lin:2:0"}
    made.arms = {"star": {"preset": "star"}}
    for name, values in sections.items():
        if name in ("loop", "arms"):
            made[name] = values
        elif isinstance(values, dict):
            made[name].update(values)
        else:
            made[name] = values
    return made


def context(tmp_path, **sections):
    """A RunContext that needs no model: the character tokenizer stands in it already."""
    ctx = RunContext.make(config(**sections), tmp_path, Silent())
    ctx.tokenizer = char_tokenizer(ALPHABET, pad=PAD, eos=EOS)
    return ctx


def arm_of(ctx, name="star"):
    """The arm and its settings."""
    return Arm(ctx, name), arms_from(star.VariantConfig, vars(ctx.settings), "loop", star.PRESETS)[name]


def rollout(task, problem, completion, *, hinted=False, iteration=1, sample=0, truncated=False):
    """A scored attempt, as `rollouts.sample_rollouts` makes it."""
    answer = task.parse(completion)
    return Rollout(
        problem_id=problem.id,
        iteration=iteration,
        sample=sample,
        hinted=hinted,
        group=problem.group,
        prompt=task.prompt(problem, hint=hinted),
        completion=completion,
        answer=answer,
        gold=problem.gold,
        correct=not truncated and task.correct(problem, answer),
        verdict="",
        reason="",
        truncated=truncated,
        valid=task.audit(problem, completion),
        logprob=-1.0,
        n_tokens=len(completion) + 1,
    )


def script(monkeypatch, write, evaluate=None):
    """Replaces sampling: `write(problem, hinted, n)` is what loop n's model answers (None: nonsense).

    Returns the list of (stage, hinted, n, problem ids) that were asked for.
    """
    asked = []

    def attempt(model, task, problems, settings, *, stage, k=1, hinted=False, iteration=0, **_):
        asked.append((stage, hinted, iteration, [p.id for p in problems]))
        say = write if stage in ("sample", "rationalise") else evaluate or (lambda *_: None)
        texts = [(p, j, say(p, hinted, iteration)) for p in problems for j in range(k)]
        return [
            rollout(task, p, "#" if text is None else text, hinted=hinted, iteration=iteration, sample=j)
            for p, j, text in texts
        ]

    monkeypatch.setattr(star, "sample_rollouts", attempt)
    monkeypatch.setattr(run_context, "sample_rollouts", attempt)
    return asked
