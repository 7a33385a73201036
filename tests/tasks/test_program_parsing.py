"""The forms in which instruction-tuned models write programs: one extractor finds the program in each."""

import ast
import json
import textwrap

import pytest
from conftest import shared

from qstar.tasks import make_task
from qstar.tasks.program_parsing import normal_program, program_in

CODE = "def square(x):\n    return x * x"
OTHER = "def cube(x):\n    return x ** 3"
DOCS = 'def square(x):\n    """Squares.\n\n    ```python\n    >>> square(3)\n    ```\n    """\n    return x * x'
INFOS = ["python", "Python", "PYTHON", "python3", "py", "py3", "python 3", "Python 3.11", "{.python}", "{python}"]
INFOS += ["ipython", 'python title="a.py"', "python:a.py", "python linenos=true", "language-python", "tool_code", ""]

FORMS = {
    "prose around": f"Sure! Here it is:\n\n```python\n{CODE}\n```\n\nThis squares.",
    "longer fence": f"````python\n{CODE}\n````\nDone.",
    "no space before an explanation": f"```python\n{CODE}\n```This squares.\n```",
    "closed on the last line of code": f"```python\n{CODE}```\nThis squares.",
    "opened behind prose": f"Here is the code: ```python\n{CODE}\n```",
    "not closed": f"```python\n{CODE}",
    "windows line ends": f"```python\n{CODE}\n```\nDone.".replace("\n", "\r\n"),
    "in a list": "1. The code:\n\n   ```python\n" + "".join(f"   {line}\n" for line in CODE.split("\n")) + "   ```\n",
    "in a quotation": "> ```python\n" + "".join(f"> {line}\n" for line in CODE.split("\n")) + "> ```\n",
    "shell first": f"Install:\n```bash\npip install x\n```\nCode:\n```python\n{CODE}\n```",
    "shell last": f"```python\n{CODE}\n```\nRun it:\n```sh\npython a.py\n```",
    "an example of use behind it": f"```python\n{CODE}\n```\n\nExample usage:\n\n```python\nprint(square(3))\n```\n",
    "its output behind it": f"```python\n{CODE}\n```\nOutput:\n```\n9\n```",
    "a corrected version": f"```python\n{CODE.replace('* x', '+ x')}\n```\nWait, that doubles.\n```python\n{CODE}\n```",
    "a second, cut off": f"```python\n{CODE}\n```\nOr:\n```python\ndef square(x):\n    return pow(",
    "a further problem": f"```python\n{CODE}\n```\n\n### Problem 2: cube a number.\n\n```python\n{OTHER}\n```",
    "the prompt again": f"```python\n{CODE}\n```\n\nYou are an expert Python programmer, and here\n```python\n{OTHER}\n```",
    "another turn": f"```python\n{CODE}\n```<|im_end|>\n<|im_start|>user\nCube.\n```python\n{OTHER}\n```",
    "thinking": f"<think>\n```python\n{OTHER}\n```\n</think>\n```python\n{CODE}\n```",
    "thinking, opened in the prompt": f"Maybe\n```python\n{OTHER}\n```\n</think>\n{CODE}",
    "frame": f"[BEGIN]\n{CODE}\n[DONE]",
    "end of the frame": f"{CODE}\n[DONE]\n\nYou are an expert Python programmer\n[BEGIN]\n{OTHER}\n[DONE]",
    "frame around a fence": f"[BEGIN]\n```python\n{CODE}\n```\n[DONE]",
    "Code Llama's frame": f"[PYTHON]\n{CODE}\n[/PYTHON]\n[TESTS]\nassert square(3) == 9\n[/TESTS]",
    "closed by an opening fence": f"```python\n{CODE}\n```python\nThis squares.",
    "closed by an opening fence, and another": f"```python\n{CODE}\n```python\n```python\nprint(square(3))\n```",
    "opened twice": f"```python\n{OTHER}\n```python\n{CODE}\n```",
    "the language on its own line": f"```\npython\n{CODE}\n```",
    "bare": CODE,
    "bare, prose before": f"Here is the function:\n\n{CODE}",
    "bare, prose behind": f"{CODE}\n\nThis function squares a number.",
    "bare, both": f"Here is the function:\n\n{CODE}\n\nIt's simple.",
    "bare and indented": "The function:\n\n" + "".join(f"    {line}\n" for line in CODE.split("\n")),
    "bare and indented, a word behind": "".join(f"    {line}\n" for line in CODE.split("\n")) + "\nDone\n",
    "bare, a word behind": f"{CODE}\n\nDone",
    "bare, output fenced": f"{CODE}\n\nOutput:\n```\n9\n```",
    "bare, an example of use fenced": f"{CODE}\n\nExample:\n```python\nprint(square(2))\n```",
    "bare, tests fenced": f"{CODE}\n```python\ndef test():\n    assert square(2) == 5\n\ntest()\n```",
    "bare, cut off after a fence": f"{CODE}\n```python\n",
    "bare, cut off within a fence": f"{CODE}\n```python\nprint(squ",
    "the fence opened by the prompt": f"{CODE}```\n\nExample:\n```python\nprint(square(2))\n```",
    "tests behind it": f"```python\n{CODE}\n```\n```python\nimport pytest\ndef test_square():\n    assert square(2) == 4\n```",
    "unit tests": f"```python\n{CODE}\n```\n```python\nimport unittest\nclass T(unittest.TestCase):\n"
    "    def test(self):\n        self.assertEqual(square(2), 4)\nunittest.main()\n```",
    "a main and its tests": f"```python\n{CODE}\n```\n```python\ndef main():\n    print(square(int(input())))\n```\n"
    "```python\ndef test_main():\n    main()\n```",
    "fence of quotation marks": f"'''python\n{CODE}\n'''",
    "fence of quotation marks, prose around": f"Code:\n'''python\n{CODE}\n'''\nDone.",
    "HTML": f'<pre><code class="language-python">{CODE}\n</code></pre>\nThis squares.',
    "HTML, on lines of their own": f"<pre>\n<code>\n{CODE}\n</code>\n</pre>",
    "HTML, other languages": f'<pre><code>{CODE}</code></pre>\n<pre><code class="language-sh">python a.py</code></pre>',
    "HTML, not closed": f"<pre><code>{CODE}",
    "a token in front": f"<|python_tag|>{CODE}",
    "a token behind": f"```python\n{CODE}\n```<|eom_id|>",
    "the language in front": f"python\n{CODE}",
    "marks of no width": f"\ufeff\u200b{CODE}",
    "marks of no width in a fence": f"\ufeff```python\n\u200b{CODE}\n\u200b```",
}


@pytest.mark.parametrize("form", FORMS)
def test_the_program_is_found_in_every_form(form):
    assert program_in(FORMS[form]) == CODE


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("fence", ["```", "~~~"])
def test_every_fence_and_info_string_of_python_counts(fence, info):
    text = f"Text.\n{fence}{info}\n{CODE}\n{fence}\nText."
    assert program_in(text) == CODE == program_in(text.replace(f"{fence}{info}", f"{fence} {info}"))


def test_of_several_blocks_the_last_counts():
    assert program_in(f"```python\n{CODE}\n```\nor\n```python\n{OTHER}\n```") == OTHER
    assert program_in(f"```python\n{CODE}\n```\nor\n```java\nint cube(int x) {{}}\n```") == CODE


HELP, POWER = "def helper(x):\n    return x", "def square(x):\n    return helper(x) ** 2"
LIST = "list, n = [1, 2], 3\nprint(n)"


@pytest.mark.parametrize(
    "parts, used",
    [
        ([HELP, POWER], (0, 1)),
        (["import math", "def square(x):\n    return int(math.pow(x, 2))"], (0, 1)),
        (["  from math import pow as power\n", HELP, "def square(x):\n    return power(helper(x), 2)"], (0, 1, 2)),
        (["two = input()", HELP, POWER], (1, 2)),
        (["ONE = 1", "def helper(x):\n    return x * ONE", POWER], (0, 1, 2)),
        ([HELP.replace("return x", "return 0"), HELP, POWER], (1, 2)),  # a corrected helper
        ([HELP, POWER, "def main():\n    print(square(2))"], (0, 1)),
        ([HELP, POWER, "print(square(2))"], (0, 1)),
        (["class A:\n    one = 1", "class B(A):\n    pass"], (0, 1)),
        ([CODE, OTHER, "def test():\n    assert cube(square(2)) == 64"], (1,)),
        ([CODE, "def test_square(x):\n    return x > 2"], (1,)),
        ([CODE, "def square():\n    return 9"], (1,)),
        ([LIST, "def square(n):\n    return list([n])[0] ** 2"], (1,)),
        (["def sum(x):\n    return x * x", "def square(x):\n    return sum(x)"], (0, 1)),
        (["x = 3", "print(x * x)"], (0, 1)),
        (["x = 3", "print(x * (x"], (0,)),
        ([HELP, "def square(x, x):\n    return helper(x)"], (1,)),
    ],
)
def test_a_block_is_read_with_the_earlier_ones_that_it_uses(parts, used):
    assert program_in("\nand\n".join(f"```python\n{part}\n```" for part in parts)) == "\n\n".join(
        textwrap.dedent(parts[i]).strip("\n") for i in used
    )


def test_fenced_code_is_read_with_bare_code_and_many_blocks_in_time():
    assert program_in("f = lambda x: x\n```python\n") == "f = lambda x: x"
    assert program_in(f"{HELP}\n```python\n{POWER}\n```") == f"{HELP}\n\n{POWER}"
    chain = [f"def f{i}():\n    return f{i - 1}()" for i in range(1500)]
    assert program_in("".join(f"```python\n{code}\n```\n" for code in chain)) == chain[0]
    assert "<pre>" in program_in("```python\ndef f(s):\n    return '<pre><code>' + s + '</code></pre>'\n```")


@pytest.mark.parametrize(
    "text", ["", "I cannot do that.", "Sorry", "```bash\npip install x\n```", "<think>\n" + CODE, "[DONE]", "python\n"]
)
def test_where_there_is_no_program_none_is_found(text):
    assert program_in(text) is None


def test_a_fence_within_a_docstring_ends_no_block_and_broken_code_stays_as_it_is():
    assert program_in(f"```python\n{DOCS}\n```\nDone.") == DOCS
    assert program_in("```python\ndef f(:\n    return\n```\nDone.") == "def f(:\n    return"
    assert program_in("def f(:\n    return") == "def f(:\n    return"
    assert program_in("```python\nx = '\\d'\n```") == "x = '\\d'"
    assert program_in("(" * 100_000) is None


@pytest.fixture(scope="module")
def solutions():
    """(template, task, problem) of HumanEval's 164 problems in both templates."""
    out = []
    for template in ("mbpp", "completion"):
        task = make_task("humaneval", data=str(shared("data/humaneval/HumanEval.jsonl")), template=template)
        out += [(template, task, p) for p in task.problems("test")]
    return out


def test_published_solutions_are_found_whole_in_every_frame(solutions):
    mbpp = make_task("mbpp", data=str(shared("data/mbpp/mbpp.jsonl")))
    wholes = [(mbpp, p.solution) for s in ("train", "val", "test", "few_shot") for p in mbpp.every(s)]
    wholes += [(task, task.solution(p)) for template, task, p in solutions if template == "mbpp"]
    for task, code in wholes:
        code = code.rstrip()
        for text in (code, f"Sure:\n```python\n{code}\n```\nDone.", f"~~~py\n{code}\n~~~", f"[BEGIN]\n{code}\n[DONE]"):
            assert task.parse(text) == code.strip("\n") and task.parse(task.cut(text)) == task.parse(text)


def test_the_completion_template_reads_bodies_and_whole_functions(solutions):
    for _, task, p in (s for s in solutions if s[0] == "completion"):
        body = task.solution(p).rstrip()
        assert task.parse(body) == body
        assert task.parse(f"{body}\n\ndef other():\n    pass") == body
        assert task.parse(f"{body}\n```\n\nThis is how.\n```python\n{OTHER}\n```") == body
        assert task.parse(f"Here is the body:\n```python\n{body}\n```\nDone.") == body.strip("\n")
        whole = p.question + body
        for text in (
            f"Sure!\n\n```python\n{whole}\n```\nDone.",
            f"[BEGIN]\n{whole}\n[DONE]",
            f"<think>Hm.</think>\n```py\n{whole}\n```",
        ):
            assert task.parse(text) == whole.strip("\n") == task.parse(task.cut(text))


def test_whole_functions_pass_the_tests_of_the_completion_template(solutions):
    chosen = [(task, p) for template, task, p in solutions if template == "completion"][:20]
    task = chosen[0][0]
    texts = [f"Sure!\n```Python3\n{p.question}{task.solution(p)}\n```\nDone." for _, p in chosen]
    assert all(task.judged([p for _, p in chosen], [task.parse(t) for t in texts]))


@pytest.mark.parametrize(
    "completion, body",
    [
        ("    return xs\n\nThis returns the list.", "    return xs"),
        ("return xs", "    return xs"),
        ("for x in xs:\n        pass\n    return xs", "    for x in xs:\n        pass\n    return xs"),
        ("```\n    return xs\n```", "    return xs"),
        ("```python\nys = xs\nreturn ys\n```", "    ys = xs\n    return ys"),
        ("\n    return xs\n```\nThat is all.", "\n    return xs"),
    ],
)
def test_bodies_that_lost_their_indentation(solutions, completion, body):
    task = solutions[-1][1]
    assert task.parse(completion) == body == task.parse(task.cut(completion))


def test_mbpp_reads_the_sanitized_layout(tmp_path):
    row = {"task_id": 11, "prompt": "Write f.", "code": "def f(): return 2", "test_imports": ["import math"],
           "test_list": ["assert f() == math.floor(2.5)"], "source_file": "x"}  # fmt: skip
    path = tmp_path / "sanitized.json"
    path.write_text(json.dumps([row]))
    task = make_task("mbpp", data=str(path), shots=[])
    (problem,) = task.problems("test")
    assert task.prompt(problem).startswith("You are an expert Python programmer, and here is your task: Write f. ")
    assert task.correct(problem, problem.solution) and not task.correct(problem, "def f(): return 3")
    for change, what in (
        ({"prompt": None}, "neither field 'text' nor"),
        ({"test_imports": "import math"}, "'test_imports'"),
    ):
        path.write_text(json.dumps([{**row, **change}]))
        with pytest.raises(Exception, match=what):
            make_task("mbpp", data=str(path)).problems("test")


def test_a_program_that_is_indented_within_its_fence():
    task = make_task("mbpp", data=str(shared("data/mbpp/mbpp.jsonl")))
    assert task.parse("```\n" + "".join(f"    {line}\n" for line in CODE.split("\n")) + "```\n") == CODE


def test_programs_are_compared_without_comments_and_layout():
    same = [CODE, CODE.replace("* x", "*x  # twice"), 'def square(x):\n  """Squares."""\n  return (x * x)']
    assert len({normal_program(code) for code in same}) == 1 != len({normal_program(c) for c in (CODE, OTHER)})
    assert normal_program("def f(:") == "def f(:"
    assert ast.parse(normal_program('def f():\n    """Nothing."""'))
