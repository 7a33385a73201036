"""The page of a LM-Guided CoT run: who guided the large model how well, what the filter kept, what RL did, what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qstar.report import appendix, shell
from qstar.report.markup import Safe, table, tag
from qstar.report.pieces import details, note, section
from qstar.report.reinforce import reinforce_section
from qstar.report.run import read_config, read_dict
from qstar.train import metrics

SHOWN = 12  # rationales per arm
COLUMNS = {"quality": "aspects", "gold_chain": "gold chain", "first_hop": "first hop", "em": "EM", "f1": "F1",
           "includes": "inclusion", "coverage": "coverage"}  # fmt: skip
GATES = (
    "Checked on the large model before any student is trained: it must read rationales, but neither need nor obey them."
)


@dataclass(frozen=True)
class GuidedRun:
    """All that the page tells. `name`, `config`, `environment` and `gates` are as in `report.run.Run`."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    resolved: Mapping[str, Any]
    gates: Mapping[str, Any]
    fixed: Mapping[str, list[int]]  # arms without a student: whether each question is answered right
    arms: Mapping[str, list[Mapping[str, Any]]]  # arm -> an evaluation per student
    buffers: Mapping[str, list[Mapping[str, Any]]]  # arm -> what its filter kept, per student
    results: Mapping[str, Any]
    costs: Mapping[str, Mapping[str, float]]
    votes: Mapping[str, float]
    rows: list[Mapping[str, Any]] = field(default_factory=list)  # metrics


def read_guided(folder: str | Path) -> GuidedRun:
    """Reads a run's folder, which may still be written to.

    Raises:
      UserError: the folder is missing or not a run's, or one of its files is broken.
    """
    folder, config = read_config(folder)
    students = sorted(p for p in folder.glob("student_*") if p.is_dir())
    evaluated = [(p.parent.name, read_dict(p)) for s in students for p in sorted(s.glob("*/evaluation.json"))]
    kept = [(p.parent.name, read_dict(p)) for s in students for p in sorted(s.glob("*/buffer.json"))]
    order = [n for n in config.get("arms") or () if any(n == name for name, _ in evaluated)]
    names = dict.fromkeys([*(name for name, _ in evaluated if name not in order), *order])
    large = folder / "large"
    return GuidedRun(
        folder=folder,
        name=str(config.get("name") or folder.resolve().name),
        config=config,
        environment=read_dict(folder / "environment.json"),
        resolved=read_dict(folder / "resolved.json"),
        gates=read_dict(large / "gates.json"),
        fixed=read_dict(large / "fixed_arms.json"),
        arms={n: [found for name, found in evaluated if name == n] for n in names},
        buffers={n: [found for name, found in kept if name == n] for n in names if any(n == name for name, _ in kept)},
        results=read_dict(folder / "results.json"),
        costs=read_dict(large / "costs.json"),
        votes=read_dict(large / "votes.json"),
        rows=metrics.read(folder),
    )


def page(run: GuidedRun) -> str:
    """The whole page as text."""
    parts = [
        arms_section(run),
        filter_section(run),
        reinforce_section(run.rows),
        study_section(run),
        smuggling_section(run),
        cost_section(run),
        rationale_section(run),
        appendix.gates_section(run, GATES),
        appendix.config_section(run),
    ]
    header = [tag("h1", f"{run.name} · LM-Guided CoT"), tag("p", headline(run), class_="headline")]
    header += [appendix.provenance(run.environment), _steps(run)]
    if not run.results:
        unfinished = (
            "This run is not finished: it is still going on, or was interrupted. Make the report again to see more."
        )
        header.append(tag("div", tag("p", tag("b", unfinished)), class_="notice"))
    return shell.document(run.name, header, parts)


def headline(run: GuidedRun) -> str:
    """The result in a sentence or two: of distillation on what an exact filter keeps, and of RL from there."""
    recipes = {n: r for n, r in (run.config.get("arms") or {}).items() if n in run.arms}
    distilled = [n for n, r in recipes.items() if not r.get("rl")]
    if not distilled or "standard" not in run.fixed:
        return "Nothing is measured yet."
    fixed = {n: _mean([x]) for n, x in run.fixed.items()}
    first = next((n for n in distilled if recipes[n].get("filter") == "em"), distilled[0])
    refined = next((n for n, r in recipes.items() if r.get("start") == first), None)
    text = f"Guided by {first}, the frozen large model answers {accuracy(run, first):.1f}% right"
    if refined:
        text += f", by {refined} {accuracy(run, refined):.1f}%"
    text += f"; asked alone {fixed['standard']:.1f}%, with a chain of its own {fixed.get('own CoT', 0):.1f}%"
    if "gold rationale" in fixed:
        text += f", with the gold rationale {fixed['gold rationale']:.1f}%"
    count, students = len(next(iter(run.fixed.values()))), len(run.arms[first])
    return f"{text}. {count:,} questions, {students} student{'s' if students > 1 else ''}."


def accuracy(run: GuidedRun, arm: str) -> float:
    """Percent right, the mean over students."""
    return sum(found["accuracy"] for found in run.arms[arm]) / len(run.arms[arm])


def _mean(rows: list[list[int]]) -> float:
    return 100.0 * sum(map(sum, rows)) / max(1, sum(map(len, rows)))


def _steps(run: GuidedRun) -> Safe:
    kept = next((b[0] for b in run.buffers.values() if b[0].get("filter") == "em"), None)
    text = f"{kept['kept']:,} of {kept['rows']:,} rationales kept by exact match" if kept else ""
    steps = (
        (
            "Distil",
            "The large model explains and answers; where its answer is right, a small model learns the explanation.",
            text,
        ),
        (
            "Refine",
            "The small model is paid for what its rationale is like, and for the large model being right with it.",
            "",
        ),
        ("Answer", "The small model writes the rationale, the large one answers. The large one is never trained.", ""),
    )
    items = (
        tag("li", tag("b", name), tag("p", text), tag("p", facts, class_="soft") if facts else None)
        for name, text, facts in steps
    )
    return tag("ol", *items, class_="steps")


def arms_section(run: GuidedRun) -> Safe | None:
    """Percent right per arm, and the paired differences."""
    if not run.fixed and not run.arms:
        return None
    used = [k for k in COLUMNS if any(k in found for each in run.arms.values() for found in each)]
    rows = [[name, f"{_mean([x]):.1f}", "", *("" for _ in used)] for name, x in run.fixed.items()]
    for name, each in run.arms.items():
        students = " / ".join(f"{found['accuracy']:.1f}" for found in each) if len(each) > 1 else ""
        rows.append([tag("b", name), f"{accuracy(run, name):.1f}", students, *(_number(each, k) for k in used)])
    parts: list[Any] = [table(["arm", "right %", "students", *(COLUMNS[k] for k in used)], rows)]
    found = run.results.get("differences") or []
    if found:
        shown = [
            [f"{d['from']} → {d['to']}", f"{d['difference']:+.1f}", f"{d['low']:+.1f} to {d['high']:+.1f}", _verdict(d)]
            for d in found
        ]
        parts += [tag("h3", "Paired differences, points"), table(["from → to", "difference", "95%", ""], shown)]
    about = (
        "All arms answer the same questions; intervals are bootstrapped over questions and know nothing of other seeds."
    )
    return section("arms", "Who guides best", note(about), *parts)


def _verdict(d: Mapping[str, float]) -> Safe:
    word, kind = ("better", "ok") if d["low"] > 0 else ("worse", "bad") if d["high"] < 0 else ("not shown", "open")
    return tag("span", word, class_=f"chip {kind}")


def _number(each: list[Mapping[str, Any]], key: str, digits: int = 1) -> str:
    values = [found[key] for found in each if found.get(key) is not None]
    return f"{sum(values) / len(values):.{digits}f}" if values else "–"


def filter_section(run: GuidedRun) -> Safe | None:
    """How many of the teacher's rationales each filter kept, by type of question."""
    if not run.buffers:
        return None
    kinds = sorted({k for each in run.buffers.values() for b in each for k in b if k.startswith("keep_rate/")})
    rows = []
    for name, each in run.buffers.items():
        counts = [_number(each, k, 0) for k in ("kept", "rows")]
        rates = [f"{100 * sum(b.get(k, 0) for b in each) / len(each):.0f}%" for k in ("keep_rate", *kinds)]
        rows.append([tag("b", name), str(each[0].get("filter", "")), *counts, *rates])
    head = ["arm", "filter", "kept", "of", "rate", *(k.partition("/")[2] for k in kinds)]
    about = (
        "A filter that keeps nothing of a type teaches nothing about it; one that keeps everything teaches the errors."
    )
    return section("filter", "What the filter kept", note(about), table(head, rows))


def study_section(run: GuidedRun) -> Safe | None:
    """Votes, the best-rated rationales beside the most useful ones, leaks; for the arms of `studied`."""
    studies = run.results.get("studies") or {}
    if not studies:
        return None
    names = list(studies)
    keys = list(dict.fromkeys(k for s in studies.values() for k in s))
    groups = {
        "Self-consistency": [k for k in keys if "/" not in k],
        "Choosing one of several rationales": [k for k in keys if k.startswith("choice/")],
        "What the answerer takes from a rationale": [k for k in keys if k.startswith("leak/")],
    }
    parts: list[Any] = []
    for title, chosen in groups.items():
        rows = [
            [k.partition("/")[2] or k.replace("_", " "), *(_told(studies[n].get(k), k) for n in names)] for k in chosen
        ]
        if title == "Self-consistency" and run.votes:
            parts.append(note(f"The large model's own chains: {run.votes['sampled']:.1f}% of sampled ones are right, "
                              f"{run.votes['self_consistency']:.1f}% by their vote."))  # fmt: skip
        if rows:
            parts += [tag("h3", title), table(["% right", *names], rows)]
    about = (
        "“best/…” takes, of several sampled rationales per question, the one that a rating likes best; “oracle” the one with "
        "which the answer is right, if any. Where best is far below oracle, the best-rated are not the most useful."
    )
    return section("study", "Beyond accuracy", note(about), *parts)


def _told(value: float | None, key: str) -> str:
    return "–" if value is None else f"{value:.2f}" if "correlation" in key else f"{value:.1f}"


def smuggling_section(run: GuidedRun) -> Safe | None:
    """Rationales that carry the answer without the reasoning, and what they are paid."""
    rows = []
    for name, each in run.arms.items():
        shares = [_number(each, k) for k in ("smuggled", "bare", "shuffled")]
        if any(s != "–" for s in shares):
            rows.append([tag("b", name), f"{accuracy(run, name):.1f}", *shares])
    if not rows:
        return None
    paid = [
        [n, f"{_mean([run.fixed[n]]):.1f}"]
        for n in ("answer alone", "answer in untruths", "look-alike", "shuffled gold")
        if n in run.fixed
    ]
    parts = [
        table(
            ["arm", "right %", "answer without the gold chain %", "bare answers %", "another question's rationale %"],
            rows,
        )
    ]
    if paid:
        parts += [
            tag("h3", "What the large model makes of rationales that deserve nothing"),
            table(["rationale", "right %"], paid),
        ]
    about = (
        "A policy that is paid for the large model's right answers can learn to hand the answer over instead of reasons. "
        "The guard pays nothing for rationales that are nothing but the answer; here is how often they occur."
    )
    return section("smuggling", "Answer smuggling", note(about), *parts)


def cost_section(run: GuidedRun) -> Safe | None:
    """Tokens per question by each model."""
    keys = ("student_reads", "student_tokens", "answerer_reads", "answerer_tokens")
    rows = [[name, *(_number([cost], k) for k in keys)] for name, cost in run.costs.items()]
    rows += [[tag("b", n), *(_number(each, k) for k in keys)] for n, each in run.arms.items() if keys[2] in each[0]]
    if not rows:
        return None
    head = ["arm", "small model reads", "writes", "large model reads", "writes"]
    about = (
        "Tokens per test question; of a model behind HTTP words are counted where it reads, what it tells where it "
        "writes. Reading takes one pass, writing one per token."
    )
    return section("cost", "What an answer costs", note(about), table(head, rows))


def rationale_section(run: GuidedRun) -> Safe | None:
    """Some rationales of each arm, with what was answered and the verdict."""
    parts = []
    for name, each in run.arms.items():
        examples = [e for found in each for e in found.get("examples", ())][:SHOWN]
        rows = []
        for e in examples:
            kind = "ok" if e["right"] else "bad"
            chip = tag("span", "right" if e["right"] else "wrong", class_=f"chip {kind}")
            more = tag("small", " ".join(str(x) for x in e.get("notes", ())))
            rows.append([e["question"], e["rationale"], e["answer"], e["gold"], tag("span", chip, " ", more)])
        if rows:
            parts.append(
                details(
                    f"{name} · {accuracy(run, name):.1f}% right",
                    table(["question", "rationale", "answer", "gold", ""], rows),
                )
            )
    if not parts:
        return None
    about = (
        "The first test questions. In the generated world capitals are entities and r1 to r6 relations: x r1 r2 asks for "
        "the r2 of the r1 of x."
    )
    return section("rationales", "Read the rationales", note(about), *parts)
