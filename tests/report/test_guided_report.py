"""The page of LM-Guided CoT states the numbers of a smoke run."""

import dataclasses
import json
import shutil

import pytest

from qstar import files
from qstar.report.pages.guided_cot import page, read_guided
from qstar.report.read import read_run
from qstar.report.render import headline
from qstar.train.metrics import Writer
from tests.methods import runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return shutil.copytree(runs.finished("guided_cot_synth.py:smoke"), tmp_path_factory.mktemp("guided") / "run")


def test_a_run_says_what_was_studied_and_what_it_costs(run):
    results = json.loads((run / "results.json").read_text())
    voted = {row["arm"]: row["self_consistency"] for row in results["arms"]}
    assert 0 <= voted["kd_unfiltered"] <= 100 and voted["own CoT"] is None
    costs = json.loads((run / "large" / "costs.json").read_text())
    assert costs["own CoT"] == {"answerer_prompt_tokens": 25, "answerer_tokens": 8}
    said = json.loads((run / "student_0" / "rl_both_unfiltered" / "evaluation.json").read_text())
    assert said["answerer_prompt_tokens"] == 26 + said["student_tokens"] and len(said["examples"]) == 12
    assert said["examples"][0]["question"].count("r") >= 9  # two relations asked for, seven facts


def test_the_page_shows_arms_filter_rl_study_costs_and_rationales_and_escapes_them(run):
    file = run / "student_0" / "kd_unfiltered" / "evaluation.json"
    said = json.loads(file.read_text())
    said["examples"][0]["rationale"] = "<script>alert(1)</script>"
    files.write(file, json.dumps(said).encode(), checksum=True)
    writer = Writer(run)  # as a resumed run does
    writer.write(stage="rl", step=3, arm="rl_both_unfiltered", student=0, score=9.0, kl=0.1, entropy=0.2)
    writer.close()
    read = read_run(run)
    text = page(read)
    sections = ("arms", "filter", "reinforcement", "leakage", "cost", "rationales", "config")
    assert all(f'<section id="{name}">' in text for name in sections)
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert headline(read, read_guided(read)).startswith("Guided by KD unfiltered, the frozen large model answers")
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org", "")  # nothing is loaded
    assert read.status == "done" and "was interrupted" not in text
    assert "was interrupted" in page(dataclasses.replace(read, environment={"outcome": "interrupted"}))
