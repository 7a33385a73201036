"""The page of an RL run: updates, the logged completions, first and last numbers."""

import base64
import dataclasses
import gzip
import json

import pytest

from qstar.data.sources import write_jsonl
from qstar.report import read
from qstar.report.pages import browser, rl, star

SCRIPT = "<script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    config = {"method": "rl", "name": "x", "seed": 0, "task": {"name": "gsm8k"}, "arms": {"grpo": {}, "rloo": {}}}
    (folder / "config.json").write_text(json.dumps({"format_version": 2, **config}))
    resolved = {"loop": {"rounds": 1}, "arms": {arm: {"train": {"updates": 60}} for arm in ("grpo", "rloo")}}
    (folder / "resolved.json").write_text(json.dumps(resolved))
    rows = []
    for arm in ("grpo", "rloo"):
        for n, accuracy in ((0, 0.1), (1, 0.3)):
            rows.append(
                {"arm": arm, "iteration": n, "stage": "iteration", "step": n, "accuracy": accuracy, "updates": 60 * n}
            )
        for update in range(1, 61):
            rows.append(
                {"arm": arm, "iteration": 0, "stage": "rl", "step": update, "score": update / 60, "kl": update / 100,
                 "ended": 0.75, "groups_without_signal": 0.5, "reward/correct": 0.5, "length": 9.0, "entropy": 0.3}
            )  # fmt: skip
            logged = [
                {"arm": arm, "update": update, "group": i // 2, "sample": i % 2, "prompt": f"Q: {i}\nA:", "completion": SCRIPT,
                 "score": float(i % 2), "advantage": (-1.0, 1.0)[i % 2], "kl": 0.1, "rewards": {"correct": float(i % 2)},
                 "n_tokens": 9, "truncated": i == 3, "answer": None, "gold": "1"}
                for i in range(4)
            ]  # fmt: skip
            write_jsonl(folder / arm / "completions" / f"update_{update:06d}.jsonl", logged)
    write_jsonl(folder / "metrics.jsonl", rows)
    return read.read_run(folder)


def test_completions_of_evenly_spaced_updates_are_on_the_page(run):
    page = star.page(run)
    packed = page.partition('id="completion-data">')[2].partition("<")[0]
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    rows = [dict(zip(data["columns"], row)) for row in data["rows"]]
    assert SCRIPT not in page and {r["completion"] for r in rows} == {SCRIPT}
    updates = sorted({r["update"] for r in rows})
    assert {r["arm"] for r in rows} == {"grpo", "rloo"}
    assert len(updates) == rl.UPDATES and updates[0] == 1 and updates[-1] == 60
    assert (data["files"], data["logged"], len(rows)) == (80, 120, 320)
    assert 'id="completions"' in page and "completion-list" in page


def test_updates_and_not_loops_are_counted(run):
    page = star.page(run)
    words = page.partition("<main")[2].partition('id="config"')[0].lower()
    assert "in 60 updates" in page and "loop" not in words and "groups_without_signal" not in words
    assert "groups without signal" in words


def test_metrics_that_were_not_finite_leave_gaps(run):
    rows = [{**row, "approx_kl": None if row["step"] % 2 else 0.5} for row in run.rows]
    assert any("rollouts' policy" in str(card.title) for card in rl.cards(dataclasses.replace(run, rows=rows)))


def test_the_first_and_the_last_numbers_stand_in_a_table(run):
    head, rows = rl.summary(run)
    assert dict(zip(head, rows[0])) == {
        "arm": "GRPO",
        "updates": "1 → 60",
        "held-out accuracy": "10.0% → 30.0%",
        "score": "0.017 → 1.000",
        "divergence, nats": "0.01 → 0.60",
        "clipped tokens": "–",
        "tokens": "9 → 9",
        "cut off": "25% → 25%",
        "no signal": "50% → 50%",
    }


def test_long_texts_and_many_rows_are_cut(run, monkeypatch):
    monkeypatch.setattr(rl, "COMPLETION_BYTES", 80 * 400)
    assert len(rl.embedded(run)["rows"]) < 320
    prompt, completion = browser.shortened({"prompt": "a" * 9000 + "end", "completion": "a" * 9000})
    assert (
        len(prompt) == browser.LONGEST_TEXT and prompt[-3:] == "end" and completion.endswith("6,000 more characters)")
    )
