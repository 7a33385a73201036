"""The page of a Quiet-STaR run states what its files hold, and its viewer holds every thought."""

import base64
import gzip
import json
import random
import re
import shutil
import subprocess

import pytest

from qstar.data.sources import read_jsonl, write_jsonl
from qstar.errors import UserError
from qstar.report import pages, render, stats, thoughts
from qstar.report.read import read_run
from tests.report.quiet_synthetic import ACCURACY, SCRIPT, STEPS, THINK, write_quiet_run
from tests.report.test_report import Page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_quiet_run(tmp_path_factory.mktemp("runs") / "quiet")


@pytest.fixture(scope="module")
def page(folder):
    return Page(pages.write_report(folder))


def block(page, number):
    """What the viewer unpacks of a block, its strings put back."""
    data = json.loads(gzip.decompress(base64.b64decode(page.scripts[f"thoughts-{number}"])))
    return data, data["vocab"]


def test_headline_is_the_main_arm_with_and_without_its_thoughts(folder, page):
    told = render.headline(read_run(folder))
    assert told == (
        "With thoughts, accuracy on hard tokens is 96.7% (95.4–98.0%, 95% interval) after 250 steps, "
        "and 10.0% without them; the other 3 arms ended at 10.0% to 14.8%."
    )
    assert told in page.text


def test_main_table_equals_the_last_evaluation_of_every_arm(folder, page):
    table = page.table(
        "arm", "step", "accuracy", "greedy", "random", "base", "NLL", "NLL base", "thought acc.", "weight"
    )
    assert [row[0] for row in table] == [arm.replace("_", " ") for arm in ACCURACY]
    rows = [r for r in read_jsonl(folder / "metrics.jsonl") if r["stage"] == "evaluation" and r["step"] == STEPS[-1]]
    for cells, row in zip(table, rows, strict=True):
        accuracy = row.get("accuracy/hard", row["accuracy_base/hard"])
        low, high = (row.get(f"accuracy_{e}/hard", row.get(f"accuracy_base_{e}/hard")) for e in ("low", "high"))
        assert cells[2] == f"{100 * accuracy:.1f}% {100 * low:.1f}–{100 * high:.1f}"
        names = ("accuracy_greedy", "accuracy_random", "accuracy_base", "thought_accuracy")
        wanted = [row.get(f"{name}/hard") for name in names]
        assert [cells[3], cells[4], cells[5], cells[8]] == [stats.percent(v) for v in wanted]
        nats = [row.get("nll/hard", row["nll_base/hard"]), row["nll_base/hard"]]
        assert cells[6:8] == [f"{v:.2f}" for v in nats]


def test_every_class_has_its_nll_and_change(page):
    table = page.table("arm", "easy", "unpredictable", "hard", "all")
    assert "NLL 0.23 −2.08" in table[0][3] and "w 0.63" in table[0][3]
    assert "NLL 2.31" in table[3][3] and "w 0" not in table[3][3]


def test_viewer_holds_every_thought_of_every_arm_and_step(folder, page):
    index = json.loads(page.scripts["thought-index"])
    assert [(b["arm"], b["step"]) for b in index["blocks"]] == [(a.replace("_", " "), s) for a in THINK for s in STEPS]
    assert index["blocks"][index["opens"]] == {"arm": "full", "step": STEPS[-1], "total": 40, "shown": 40}
    for number, (arm, step) in enumerate((a, s) for a in THINK for s in STEPS):
        data, vocab = block(page, number)
        rows = read_jsonl(folder / arm / "thoughts" / f"step_{step:06d}.jsonl")
        for (name, tokens, classes, base, passes), row in zip(data["texts"], rows, strict=True):
            assert (name, [vocab[i] for i in tokens]) == (row["text"], row["tokens"])
            assert [vocab[i] for i in classes] == row["classes"]
            for (said, nll, weight, reward), wanted in zip(passes, row["thoughts"], strict=True):
                assert [[vocab[i] for i in ids] for ids in said] == wanted["tokens"]
                for got, name in ((nll, "nll"), (weight, "weight"), (reward, "reward")):
                    assert got == pytest.approx(wanted[name], abs=6e-4)
            assert base == pytest.approx(row["base_nll"], abs=6e-4)


def test_helped_and_hurt_are_the_extremes_of_all_texts(folder, page):
    data, _ = block(page, json.loads(page.scripts["thought-index"])["opens"])
    gains = {}  # by hand: base minus the mean over the two thoughts
    for t, (_, _, _, base, passes) in enumerate(data["texts"]):
        for j, nll in enumerate(base):
            gains[t, j] = nll - (passes[0][1][j] + passes[1][1][j]) / 2
    assert gains[tuple(data["helped"][0])] == pytest.approx(max(gains.values()), abs=1e-3)
    assert gains[tuple(data["hurt"][0])] == pytest.approx(min(gains.values()), abs=1e-3)
    for side, sign in (("helped", 1), ("hurt", -1)):
        shown = [sign * gains[tuple(at)] for at in data[side]]
        assert all(a >= b - 1e-3 for a, b in zip(shown, shown[1:])) and min(shown) > 0


def test_a_text_gives_two_extremes_at_most():
    none = thoughts.Pass([[]] * 5, [0.0] * 5, [0.0] * 5, [0.0] * 5)
    rows = [thoughts.Text(str(n), list("abcdef"), ["x"] * 6, [n + 1.0 + j for j in range(5)], [none]) for n in range(3)]
    helped, hurt = thoughts.extremes(rows, 4)
    assert [(e.text, e.entry) for e in helped] == [(2, 4), (1, 4), (2, 3), (0, 4)] and not hurt


def test_tokens_that_nothing_predicts_have_no_gain():
    p = thoughts.Pass([["a"], [], ["b"]], [1.0, None, 0.5], [0.1, None, 0.2], [0.0, None, 0.0])
    text = thoughts.Text("t", list("wxyz"), ["c"] * 4, [None, 2.0, 2.0], [p])
    assert text.gains == [None, None, 1.5]
    assert thoughts.class_gains([text]) == {"c": (1.5, 1)}


def test_texts_are_left_out_to_fit_but_never_the_extremes(folder):
    arm = read_run(folder).arms[0]
    rows = thoughts.read_texts(arm.thoughts[250])
    random.Random(1).shuffle(rows)
    packed, shown = thoughts.pack(rows, 4_000)
    data = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert shown == len(data["texts"]) < len(rows)
    kept = {row[0] for row in data["texts"]}
    assert {rows[e.text].id for side in thoughts.extremes(rows) for e in side} <= kept
    for name, side in zip(("helped", "hurt"), thoughts.extremes(rows)):
        assert [(data["texts"][t][0], j) for t, j in data[name]] == [(rows[e.text].id, e.entry) for e in side]


def test_alarms_gates_weights_and_config_are_on_the_page(page):
    assert "Alarm · policy weight 0, step 100: thoughts are ignored" in page.text
    assert page.table("gate", "measures", "value")[0][:3] == ["direct", "nll_base/hard", "2.31"]
    assert ["thoughts.thought_tokens", "6"] in page.table("key", "value")
    assert "0.6 to 0.8: 890" in page.text  # a bar's tooltip: 20 + 900 * .967


def test_curves_have_a_mark_for_every_evaluation(page):
    marks = re.findall(r"full, (\d+): (\d+)% \[", page.source)
    wanted = [(str(step), f"{100 * value:.0f}") for step, value in zip(STEPS, ACCURACY["full"])]
    assert marks[: len(STEPS)] == wanted


def test_a_page_loads_nothing_and_shows_a_models_text_as_text(tmp_path):
    shown = Page(pages.write_report(write_quiet_run(tmp_path / "run", hostile=True, texts=3)))
    assert SCRIPT not in shown.source
    assert set(shown.scripts) == {None, "thought-index", *(f"thoughts-{n}" for n in range(len(THINK) * len(STEPS)))}
    assert not [a for _, a in shown.elements if a.get("src") or str(a.get("href", "#"))[0] != "#"]


def test_a_run_that_has_only_begun_makes_a_page(tmp_path):
    run = write_quiet_run(tmp_path / "run", texts=0, steps=(0,), arms=("plain",))
    page = Page(pages.write_report(run))
    assert "Before the first step, accuracy on hard tokens is 10.0% (8.0–12.0%, 95% interval)" in page.text
    assert "No step has been evaluated yet." in page.text
    (run / "metrics.jsonl").unlink()
    assert "No results yet" in Page(pages.write_report(run)).text
    assert "thought-index" not in page.scripts


def test_controls_that_do_not_think_and_unknown_classes_are_welcome(tmp_path):
    run = write_quiet_run(tmp_path / "run", arms=("plain",), texts=0)
    rows = [r for r in read_jsonl(run / "metrics.jsonl") if r["stage"] != "evaluation"]
    keys = {"nll_base/0-1 nats": 0.5, "nll_base/4+ nats": 5.0, "nll_base/all": 2.0, "accuracy_base/4+ nats": 0.01}
    rows += [{"arm": "plain", "iteration": 0, "stage": "evaluation", "step": s, **keys} for s in (0, 100)]
    write_jsonl(run / "metrics.jsonl", rows)
    assert stats.focus(read_run(run)) == "4+ nats"
    assert "Accuracy on 4+ nats tokens went from 1.0% to 1.0%" in Page(pages.write_report(run)).text


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda row: row.pop("base_nll"), "not a text with thoughts (KeyError('base_nll'))"),
        (lambda row: row["thoughts"][1]["nll"].pop(), "thoughts[1].nll does not fit its 9 tokens"),
        (lambda row: row["classes"].pop(), "classes does not fit its 9 tokens"),
    ],
)
def test_a_broken_line_of_thoughts_is_named(tmp_path, change, told):
    run = write_quiet_run(tmp_path / "run", arms=("full",), steps=(0,), texts=3)
    path = run / "full" / "thoughts" / "step_000000.jsonl"
    rows = read_jsonl(path)
    change(rows[1])
    write_jsonl(path, rows)
    with pytest.raises(UserError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(told)):
        pages.write_report(run)


def test_report_is_the_same_twice(folder):
    first = pages.write_report(folder).read_bytes()
    assert pages.write_report(folder).read_bytes() == first


def test_a_browser_draws_tokens_and_answers_a_click(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("needs a browser")
    source = pages.write_report(folder).read_text(encoding="utf-8")
    click = """<script>setTimeout(() => {
      const t = [...document.querySelectorAll(".tok.on.pos")].find((t) => t.nextSibling.textContent === ";");
      t.click(); document.title = [document.querySelectorAll(".text").length,
        document.querySelectorAll(".ends li").length, document.querySelector(".peek .said").textContent,
        document.querySelector(".peek h4").textContent].join("|"); }, 500)</script></body>"""
    (tmp_path / "page.html").write_text(source.replace("</body>", click), encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
    out = subprocess.run([*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*?)</title>", out.stdout)[1]
    shown, ends, said, head = title.split("|")
    assert (shown, ends) == ("25", "40") and said.startswith("⟨-") and "hard+1.9" in head
