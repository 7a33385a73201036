"""The page of a run on rows of one's own (`sft`, `dpo`, `distil`): losses, held-out loss, completions before and after."""

from __future__ import annotations

from typing import Any

from qstar.data.sources import read_jsonl
from qstar.report import charts, render, stats
from qstar.report.charts import Card
from qstar.report.read import Run, read_dict

METHODS = ("sft", "dpo", "distil")
HELD_OUT = {"loss": "Held-out loss", "accuracy": "Held-out preferences of which the chosen completion gained more"}


def page(run: Run) -> str:
    """The page as text."""
    results = {arm.name: read_dict(run.folder / arm.name / "results.json") for arm in run.arms}
    examples = {}
    for arm in run.arms:
        path = run.folder / arm.name / "examples.jsonl"
        examples[arm.name] = read_jsonl(path) if path.is_file() else []
    return render.page(
        "pairs.html.j2",
        run=run,
        results=results,
        examples=examples,
        held_out_cards=[card for key, title in HELD_OUT.items() if (card := _held_out(run, key, title))],
        training_cards=[card for card in [_training(run)] if card],
        headline=lambda run, _: headline(run.method, results),
    )


def _training(run: Run) -> Card | None:
    stage = "dpo" if run.method == "dpo" else "train"
    named = [(stats.arm_label(run, arm), stats.losses(arm.stage(stage))) for arm in run.arms]
    return charts.series_card("Training loss", named, x_label="updates", y_format="{:.3g}".format)


def _held_out(run: Run, key: str, title: str) -> Card | None:
    named = []
    for arm in run.arms:
        rows = [row for row in arm.stage("heldout") if row.get(key) is not None]
        named.append((stats.arm_label(run, arm), [[row["step"] for row in rows], [row[key] for row in rows]]))
    return charts.series_card(title, named, marks=True, x_label="updates", y_format="{:.3g}".format)


def headline(method: str, results: dict[str, dict[str, Any]]) -> str:
    """The result in a sentence: the held-out loss before and after training, of every arm."""
    what = "loss of held-out preferences" if method == "dpo" else "loss per token of held-out completions"
    found = []
    for name, done in results.items():
        if "held_out_loss_after" in done:
            change = f"went from {done['held_out_loss_before']:.3f} to {done['held_out_loss_after']:.3f}"
            found.append(f"{name}: " * (len(results) > 1) + f"{change} in {stats.count(done['steps'], 'update')}")
    if found:
        return f"The {what} {'; '.join(found)}."
    if any(results.values()):
        return "Trained; no rows were held out, so that nothing is known of other text than the training rows."
    return "No results yet: this run has not trained a model."
