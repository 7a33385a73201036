"""Program parsers: the Python block of a Markdown fence, the code between [BEGIN] and [DONE], or bare code."""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from typing import NamedTuple

from qstar.tasks.answer_text import first_turn, without_thinking
from qstar.tasks.sandbox import PARSING, global_names

# What is removed or read as a fence, in this order; the characters have no width.
_REPLACED = tuple(
    (re.compile(pattern, re.MULTILINE), new)
    for pattern, new in (
        (r"\r\n", "\n"),
        (r"^([ \t]*)(?:[\u200b-\u200d\u2060\ufeff]|<\|\w+\|>)+", r"\1"),
        (
            r"^[ \t]*<pre\b[^>\n]*>\s*<code\b(?:[^>\n]*?(language-\w+))?[^>\n]*>\n?([^\0]*?)(?:\s*</code>\s*</pre>|\Z)",
            r"```\1\n\2\n```\n",
        ),
    )
)
_OPEN = re.compile(r"^(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)$")
_ONE_LINE = re.compile(r"^\s*```(?:(?:python|py)[0-9]*\s+)?([^`]+)```\s*$", re.IGNORECASE)
_PYTHON = re.compile(
    r"\W*(?:language-|lang\W+)?(?:i?py(?:thon)?(?:[-_ ]?[23](?:\.[0-9]+)?)?|tool_code)(?![\w-])", re.IGNORECASE
)
_FRAMES = (("[BEGIN]", "[DONE]"), ("[PYTHON]", "[/PYTHON]"))  # of MBPP's prompt, of Code Llama
_CODE_LINE = re.compile(r"^([ \t]*)(?:(?:async )?def |class |import |from \S+ import |@\w)|^()\w+ *=[^=]", re.MULTILINE)
_NEXT_TASK = re.compile(
    r"^[^\w\n]*(?:Q|Question|Problem|Task|Exercise|User|Human)[*_\s]*(?:#?\s*[0-9]+)?[*_]*\s*[:.)]"
    r"|\b(?:another|next|new|similar)\s+(?:problem|question|exercise|task)\b|^You are an expert Python programmer",
    re.IGNORECASE | re.MULTILINE,
)
COMPLETE = 5  # the rank of a closed block that defines something
_DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Block(NamedTuple):
    """A fenced block. `python` is None where the fence names no language; `start`, `end` are its lines."""

    code: str
    python: bool | None
    closed: bool
    start: int
    end: int

    def rank(self) -> int:
        """How likely the block is the program: 0 is no program."""
        # A fence of another language may be mislabelled Python; an unclosed one is truncated: complete ones go first.
        tree = _tree(self.code)
        defines = tree is not None and _defines(tree)
        if self.python is False:
            return int(defines)
        if not self.closed:
            return 2 if (self.python and self.code.strip()) or _CODE_LINE.search(self.code) else 0
        if tree is None:
            return 3 if self.python else 0
        return COMPLETE if defines else 4 if is_program(tree) else 0

    def names(self) -> tuple[set[str], set[str]]:
        """The global names that the block binds, and those that it takes from elsewhere."""
        try:
            bound, read = global_names(_at_margin(self.code))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return set(), set()
        # A variable called `list` is no reason to take the built-in one from an example.
        return {name for name in bound if bound[name] or not hasattr(builtins, name)}, set(read) - set(bound)

    def only_runs(self) -> bool:
        """Whether no function or method of the block takes an argument: tests, examples of use, a `main`."""
        tree = _tree(self.code) or ast.Module([], [])
        heads = [node.args for node in ast.walk(tree) if isinstance(node, _DEFINITION[:2])]
        taken = {node.arg for head in heads for node in ast.walk(head) if isinstance(node, ast.arg)}
        return bool(heads) and taken <= {"self", "cls"}


def program_in(text: str) -> str | None:
    """The program of a completion: the last complete block that defines something, else the likeliest, or bare code.

    A block is read with the earlier ones whose names it uses; if it only runs them, they are the program.
    """
    text = first_turn(without_thinking(text))
    for pattern, new in _REPLACED:
        text = pattern.sub(new, text)
    text = _framed(text)
    lines, found = text.split("\n"), blocks(text)
    kept: list[Block] = []
    # Blocks behind a further problem of the model's own hold that problem's program.
    for block in found:
        between = "\n".join(lines[kept[-1].end if kept else 0 : block.start])
        if any(b.rank() > 1 for b in kept) and _NEXT_TASK.search(between):
            break
        kept.append(block)
    for block in reversed(found):
        # Code that ends in a fence, which the prompt has opened, stays.
        lines[block.start : block.end] = re.split("```|~~~", lines[block.start])[:1]
    bare = Block(_bare("\n".join(lines)) or "", None, True, 0, 0)
    if not any(block.rank() for block in kept):
        kept = [bare]
    elif bare.rank() == COMPLETE:
        kept.insert(0, bare)
    best = max(block.rank() for block in kept)
    parts = _joined(kept[: max(i for i, block in enumerate(kept) if block.rank() == best) + 1])
    code = "\n\n".join(_at_margin(part.code).strip("\n") for part in parts) if parts[1:] else parts[0].code
    # Leading spaces stay: they are the first line's indentation.
    return code.rstrip().strip("\n") or None


def _joined(kept: list[Block]) -> list[Block]:
    """The last block behind those whose names it uses, or what it runs; of two that bind a name, the later counts."""
    names, last = [block.names() for block in kept], len(kept) - 1
    while True:
        parts, needed = [last], names[last][1]
        for i in reversed(range(last)):
            bound, read = names[i]
            if needed & bound:
                parts.append(i)
                needed = needed - bound | read
        run = next((i for i in parts[1:] if kept[i].rank() == COMPLETE), None) if kept[last].only_runs() else None
        if run is None:
            return [kept[i] for i in reversed(parts)]
        last = run


def through_program(text: str) -> str | None:
    """The text up to the end of the last closed block that defines something, or None if there is no such block."""
    lines = text.split("\n")
    ends = [b.end for b in blocks(text) if b.closed and b.rank() == COMPLETE]
    return "\n".join(lines[: ends[-1]]) if ends else None


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text, the last one open where the text ends in it."""
    # A block may stand in a quotation, whose marks are no code.
    lines = [re.sub(r"^> ?(?!>)", "", line) for line in text.split("\n")]
    out, at = [], 0
    while at < len(lines):
        if match := _ONE_LINE.match(lines[at]):
            out.append(Block(match[1], None, True, at, at + 1))
        elif (opening := _OPEN.match(lines[at])) and not (opening["fence"][0] == "~" and opening["before"].strip()):
            out.append(_block(lines, at, opening))
        at = out[-1].end if out and out[-1].start == at else at + 1
    return out


def _block(lines: list[str], at: int, opening: re.Match[str]) -> Block:
    fence, info, first = opening["fence"], opening["info"].strip(), at + 1
    if not info and first < len(lines) and _PYTHON.fullmatch(lines[first].strip()):
        info, first = lines[first].strip(), first + 1  # the language on a line of its own
    python = bool(_PYTHON.match(info)) if info.strip("{}. ") else None
    indent = len(opening["before"]) if not opening["before"].strip() else 0
    mark = f"{re.escape(fence[0])}{{{len(fence)},}}"
    close = re.compile(rf"(.*?){mark}(?:[ \t]*|[A-Z][\w']* .*)$|[ \t]*{mark}[ \t]*(?i:python|py)3?[ \t]*$")
    made = []
    for end in range(first, len(lines)):
        # Models also close a fence on the last line of code, write prose behind the closing fence, or open the next one.
        closing = close.match(lines[end])
        if closing is None or (closing[1] or "").strip(" \t").endswith(fence[0]):
            continue
        glued = closing[1]  # code in front of the fence, on its line
        inside = [*lines[first:end], *([glued] if glued and glued.strip() else [])]
        code = "\n".join(line[indent:] if not line[:indent].strip() else line for line in inside)
        made.append(Block(code, python, True, at, end + (glued is not None)))
        # A fence inside a docstring ends no block: the first end is taken at which the code is Python. Other languages
        # cannot be checked: their first end is taken.
        if python is False or _tree(code) is not None:
            return made[-1]
    inside = [line[indent:] if not line[:indent].strip() else line for line in lines[first:]]
    return made[0] if made else Block("\n".join(inside), python, False, at, len(lines))


def syntax_tree(code: str) -> ast.Module | None:
    """The code as a tree, or None if it is not Python."""
    tree = _parsed(code)
    return tree if isinstance(tree, ast.Module) else None


def _tree(code: str) -> ast.Module | None:
    return syntax_tree(code) or syntax_tree(textwrap.dedent(code))


def _defines(tree: ast.Module) -> bool:
    return any(isinstance(node, _DEFINITION) for node in tree.body)


def is_program(tree: ast.Module) -> bool:
    """Whether a tree holds more than names and constants: "Sorry" is Python, too."""
    words = (ast.Name, ast.Constant, ast.Tuple)
    return not all(isinstance(s, ast.Expr) and isinstance(s.value, words) for s in tree.body)


def as_module(code: str) -> str:
    """Code that defines something, moved to the left margin if it is Python only there."""
    tree = _tree(code)
    return _at_margin(code) if tree is not None and _defines(tree) else code


def _at_margin(code: str) -> str:
    return code if syntax_tree(code) else textwrap.dedent(code)


def as_body(code: str) -> str:
    """Code as the body of a function: indented, unless it is a whole program."""
    if is_body(code):
        return code
    code = code.strip("\n")
    if _CODE_LINE.match(code) and not code[:1].isspace():
        tree = syntax_tree(code)
        if tree is None or _defines(tree):
            return code
    for body in ("    " + code, textwrap.indent(code, "    ")):
        if is_body(body):
            return body
    return code


def is_body(code: str) -> bool:
    """Whether code is the body of a function and nothing else."""
    tree = syntax_tree(f"def f():\n{code}\n")
    return tree is not None and len(tree.body) == 1


def normal_program(code: str) -> str:
    """A program without comments, docstrings and layout, to compare programs by what they do."""
    tree = syntax_tree(code)
    if tree is None:
        return code
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, *_DEFINITION)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _parsed(code: str) -> ast.Module | int:
    try:
        with PARSING, warnings.catch_warnings():
            # Models write invalid escapes such as "\d", which warn at every parse.
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except SyntaxError as error:
        return error.lineno or 0
    # Null bytes and deep nesting are the model's, not faults of this process.
    except (ValueError, RecursionError, MemoryError):
        return 0


def _framed(text: str) -> str:
    for begin, end in _FRAMES:
        start, stop = text.find(begin), re.search(rf"^[ \t]*{re.escape(end)}", text, re.MULTILINE)
        if start >= 0 and not (stop and stop.start() < start):
            text = text[start + len(begin) :]
            stop = re.search(rf"{re.escape(end)}[ \t]*$", text, re.MULTILINE)
        text = text[: stop.start()] if stop else text
    return text


def _bare(text: str) -> str | None:
    # A first line "python" or a last one "Done" would be a name.
    text = re.sub(r"\A\s*[A-Za-z]+[0-9]*[^\S\n]*\n|(?<!\\)\n[A-Za-z]+\s*\Z", "", text)
    tree = syntax_tree(text)
    if tree is not None and is_program(tree):
        return text
    starts = list(_CODE_LINE.finditer(text))  # also within quotation marks that stand for a fence
    if not starts:
        tree = syntax_tree(textwrap.dedent(text))
        return text if tree is not None and is_program(tree) else None
    # Code in a list or a quotation is indented as a whole.
    indent = starts[0][1] or ""
    lines = [line.removeprefix(indent) for line in text[starts[0].start() :].split("\n")]
    end = len(lines)
    while end > 0:
        found = _parsed("\n".join(lines[:end]))
        if isinstance(found, ast.Module):
            return "\n".join(lines[:end])
        # The error's line bounds the program, which saves most of one parse per line.
        end = min(end - 1, found - 1) if found else end - 1
    return "\n".join(lines)
