"""The blind comparison: nothing on the page tells who wrote what, and votes become a win rate."""

import json
import shutil
import subprocess
import sys

import pytest

from qstar.__main__ import main
from qstar.data.sources import write_jsonl
from qstar.report.compare import Side, count_votes, sign_test, write_comparison
from tests.report.test_report import Page

PROBLEMS = [f"p{n}" for n in range(40)]
HOSTILE = "</script><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("compare")
    for name in ("mine", "theirs"):
        rows = [
            {"problem_id": p, "prompt": f"{p}?", "completion": f"{name} {p} {HOSTILE}", "correct": p != "p3"}
            for p in PROBLEMS
        ]
        rows[5]["completion"] = "the same text"
        write_jsonl(home / f"{name}.jsonl", rows[: 30 if name == "mine" else 40])
    sides = Side("starlight", str(home / "mine.jsonl")), Side("moonlight", str(home / "theirs.jsonl"))
    write_comparison(*sides, home / "page", count=20, seed=1)
    return home, sides


def read(folder):
    page = Page(folder / "compare.html")
    return page, json.loads(page.scripts["comparison"])["items"], json.loads((folder / "key.json").read_text())


def test_the_page_shows_both_texts_on_the_side_that_the_key_says_and_names_nobody(made):
    home, _ = made
    page, items, key = read(home / "page")
    assert len(items) == len(key["items"]) == 20 and key["same_text"] == 1
    for item in items:
        told = key["items"][item["item"]]
        left, right = ("mine", "theirs") if told["left"] == "a" else ("theirs", "mine")
        assert item["left"].startswith(f"{left} {told['problem_id']} ") and item["prompt"] == f"{told['problem_id']}?"
        assert item["right"].startswith(f"{right} {told['problem_id']} ")
    assert {told["left"] for told in key["items"].values()} == {"a", "b"}
    assert "starlight" not in page.source and "moonlight" not in page.source
    assert page.source.count("<script") == 2 and "https:" not in page.source  # the data and our own


def test_a_seed_makes_the_same_bytes_and_another_one_another_order(made, tmp_path):
    home, sides = made
    for seed in (1, 2):
        write_comparison(*sides, tmp_path / str(seed), count=20, seed=seed)
    pages = [(folder / "compare.html").read_bytes() for folder in (home / "page", tmp_path / "1", tmp_path / "2")]
    assert pages[0] == pages[1] != pages[2]
    write_comparison(*sides, tmp_path / "right", count=99, right=True)
    asked = {told["problem_id"] for told in read(tmp_path / "right")[2]["items"].values()}
    assert asked == set(PROBLEMS[:30]) - {"p3", "p5"}


def votes(key, file, choices, **more):
    rows = [{"page": key["page"], "item": i, "choice": c, **more} for i, c in choices.items()]
    write_jsonl(file, rows)
    return str(file)


def test_votes_are_counted_for_whoever_stood_there(made, tmp_path, capfd):
    home, _ = made
    key = read(home / "page")[2]
    mine = {i: "left" if told["left"] == "a" else "right" for i, told in key["items"].items()}
    other = {"left": "right", "right": "left"}
    names = sorted(mine)
    first = votes(key, tmp_path / "1.jsonl", {i: mine[i] for i in names[:10]}, rater="ann")
    second = {
        **{i: mine[i] for i in names[:5]},
        **{i: "equal" for i in names[5:8]},
        **{i: other[mine[i]] for i in names[8:12]},
    }
    second = votes(key, tmp_path / "2.jsonl", second, rater="ben")
    found = count_votes(home / "page", [first, second])
    counts = ("votes", "items", "raters", "wins", "equal", "losses")
    assert [found[k] for k in counts] == [22, 12, 2, 15, 3, 4]
    assert found["win_rate"] == pytest.approx((5 * 1 + 3 * 0.75 + 2 * 0.5 + 2 * 0) / 12)
    assert found["win_rate_low"] < found["win_rate"] < found["win_rate_high"]
    assert found["p"] == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # 8 items won, 2 lost, 2 undecided
    changed = votes(key, tmp_path / "3.jsonl", {names[0]: other[mine[names[0]]]}, rater="ann")
    assert count_votes(home / "page", [first, changed])["losses"] == 1  # the last vote counts
    assert main(["compare", f"--out={home / 'page'}", f"--votes={first}", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["win_rate"] == 1.0


def test_sign_test():
    assert sign_test([1.0] * 5) == pytest.approx(2 / 32) and sign_test([1.0, 0.0, 0.5]) == 1.0 and sign_test([]) == 1.0


def test_counting_needs_no_jax():
    code = "import sys, qstar.report.compare, qstar.commands.compare; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_in_a_browser_keys_and_buttons_vote(made, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium to run the page's script")
    home, _ = made
    page, items, key = read(home / "page")
    play = """<script>{
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", { key: key }));
      press("ArrowLeft"); press("ArrowRight"); press("ArrowUp"); press("ArrowDown");
      document.getElementById("left").click(); document.getElementById("rater").value = "ann";
      document.body.append(Object.assign(document.createElement("pre"), { id: "told", textContent: qstarVotes() }));
    }</script></body>"""
    copy = tmp_path / "page.html"
    copy.write_text(page.source.replace("</body>", play), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *flags, "--virtual-time-budget=2000", "--dump-dom", copy.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    told = dom.split('<pre id="told">')[1].split("</pre>")[0].strip().splitlines()
    assert "Question 4 of 20, 3 answered" in dom and "owned</title>" not in dom
    (tmp_path / "votes.jsonl").write_text("\n".join(told) + "\n")
    rows = [json.loads(line) for line in told]
    assert [(r["item"], r["choice"], r["rater"]) for r in rows] == [
        (items[0]["item"], "left", "ann"), (items[1]["item"], "equal", "ann"), (items[2]["item"], "left", "ann")
    ]  # fmt: skip
    assert count_votes(home / "page", [str(tmp_path / "votes.jsonl")])["votes"] == 3
