"""`qstar compare`: blind human comparison of rationales."""

from __future__ import annotations

import json

from qstar.errors import require
from qstar.flags import POSITIVE, SEED, Parser, local_folder


def main(argv: list[str]) -> int:
    """qstar compare --a=NAME=FILE --b=NAME=FILE --out=DIR | --out=DIR --votes=FILE"""
    p = Parser(
        "compare",
        "Writes a page that asks which of two rationales is better without telling whose they are; with --votes, counts "
        "what people said.",
        device=False,
        epilog="qstar compare --a=star=runs/x/rat/evaluation/iter_003.jsonl --b=gold=gold.jsonl --out=compare",
    )
    p.flag("--a NAME=FILE", "rationales: JSONL with problem_id, prompt and completion")
    p.flag("--b NAME=FILE", "those they are compared with")
    p.flag("--out DIR", "folder of compare.html and key.json", required=True)
    p.flag("--count N", "questions at most", POSITIVE, 50)
    p.flag("--seed N", "of the choice, the order and the sides", SEED, 0)
    p.switch("--right", "only problems that both got right")
    p.flag("--votes FILE", "votes.jsonl of the page; repeatable", default=[], action="append")
    p.switch("--json", "one JSON object instead of a table")
    a = p.parse_args(argv)
    from rich.console import Console

    from qstar.report.compare import Side, count_votes, write_comparison
    from qstar.train.metrics import show_table

    folder = local_folder("--out", a.out)
    require((not a.votes or not (a.a or a.b), "compare: --votes counts what was asked before; leave --a and --b out"))
    if not a.votes:
        sides = []
        for flag in ("a", "b"):
            name, _, file = (getattr(a, flag) or "").partition("=")
            missing = f"compare: --{flag}=NAME=FILE is missing or incomplete (see qstar compare --help)"
            require((bool(name and file), missing))
            sides.append(Side(name, file))
        print(write_comparison(sides[0], sides[1], folder, count=a.count, seed=a.seed, right=a.right))
        return 0
    found = count_votes(folder, a.votes)
    if a.json:
        print(json.dumps(found))
    else:
        title = f"{found.pop('a')} against {found.pop('b')}: win rate of the first"
        show_table(Console(), title, [found])
    return 0
