"""HumanEval's own solutions, through the tokens of every tokenizer and back, in every template."""

import pytest

from qstar.models.config import preset
from qstar.models.model import Model
from qstar.runs.rollouts import kept_tokens
from qstar.tasks import make_task
from qstar.types import Completion
from tests.text.kinds import KINDS, tokenizer


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "characters"])  # some docstrings hold other letters
@pytest.mark.parametrize("template", ["mbpp", "completion"])
def test_canonical_solutions_are_the_same_text_after_tokens(shared, template, kind):
    task = make_task("humaneval", data=str(shared("data/humaneval/HumanEval.jsonl")), template=template)
    text, problems = tokenizer(kind), task.problems("test")
    model = Model(preset("tiny", vocab_size=text.vocab_size), {}, text)
    for p in problems:
        head, tail = text.encode_pair(task.prompt(p), p.solution)
        written, _, _ = text.finish([*tail, text.eos_id], task.stop, after=head, stopped=True)
        assert written == p.solution
        done = Completion(written, [*tail, text.eos_id], [], [], True)
        assert kept_tokens(model, task.prompt(p), done, task.cut(written)) == done.tokens


@pytest.mark.parametrize("template", ["mbpp", "completion"])
def test_canonical_solutions_pass_their_tests_after_tokens(shared, template):
    task = make_task("humaneval", data=str(shared("data/humaneval/HumanEval.jsonl")), template=template)
    text, problems = tokenizer("stories260k"), task.problems("test")
    pairs = [text.encode_pair(task.prompt(p), p.solution) for p in problems]
    programs = [task.parse(task.cut(text.decode(tail, after=head))) for head, tail in pairs]
    verdicts = task.verdicts(problems, programs)
    assert [p.id for p, v in zip(problems, verdicts) if not v.passed] == [] and len(verdicts) == 164
