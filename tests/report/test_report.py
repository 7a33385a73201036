"""A report states the numbers that the files hold, shows a model's text as text, and needs nothing else."""

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import pytest

from qstar.data.sources import read_jsonl, write_jsonl
from qstar.errors import UserError
from qstar.report import pages, rationales, render, stats
from qstar.report.pages import browser, star
from qstar.report.rationales import Attempts
from qstar.report.read import Arm, Run, read_run
from tests.report.synthetic import CURVES, SCRIPT, Shape, write_run

VERDICTS = ("kept", "rationalised", "rejected")


class Page(HTMLParser):
    """A page as a browser reads it: elements with their attributes, tables as cells, scripts, text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.tables, self.scripts, self.styles, self.text = [], [], {}, "", ""
        self._inside, self._cell = None, False
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.elements.append((name, attributes))
        if name == "table":
            self.tables.append([])
        elif name == "tr":
            self.tables[-1].append([])
        elif name in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
        self._inside = (name, attributes.get("id")) if name in ("script", "style") else self._inside

    def handle_endtag(self, name):
        if name in ("script", "style"):
            self._inside = None
        elif name in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._inside and self._inside[0] == "script":
            self.scripts[self._inside[1]] = self.scripts.get(self._inside[1], "") + data
        elif self._inside:
            self.styles += data
        else:
            self.text += data
            if self._cell:
                self.tables[-1][-1][-1] += data

    def table(self, *head):
        """The rows of the table whose header begins so."""
        return next(t[1:] for t in self.tables if tuple(t[0][: len(head)]) == head)

    @property
    def data(self):
        """The rationales that the page holds, and their counts."""
        data = json.loads(gzip.decompress(base64.b64decode(self.scripts["rationale-data"])))
        return [dict(zip(data["columns"], row)) for row in data["rows"]], data["counts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "full", Shape(scale=4))


@pytest.fixture(scope="module")
def page(folder):
    return Page(pages.write_report(folder))


def report(tmp_path, shape):
    return Page(pages.write_report(write_run(tmp_path / "run", shape)))


def test_headline_gives_first_and_last_loop_of_both_arms_with_intervals(folder, page):
    assert render.headline(read_run(folder)) == (
        "With rationalisation, 3-digit accuracy went from 0.4% (0.0–1.2%, 95% interval) to 97.0% "
        "(94.9–99.1%) in 4 loops; without it, it went from 0.4% (0.0–1.2%) to 0.4% (0.0–1.2%) in 4 loops."
    )
    assert render.headline(read_run(folder)) in page.text


def test_accuracy_table_equals_the_metrics(folder, page):
    table = page.table("arm", "problems", "base", "loop 1")
    for arm, name in (("rat", "rat with"), ("norat", "norat without")):
        for group, values in CURVES[arm].items():
            label = f"{group} digit" + "s" * (group != "1")
            cells = next(row for row in table if row[0].startswith(name) and row[1] == label)[2:]
            assert [cell.split("%")[0] for cell in cells] == [f"{100 * v:.1f}" for v in values]


def test_every_number_of_every_loop_is_on_the_page(folder, page):
    tables = [t for t in page.tables if t[0][0] == "" and "base" in t[0]]
    assert len(tables) == 2
    for table, arm in zip(tables, ("rat", "norat")):
        rows = [r for r in read_jsonl(folder / "metrics.jsonl") if r["arm"] == arm and r["stage"] == "iteration"]
        for name, *cells in table[1:]:
            for cell, row in zip(cells, rows, strict=True):
                value = row.get(name)
                wanted = "–" if value is None else f"{value:.1f}" if "seconds" in name else f"{value:.4g}"
                assert cell.replace(",", "") == (str(value) if isinstance(value, int) else wanted), name


def test_problems_are_counted_once_under_their_best_attempt(folder, page):
    table = page.table("arm", "loop", "problems", *VERDICTS)
    for arm in ("rat", "norat"):
        for loop in range(1, 5):
            best = {}  # brute force: the best verdict of every problem of three digits
            for row in read_jsonl(folder / arm / "rationales" / f"iter_{loop:03d}.jsonl"):
                if row["group"] == "3":
                    best.setdefault(row["problem_id"], set()).add(row["verdict"])
            wanted = Counter(next(v for v in VERDICTS if v in verdicts) for verdicts in best.values())
            cells = next(r for r in table if r[0].startswith(f"{arm} ") and r[1:3] == [f"loop {loop}", "3 digits"])
            assert [int(c.replace(",", "")) for c in cells[3:]] == [wanted[v] for v in VERDICTS]


def test_bars_show_the_shares_of_the_counted_problems(folder, page):
    for arm in read_run(folder).arms:
        for loop, counts in stats.outcomes(arm, "3").items():
            share = counts["rejected"] / sum(counts.values())
            shown = f"{100 * share:.0f}%" if not 0.99 < share < 1 and not 0 < share < 0.01 else f"{100 * share:.1f}%"
            assert f"<title>rejected, loop {loop}: {shown}</title>" in page.source


def test_rejections_are_counted_by_reason_hint_and_loop(folder, page):
    wanted = Counter()
    for loop in range(1, 5):
        for row in read_jsonl(folder / "rat" / "rationales" / f"iter_{loop:03d}.jsonl"):
            if row["verdict"] == "rejected":
                wanted[row["reason"] + " (with the hint)" * row["hinted"], loop] += 1
    table = page.table("rat · with rationalisation", "loop 1")
    found = {(name, loop): int(c.replace(",", "")) for name, *cells in table for loop, c in enumerate(cells, 1)}
    assert {key: count for key, count in found.items() if count} == dict(wanted)
    assert len({name for name, _ in wanted}) == 3


def test_miscopied_operands_are_counted_among_wrong_answers(folder, page):
    table = page.table("arm", "model after", "wrong answers")
    rows = [r for r in read_jsonl(folder / "norat" / "evaluation" / "iter_000.jsonl") if r["group"] == "3"]
    wrong = [r for r in rows if not r["correct"]]
    copied = sum(not r["completion"].startswith(r["prompt"].rstrip("=") + ",") for r in wrong)
    assert 0 < copied < len(wrong)
    cells = next(r for r in table if r[0].startswith("norat") and r[1] == "base")
    assert cells[2:] == [
        f"{len(wrong)} of {len(rows)}",
        f"{copied} of {len(wrong)}",
        f"{100 * copied / len(wrong):.1f}%",
    ]


def test_embedded_counts_are_those_of_the_files(folder, page):
    _, counts = page.data
    wanted = Counter(
        (arm, loop, r["verdict"], r["reason"], r["hinted"], r["group"], r["valid"])
        for arm in ("rat", "norat")
        for loop in range(1, 5)
        for r in read_jsonl(folder / arm / "rationales" / f"iter_{loop:03d}.jsonl")
    )
    assert {tuple(row[:-1]): row[-1] for row in counts} == dict(wanted)


def test_embedded_rows_are_rows_of_the_files_and_hold_every_reason(folder, page):
    rows, _ = page.data
    assert max(Counter((row["arm"], row["loop"]) for row in rows).values()) == 600
    for arm in ("rat", "norat"):
        for loop in range(1, 5):
            file = read_jsonl(folder / arm / "rationales" / f"iter_{loop:03d}.jsonl")
            known = {(r["problem_id"], r["hinted"]): r for r in file}
            mine = [row for row in rows if (row["arm"], row["loop"]) == (arm, loop)]
            for row in mine:
                original = known[row["id"], row["hinted"]]
                for key in ("prompt", "completion", "gold", "answer", "verdict", "reason", "valid", "group"):
                    assert row[key] == original[key]
            assert {r["reason"] for r in file} == {row["reason"] for row in mine}


def test_hints_are_marked_where_the_prompt_holds_them(page):
    hinted = [row for row in page.data[0] if row["hinted"]]
    assert hinted
    for row in hinted:
        [(start, end)] = row["hint"]
        assert row["prompt"][start:end] == f"({row['gold'].zfill(int(row['group']) + 1)})"
    assert not any(row["hint"] for row in page.data[0] if not row["hinted"])


def test_a_models_text_never_becomes_markup(folder, page):
    assert any(row["completion"] == SCRIPT for row in page.data[0])
    assert len([name for name, _ in page.elements if name == "script"]) == 2  # the data and our own
    assert "<script>document" not in page.source and "<!--" not in page.source


def test_hostile_names_reasons_and_groups_stay_text(tmp_path):
    run = write_run(tmp_path / "run", Shape(arms=("rat",), loops=1, status="stopped", reason=SCRIPT))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "name": SCRIPT, SCRIPT: [SCRIPT]}))
    (run / "environment.json").write_text(json.dumps({SCRIPT: '" onload="x'}))
    (run / "base" / "gates.json").write_text(json.dumps({SCRIPT: {"value": SCRIPT, "why": "<img src=x>"}}))
    rows = read_jsonl(run / "rat" / "rationales" / "iter_001.jsonl")
    changed = [{**row, "group": SCRIPT, "reason": SCRIPT, "prompt": SCRIPT, "gold": SCRIPT} for row in rows]
    write_jsonl(run / "rat" / "rationales" / "iter_001.jsonl", changed)
    page = Page(pages.write_report(run))
    assert len([name for name, _ in page.elements if name == "script"]) == 2
    assert not [name for name, _ in page.elements if name in ("img", "iframe", "link", "object")]
    assert not [key for _, attributes in page.elements for key in attributes if key.startswith("on")]
    assert page.text.count(SCRIPT) > 5  # shown, as text
    assert SCRIPT not in page.source


def test_page_loads_nothing_from_anywhere(page):
    for name, attributes in page.elements:
        assert not {"src", "srcset", "data", "poster", "action", "xlink:href"} & set(attributes), name
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page.styles and "@import" not in page.styles
    assert "http://" not in page.source and "https://" not in page.source
    policy = [a.get("content", "") for n, a in page.elements if n == "meta"]
    assert any(text.startswith("default-src 'none'") for text in policy)


def test_links_of_the_contents_lead_somewhere(page):
    ids = {attributes.get("id") for _, attributes in page.elements}
    links = [attributes["href"][1:] for name, attributes in page.elements if name == "a"]
    assert len(links) >= 8 and set(links) <= ids


def test_a_report_is_the_same_bytes_every_time(folder, page):
    assert pages.write_report(folder).read_text(encoding="utf-8") == page.source


def test_run_that_has_only_its_base_says_so(tmp_path):
    page = report(tmp_path, Shape(loops=0, status=None))
    assert "Before the first loop, 3-digit accuracy is 0.4% (0.0–1.2%, 95% interval). No loop has finished" in page.text
    assert "This run was interrupted (rat, norat)" in page.text
    assert "What was kept" not in page.text and "rationale-data" not in page.scripts


def test_run_without_any_result_is_a_page_too(tmp_path):
    page = report(tmp_path, Shape(arms=(), loops=0))
    assert "No results yet" in page.text and "How to repeat it" in page.text


def test_single_arm_without_groups_or_audit_that_stopped(tmp_path):
    shape = Shape(
        ("rat",),
        2,
        groups=False,
        audit=False,
        status="stopped",
        reason="12 rows kept, fewer than 50",
        task="gsm8k",
    )
    page = report(tmp_path, shape)
    start, end = (sum(CURVES["rat"][g][loop] for g in "123") / 3 for loop in (0, 2))
    assert f"Accuracy on held-out problems went from {100 * start:.1f}% (" in page.text
    assert f" to {100 * end:.1f}% (" in page.text and "in 2 loops." in page.text
    assert "Arm rat stopped: 12 rows kept, fewer than 50" in page.text
    assert "every line is exactly right" not in page.text  # nothing checks it here


def test_arm_without_a_name_has_its_files_in_the_run_folder(tmp_path):
    write_run(tmp_path, Shape(arms=("rat",), loops=1))
    for part in ("rationales", "evaluation", "status.json"):
        shutil.move(tmp_path / "rat" / part, tmp_path / part)
    (tmp_path / "rat").rmdir()
    (tmp_path / "config.json").write_text('{"format_version": 2, "method": "star"}')
    rows = [{**row, "arm": row["arm"].replace("rat", "")} for row in read_jsonl(tmp_path / "metrics.jsonl")]
    write_jsonl(tmp_path / "metrics.jsonl", rows)
    run = read_run(tmp_path)
    assert [(arm.name, arm.status, list(arm.attempts)) for arm in run.arms] == [("", "finished", [1])]
    assert len(run.base_train) == 30
    assert "star" in Page(pages.write_report(tmp_path)).text


def test_arms_of_the_config_that_have_not_begun_are_shown(tmp_path):
    write_run(tmp_path, Shape(arms=("rat",), loops=1))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "arms": {"rat": {}, "later": {}}}))
    page = Page(pages.write_report(tmp_path))
    assert [row[0] for row in page.table("arm", "3 digits: base")] == ["rat", "later"]
    assert "This run was interrupted (later)" in page.text and read_run(tmp_path).status == "interrupted"


def test_result_on_the_test_split_is_shown_with_its_interval(tmp_path):
    write_run(tmp_path, Shape(arms=("rat",), loops=1))
    row = {"arm": "rat", "iteration": 1, "stage": "test", "step": 1, "mean_tokens": 41.5, "maj@8": 0.75}
    row |= {"accuracy/3": 0.625, "accuracy_low/3": 0.5, "accuracy_high/3": 0.75}
    write_jsonl(tmp_path / "metrics.jsonl", [*read_jsonl(tmp_path / "metrics.jsonl"), row])
    rows = Page(pages.write_report(tmp_path)).table("arm", "model of loop")
    assert [r[1:] for r in rows] == [
        ["1", "mean tokens", "41.5"],
        ["1", "maj@8", "75.0%"],
        ["1", "accuracy/3", "62.5% 50.0–75.0"],
    ]


def test_gates_are_shown_with_their_verdict(page):
    rows = page.table("gate", "measures")
    assert rows[0] == ["hint works", "hinted_accuracy/3", "0.788", "at least 0.6", "pass", ""]
    assert rows[1] == ["valid", "", "0.71", "at least 0.8", "fail", "a warning only"]


@pytest.mark.parametrize(
    ("restart", "text"),
    [
        ("base", "The base model is trained anew"),
        ("previous", "The newest model is trained further"),
    ],
)
def test_fine_tuning_is_told_as_the_arm_is_configured(tmp_path, restart, text):
    write_run(tmp_path, Shape(arms=("rat",), loops=1))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"arms": {"rat": {"restart": restart}}, "loop": {"restart": "unused", "seed_share": 0.15}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = Page(pages.write_report(tmp_path))
    assert text in page.text and "15.0% of every batch are worked examples" in page.text


def test_a_long_run_stays_under_three_megabytes_and_keeps_every_kind(tmp_path):
    rows = [
        {
            "problem_id": str(n),
            "prompt": "<p>" * 900,
            "completion": "é" * 4000,
            "verdict": "rejected",
            "gold": "1",
            "reason": "rare" if n == 0 else "wrong",
        }
        for n in range(300)
    ]
    shown = rationales.sample(rows, 600)
    attempts = Attempts(Counter(map(rationales.kind, rows)), {}, shown)
    run = Run(tmp_path, "big", "star", {}, arms=[Arm("a", attempts=dict.fromkeys(range(1, 17), attempts))])
    text = star.page(run)
    assert len(text.encode()) < 3_000_000
    data = browser.embedded(run)
    reasons = {(row[1], row[3]) for row in data["rows"]}
    assert len(reasons) == 16 * 2


def test_without_any_room_a_page_still_holds_one_attempt_of_every_kind(folder, monkeypatch):
    monkeypatch.setattr(browser, "RATIONALE_BYTES", 0)
    data = browser.embedded(read_run(folder))
    assert len(data["rows"]) == len(data["counts"]) > 50


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        pages.write_report(tmp_path / "nowhere")


def test_folder_of_something_else_is_named_and_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match=f"{tmp_path.name}: not the folder of a run"):
        pages.write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_row_without_a_field_of_the_page_is_damage_and_no_bug(tmp_path):
    (tmp_path / "config.json").write_text('{"format_version": 2, "method": "sft", "arms": {"sft": {}}}')
    (tmp_path / "sft").mkdir()
    write_jsonl(tmp_path / "sft" / "examples.jsonl", [{"prompt": "1+1="}])
    with pytest.raises(UserError, match="not as a run writes it .UndefinedError: .* has no attribute 'expected'"):
        pages.write_report(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "base/gates.json", "rat/status.json", "rat/rationales/iter_001.jsonl"])
def test_broken_file_is_named(tmp_path, name):
    write_run(tmp_path, Shape(arms=("rat",), loops=1))
    (tmp_path / name).write_text("{not json")
    with pytest.raises(UserError, match=name):
        pages.write_report(tmp_path)


def test_interrupted_writing_leaves_the_old_report(tmp_path, monkeypatch):
    write_run(tmp_path, Shape(arms=("rat",), loops=1))
    before = pages.write_report(tmp_path).read_bytes()
    (tmp_path / "config.json").write_text('{"format_version": 2, "method": "star", "name": "other"}')

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="report.html: cannot be written"):
        pages.write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert not [path.name for path in tmp_path.iterdir() if "tmp-" in path.name]


def test_reports_need_no_jax():
    code = "import sys, qstar.report.pages; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_in_a_browser_filters_search_and_rows_work(folder, page, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium to run the page's script")
    play = """<script>setTimeout(() => {
      const pick = (label, text) => { const s = document.querySelector(`select[aria-label="${label}"]`);
        s.value = [...s.options].find((o) => o.text === text).value; s.dispatchEvent(new Event("change")); };
      pick("every arm", "rat · with rationalisation"); pick("every loop", "loop 2"); pick("hinted or not", "with the hint");
      pick("every verdict", "rationalised");
      document.querySelector(".row summary").click();
      document.body.dataset.address = location.hash;
    }, 500)</script></body>"""
    copy = tmp_path / "page.html"
    copy.write_text(page.source.replace("</body>", play), encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-sync",
        "--no-first-run",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command = [browser, *flags, "--virtual-time-budget=2000", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    rows = read_jsonl(folder / "rat" / "rationales" / "iter_002.jsonl")
    count = sum(row["verdict"] == "rationalised" for row in rows)
    chosen = ("rat", 2, True, "rationalised")
    held = sum((r["arm"], r["loop"], r["hinted"], r["verdict"]) == chosen for r in page.data[0])
    assert f"Showing {held} of {count} attempts" in dom
    assert "<mark>(" in dom.split('id="browser"')[1] and "<title>star_test" in dom
    address = re.search('data-address="(#rationales[^"]+)"', dom)[1].replace("&amp;", "&")
    assert address == "#rationales?arm=rat&loop=2&verdict=rationalised&hinted=true"
    # The address alone brings the same rows back.
    plain = tmp_path / "plain.html"
    plain.write_text(page.source, encoding="utf-8")
    command[-1] = plain.as_uri() + address
    again = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert f"Showing {held} of {count} attempts" in again and "Theme: auto" in again and "Download CSV" in again
