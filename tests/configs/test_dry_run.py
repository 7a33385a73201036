"""What `qstar train` says before a run: every value with its source, all that is missing, and dry runs."""

import json
import os
import subprocess
import sys

import pytest
from conftest import real_model, shared

from qstar.__main__ import main
from qstar.flags import parse_overrides, read_config, value_sources
from qstar.plan import host

QUICK = (
    "base.steps=4",
    "loop.n_iters=1",
    "loop.steps=lin:2:0",
    "task.eval_per_length=4",
    "task.pool.1=6",
    "task.pool.2=6",
)


def call(capsys, *argv, code=0):
    assert main([str(a) for a in argv]) == code
    out = capsys.readouterr()
    return out.err if code else out.out


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# -------------------------------------------------------------------------------------------------- --print-config


def test_each_source_is_told_apart(capsys):
    said = call(capsys, "train", "--config=star_arithmetic:smoke", "--config.train.lr=3", "--print-config", "--json")
    found = json.loads(said)
    assert found["train.lr"] == {"value": 3.0, "source": "command line"}
    assert found["base.steps"] == {"value": 150, "source": "argument"}
    assert found["base.lr"] == {"value": 2e-3, "source": "config file"}
    assert found["train.lora_rank"] == {"value": 0, "source": "default"}
    arm = "arms.no_rationalisation."
    assert found[arm + "rationalize"] == {"value": False, "source": "preset star_norat"}
    assert found[arm + "n_iters"]["source"] == "argument" and found[arm + "k"] == {"value": 1, "source": "default"}


@pytest.mark.parametrize("name", ["v_star_gsm8k", "grpo_gsm8k", "quiet_star_tiny", "guided_cot_hotpotqa"])
def test_the_text_has_every_value_of_the_config_in_the_form_of_a_flag(name, capsys):
    lines = call(capsys, "train", f"--config={name}", "--print-config").splitlines()
    keys = {line.partition(" = ")[0] for line in lines}
    assert {f"config.{key}" for key in value_sources(name, [])} <= keys and len(keys) == len(lines)
    assert all("  # " in line for line in lines)
    flag = next(line for line in lines if line.startswith("config.seed")).partition("#")[0].replace(" ", "")
    assert read_config(name, parse_overrides([f"--{flag}"])).seed == 0


def test_an_unknown_key_is_refused_here_too(capsys):
    said = call(capsys, "train", "--config=star_gsm8k", "--config.train.lrr=1", "--print-config", code=2)
    assert "config.train.lrr is unknown" in said


def test_json_alone_is_refused(capsys):
    assert "--json belongs to" in call(capsys, "train", "--config=star_gsm8k", "--json", code=2)


# --------------------------------------------------------------------------------------------------- what is missing


def test_all_that_is_missing_stands_in_one_line(capsys, tmp_path):
    flags = ["--config=star_gsm8k:model=no_model,data=no_data", "--config.task.hnt=answer", f"--workdir={tmp_path}/run"]
    said = call(capsys, "train", *flags, code=2)
    assert said.count("\n") == 1 and "4 things are missing" in said
    for culprit in ("config.model.path", "no_model", "no_data/train.jsonl", "no_data/test.jsonl", "did you mean hint?"):
        assert culprit in said
    assert not (tmp_path / "run").exists()


def test_missing_packages_are_told_with_their_extra(capsys, monkeypatch):
    from qstar.runs import missing

    monkeypatch.setattr(missing.importlib.util, "find_spec", lambda name: None)
    config = {**read_config("star_gsm8k:smoke").to_dict(), "task": {"name": "math"}, "log": {"wandb": {"project": "x"}}}
    with pytest.raises(missing.UserError, match=r"2 things.*qstar-jax\[eval\].*qstar-jax\[log\]"):
        missing.check_present(config)


# --------------------------------------------------------------------------------------------------------- dry runs


def test_a_dry_run_checks_counts_and_writes_nothing(capsys, tmp_path):
    flags = [f"--config.{flag}" for flag in QUICK]
    said = call(capsys, "train", "--config=star_arithmetic:smoke", "--dry-run", "--json", *flags)
    found = json.loads(said)
    assert not list(tmp_path.iterdir())
    work = {w["stage"]: w for w in found["work"]}
    assert work["base"]["updates"] == 4 and work["rationalisation: fine-tuning"]["updates"] == 2
    # 12 problems of one sample, and of a hinted one where it fails.
    assert work["rationalisation: sampling of 1 loops"]["samples"] == 24
    assert work["no_rationalisation: sampling of 1 loops"]["samples"] == 12
    assert found["prompt_tokens"] == len("99+99=") and found["memory"]["peak"] > 3e8


@pytest.mark.parametrize("name, stage", [("grpo_gsm8k", "grpo: sampling"), ("quiet_star_tiny", "quiet_star"), ("v_star_gsm8k", "G_SFT"),
                                         ("guided_cot_hotpotqa", "kd_unfiltered: distillation")])  # fmt: skip
def test_the_work_of_other_methods(name, stage, tmp_path, monkeypatch):
    from qstar import methods
    from qstar.plan import dry_run
    from tests.methods import stub

    passed = methods.check(read_config(f"{name}:smoke"), tmp_path / "run", stub.Silent())
    rows = {w.stage: w for w in dry_run.work(passed)}
    assert stage in rows and all(w.samples + w.updates > 0 for w in rows.values()) and not (tmp_path / "run").exists()
    assert name != "quiet_star_tiny" or rows["base"].trained_tokens == 60 * 128 * 19  # the longest document of its text


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_training_on_rows_of_ones_own(name, capsys, tmp_path):
    found = json.loads(call(capsys, "train", f"--config={name}:smoke,lora=4", "--dry-run", "--json"))
    assert [w["updates"] for w in found["work"]] == [6] and len(found["memory"]["phases"]) == 1
    said = json.loads(call(capsys, "train", f"--config={name}:smoke", "--print-config", "--json"))
    assert said["train.lr"] == {"value": 1e-3, "source": "argument"} and said[f"arms.{name}.b1"]["source"] == "default"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_finds_what_the_run_would(capsys, tmp_path):
    said = call(
        capsys, "train", "--config=star_gsm8k:smoke", "--config.sample.max_new_tokens=5000", "--dry-run", code=2
    )
    assert "exceed the model's context" in said and not list(tmp_path.iterdir())


def test_a_run_beyond_the_machine_is_refused_with_what_fits_and_can_be_forced(monkeypatch):
    monkeypatch.setattr(host, "machine", lambda: 80 * 10**9)
    monkeypatch.setattr(host, "stored", lambda config: 12e9)  # the folder is not here; its shapes are in a table
    config = read_config("star_gsm8k:model=gpt-j-6b")
    with pytest.raises(host.UserError) as refused:
        host.check_memory(config)
    said = str(refused.value)
    assert "this machine has 80.0 GB" in said and "--config.train.lora_rank=16" in said and "--memory=ignore" in said
    monkeypatch.setattr(host, "machine", lambda: 4 * 10**12)
    host.check_memory(config)


def test_a_small_model_costs_no_estimate(monkeypatch):
    monkeypatch.setattr(host, "estimate", lambda *a, **k: pytest.fail("estimated"))
    assert 0 < host.stored(read_config("star_gsm8k:smoke")) < 1e6 and not host.stored(read_config("star_arithmetic"))
    host.check_memory(read_config("star_gsm8k:smoke"))


@pytest.mark.skipif(
    not os.environ.get("QSTAR_LONG_TESTS"), reason="trains a real model: set QSTAR_LONG_TESTS=1 to run it"
)
@pytest.mark.parametrize("lora", [8, 0])
def test_the_estimate_is_near_the_peak_of_a_real_run(lora, tmp_path):
    model, data = real_model("smollm2-135m-instruct"), shared("data/gsm8k")
    flags = [f"--config=star_gsm8k:small,model={model},data={data}", f"--config.train.lora_rank={lora}"]
    small = {"loop.n_iters": 1, "loop.problems_per_iter": 8, "loop.steps": "lin:2:0", "train.batch_size": 4,
             "train.row_length": 256, "sample.max_new_tokens": 16, "sample.round_size": 8, "evaluate.limit": 4}  # fmt: skip
    flags += [f"--config.{k}={v}" for k, v in small.items()]

    def peak(*more):
        code = f"import sys, resource; from qstar.__main__ import main; main({['train', *flags, *more]!r}); "
        code += "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    found = json.loads(next(line for line in peak("--dry-run", "--json") if line.startswith("{")))
    measured = int(peak("--workdir=run")[-1].split()[1])
    assert abs(found["memory"]["peak"] / measured - 1) < 0.15
