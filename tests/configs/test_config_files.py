"""Every file in configs/ loads, refuses what it does not know, and has a smoke mode that runs to the end."""

import importlib.util
import json
import os
import pathlib
import re

import pytest
from ml_collections import ConfigDict

from qstar.data.sources import read_jsonl
from qstar.errors import UserError
from qstar.methods import guided_cot, quiet_star, rl, star, v_star
from qstar.methods.quiet_data import QuietContext
from qstar.methods.v_star import VStarContext as VStudy
from qstar.runs.context import RunContext
from qstar.runs.settings import arms_from
from qstar.train import metrics
from tests.methods import runs, stub

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(path.name for path in (ROOT / "configs").glob("*.py") if path.name not in ("common.py", "__init__.py"))
SMOKE = {
    "star_arithmetic.py": runs.arithmetic,
    "star_gsm8k.py": runs.gsm8k,
    "star_commonsense_qa.py": lambda: runs.finished("star_commonsense_qa.py:smoke"),
    "v_star_arithmetic.py": runs.v_star,
    "v_star_gsm8k.py": runs.v_star_gsm8k,
    "v_star_mbpp.py": lambda: runs.finished("v_star_mbpp.py:smoke"),
    "quiet_star_tiny.py": runs.quiet_star,
    "quiet_star_mistral_7b.py": lambda: runs.finished("quiet_star_mistral_7b.py:smoke"),
    "fast_quiet_star.py": lambda: runs.finished("fast_quiet_star.py:smoke"),
    "quiet_star_text.py": lambda: runs.finished("quiet_star_text.py:smoke"),
    "grpo_arithmetic.py": lambda: runs.finished("grpo_arithmetic.py:smoke"),
    "guided_cot_synth.py": lambda: runs.finished("guided_cot_synth.py:smoke"),
    # With its large model behind a local HTTP server it runs in tests/methods/test_guided_cot.py.
    "guided_cot_hotpotqa.py": lambda: runs.finished("guided_cot_hotpotqa.py:smoke"),
    "grpo_gsm8k.py": lambda: runs.finished("grpo_gsm8k.py:smoke"),
    "sft.py": lambda: runs.finished("sft.py:smoke"),
    "dpo.py": lambda: runs.finished("dpo.py:smoke"),
    "distil.py": lambda: runs.finished("distil.py:smoke"),
}
# They run what others of the same method run, on other data: their settings are checked by every run of the tests.
SECOND = (
    *("v_star_mbpp.py", "star_commonsense_qa.py", "quiet_star_text.py", "quiet_star_mistral_7b.py"),
    *("guided_cot_hotpotqa.py", "dpo.py", "distil.py"),
)


def smoke_of(name):
    """The folder of a config's smoke run."""
    if name in SECOND and not os.environ.get("QSTAR_LONG_TESTS"):
        pytest.skip(f"the smoke mode of {name} takes long and is much like another: set QSTAR_LONG_TESTS=1 to run it")
    return SMOKE[name]()


QUIET = [name for name in FILES if "quiet" in name]
GRPO = [name for name in FILES if name.startswith("grpo_")]
PAIRS = ("sft.py", "dpo.py", "distil.py")
GUIDED = [name for name in FILES if name.startswith("guided_")]
EVERY = pytest.mark.parametrize("name", FILES)
VERIFIED = [name for name in FILES if name.startswith("v_star")]
STAR = pytest.mark.parametrize("name", [name for name in FILES if name.startswith("star_")])


def module(name):
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), ROOT / "configs" / name)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_every_config_is_tested_here():
    assert FILES == sorted(SMOKE)


@STAR
@pytest.mark.parametrize("mode", [None, "smoke", "smoke,seed=3"])
def test_it_loads_and_all_its_settings_are_known(name, mode, tmp_path):
    config = module(name).get_config(mode)
    assert isinstance(config, ConfigDict) and config.name == name.removesuffix(".py")
    assert config.seed == (3 if mode and "seed" in mode else 0)
    ctx = RunContext.make(config, tmp_path / "run", stub.Silent())
    arms = arms_from(star.VariantConfig, vars(ctx.settings), "loop", star.PRESETS)
    assert arms and not (tmp_path / "run").exists()
    json.dumps(config.to_dict())


@pytest.mark.parametrize("name", VERIFIED)
@pytest.mark.parametrize(
    "mode", [None, "smoke", "smoke,seed=3", "arms=sft+verification+star+rft+star_dagger+v_star_1iter"]
)
def test_a_v_star_config_loads_and_all_its_settings_are_known(name, mode, tmp_path):
    config = module(name).get_config(mode)
    assert isinstance(config, ConfigDict) and config.name == name.removesuffix(".py")
    assert config.seed == (3 if mode and "seed" in mode else 0)
    ctx = VStudy.make(config, tmp_path / "run", stub.Silent())
    loops = arms_from(v_star.VStarConfig, vars(ctx.settings), "loop", v_star.PRESETS)
    assert loops and not (tmp_path / "run").exists()
    if mode and "arms" in mode:  # as many samples for all, and what the table of baselines says
        assert {x.k * x.n_iters for x in loops.values()} == {0, 48}
        assert {arm for arm, x in loops.items() if x.verifiers} == {"verification", "v_star_1iter"}
    json.dumps(config.to_dict())


def test_nothing_of_v_star_is_chosen_on_the_test_sums():
    config = module("v_star_arithmetic.py").get_config("val")
    assert config.evaluate.split == "val" and module("v_star_arithmetic.py").get_config().evaluate.split == "test"
    assert {g.metric for g in config.gates.values()} <= {"pass@1", "pass@16", "majority@16"}  # of validation problems


@pytest.mark.parametrize("name", VERIFIED)
def test_the_smoke_mode_of_v_star_runs_to_the_end(name):
    folder = smoke_of(name)
    config = json.loads((folder / "config.json").read_text())
    assert "Choosing one of k" in (folder / "report.html").read_text()
    for arm, own in config["arms"].items():
        n = config["loop"]["n_iters"]
        status = json.loads((folder / arm / "status.json").read_text())
        assert status == {"status": "finished", "reason": "", "iterations": n}
        for kind in own.get("verifiers", ("dpo",)):
            done = json.loads((folder / arm / "verifiers" / kind / f"iter_{n:03d}" / "summary.json").read_text())
            assert done["steps"] > 0 and done["skipped"] == 0
        found = json.loads((folder / arm / "selection" / f"iter_{n:03d}.json").read_text())
        assert {"pass", "majority", "best/generator", "best/dpo", "best/random"} <= set(found["curves"])
        assert found["samples"] == config["select"]["samples"]
        rows = [r for r in metrics.read(folder) if r["stage"] == "selection" and r["arm"] == arm]
        assert [r["step"] for r in rows] == [int(k) for k in found["curves"]["pass"]]
        if config["train"].get("lora_rank"):
            assert (folder / arm / "verifiers" / "dpo" / f"iter_{n:03d}" / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("name", QUIET)
def test_a_quiet_star_config_loads_and_all_its_settings_are_known(name, tmp_path):
    for mode in (None, "smoke", "smoke,seed=3"):
        config = module(name).get_config(mode)
        assert isinstance(config, ConfigDict) and config.name == name.removesuffix(".py")
        assert config.seed == (3 if mode and "seed" in mode else 0)
        json.dumps(config.to_dict())
    study = QuietContext.make(config, tmp_path / "run", stub.Silent())  # the texts of the other modes are not here
    recipes = {arm: study.arm_config(quiet_star.QuietConfig, arm) for arm in config.arms}
    assert recipes and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", GRPO)
@pytest.mark.parametrize("mode", [None, "smoke", "smoke,seed=3"])
def test_an_rl_config_loads_and_all_its_settings_are_known(name, mode, tmp_path):
    config = module(name).get_config(mode)
    assert isinstance(config, ConfigDict) and config.name == name.removesuffix(".py")
    assert config.seed == (3 if mode and "seed" in mode else 0)
    ctx = rl.RLContext.make(config, tmp_path / "run", stub.Silent())
    assert ctx.settings.loop.rounds
    assert all(rl.arm_settings(ctx, arm) for arm in config.arms) and not (tmp_path / "run").exists()
    json.dumps(config.to_dict())


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("mode", [None, "smoke", "smoke,seed=3"])
def test_a_guided_config_loads_and_all_its_settings_are_known(name, mode, tmp_path):
    config = module(name).get_config(mode)
    assert isinstance(config, ConfigDict) and config.name == name.removesuffix(".py")
    assert config.seed == (3 if mode and "seed" in mode else 0)
    study = guided_cot.GuidedContext.make(config, tmp_path / "run", stub.Silent())
    assert all(study.rl_settings(arm) for arm in study.arms) and not (tmp_path / "run").exists()
    assert all(r.start == "base" or r.start in study.arms for r in study.arms.values())
    json.dumps(config.to_dict())


def test_the_smoke_mode_of_guided_cot_runs_with_a_random_model_and_shipped_rows():
    folder = smoke_of("guided_cot_hotpotqa.py")
    arms = {row["arm"] for row in json.loads((folder / "results.json").read_text())["arms"]}
    assert {"kd_unfiltered", "rl_both", "standard", "own CoT"} <= arms and (folder / "report.html").exists()


@pytest.mark.parametrize("name", PAIRS)
def test_the_smoke_mode_of_training_on_rows_runs_to_the_end(name):
    folder, arm = smoke_of(name), name.removesuffix(".py")
    assert (folder / arm / "results.json").is_file() and (folder / "report.html").is_file()


@EVERY
def test_smoke_takes_a_random_model_and_shipped_rows_where_none_are_named(name):
    config = json.dumps(module(name).get_config("smoke").to_dict())
    named = module(name).get_config.__doc__
    wanted = "gsm8k" in name or name in ("star_commonsense_qa.py", "v_star_mbpp.py", "guided_cot_hotpotqa.py", *PAIRS)
    assert ("random-tiny" in config) == wanted
    assert ("built-in:" in config) == (wanted and name not in PAIRS)
    if "data=DIR" in named and "model=DIR" in named:
        config = json.dumps(module(name).get_config("smoke,data=D,model=M").to_dict())
        assert "random-tiny" not in config and "built-in:" not in config and '"path": "M"' in config
    assert "random-tiny" not in json.dumps(module(name).get_config().to_dict())


def test_the_smoke_mode_of_guided_cot_runs_to_the_end():
    folder = SMOKE["guided_cot_synth.py"]()
    config = json.loads((folder / "config.json").read_text())
    found = json.loads((folder / "results.json").read_text())
    names = [row["arm"] for row in found["arms"]]
    fixed = {"random object", "standard", "own CoT", "empty rationale", "shuffled gold", "gold rationale"}
    assert fixed | set(config["arms"]) <= set(names) and all(0 <= row["mean"] <= 100 for row in found["arms"])
    assert {"from": "kd_unfiltered", "to": "rl_both_unfiltered"}.items() <= found["differences"][-1].items()
    assert all(d["low"] <= d["difference"] <= d["high"] for d in found["differences"])
    measured = json.loads((folder / "large" / "measured.json").read_text())
    assert {"standard", "cot", "gold", "copied", "headroom"} <= measured.keys()
    rows = read_jsonl(folder / "student_0" / "teacher.jsonl")
    assert len(rows) == 48 and all(len(r["rationale"]) == 7 for r in rows)
    buffer = json.loads((folder / "student_0" / "kd_unfiltered" / "buffer.json").read_text())
    assert buffer["keep_rate"] == 1.0 and buffer["rows"] == 48
    rl_rows = [r for r in metrics.read(folder) if r["stage"] == "rl"]
    assert [r["step"] for r in rl_rows] == [1, 2, 3] and {"reward/accuracy", "reward/factuality"} <= rl_rows[0].keys()
    assert (folder / "report.html").exists()


@pytest.mark.parametrize("name", GRPO)
def test_the_smoke_mode_of_rl_runs_to_the_end(name):
    folder = smoke_of(name)
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "report.html").stat().st_size > 5_000
    for arm in config["arms"]:
        rounds, updates = config["loop"]["rounds"], config["train"]["updates"]
        assert json.loads((folder / arm / "status.json").read_text())["status"] == "finished"
        mine = [r for r in metrics.read(folder) if r["arm"] == arm]
        assert [r["iteration"] for r in mine if r["stage"] == "iteration"] == list(range(rounds + 1))
        rl_rows = [r for r in mine if r["stage"] == "rl"]
        assert [r["step"] for r in rl_rows] == list(range(1, updates + 1))
        assert all(r["skipped"] == 0 and abs(r["kl"]) < 5 and r["response_tokens"] > 0 for r in rl_rows)
        assert all(r["reward/correct"] <= r["reward/parsed"] for r in rl_rows)
        assert rl_rows[0]["kl"] == 0 and abs(rl_rows[0]["approx_kl"]) < 0.1


@pytest.mark.parametrize("study", ["lengths", "official", "fast", "documents=2", "arms=long+pause_long"])
def test_every_study_of_the_tiny_config_loads(study, tmp_path):
    config = module("quiet_star_tiny.py").get_config(study)
    made = QuietContext.make(config, tmp_path / "run", stub.Silent())
    assert len({made.arm_config(quiet_star.QuietConfig, arm) and arm for arm in config.arms}) >= 2


@EVERY
@pytest.mark.parametrize("argument", ["smok", "seed=x", "smoke=perhaps", "seed=1,colour=red"])
def test_an_argument_it_does_not_know_is_named(name, argument):
    with pytest.raises(UserError, match=argument.rpartition(",")[2].partition("=")[0]):
        module(name).get_config(argument)


@pytest.mark.parametrize(
    "name, argument, first, other",
    [
        ("star_gsm8k.py", "svamp,prompts=/p", "svamp", "prompts"),
        ("star_gsm8k.py", "smoke,svamp", "smoke", "svamp"),
        ("grpo_gsm8k.py", "qwen05,svamp", "qwen05", "svamp"),
        ("star_gsm8k.py", "small,qwen05", "small", "qwen05"),
        ("v_star_mbpp.py", "smoke,qwen05", "smoke", "qwen05"),
        ("grpo_gsm8k.py", "smoke,qwen05", "smoke", "qwen05"),
        ("guided_cot_hotpotqa.py", "smoke,qwen05", "smoke", "qwen05"),
        ("guided_cot_hotpotqa.py", "url=http://x,large=L", "url", "large"),
        ("guided_cot_hotpotqa.py", "name=big", "url", "name"),
        ("guided_cot_synth.py", "smoke,arms=kd_loose", "smoke", "arms"),
        ("quiet_star_text.py", "smoke,model=/m", "smoke", "model"),
        ("quiet_star_text.py", "smoke,scratch", "smoke", "scratch"),
        ("quiet_star_text.py", "smoke,data=x,model=m,steps=2", "smoke", "steps"),
        ("quiet_star_mistral_7b.py", "smoke,data=x", "smoke", "data"),
        ("fast_quiet_star.py", "smoke,model=m", "smoke", "model"),
        ("quiet_star_tiny.py", "fast,arms=pause", "fast", "arms"),
        ("quiet_star_tiny.py", "lengths,official", "lengths", "official"),
        ("quiet_star_tiny.py", "smoke,steps=3", "smoke", "steps"),
        ("star_arithmetic.py", "direct,arms=accumulate", "direct", "arms"),
        ("star_arithmetic.py", "loops=2,smoke", "smoke", "loops"),
        ("grpo_arithmetic.py", "smoke,updates=2", "smoke", "updates"),
        ("sft.py", "smoke,epochs=2", "smoke", "epochs"),
        ("dpo.py", "steps=5,epochs=2", "steps", "epochs"),
    ],
)
def test_arguments_of_which_one_would_have_no_effect_are_refused(name, argument, first, other):
    with pytest.raises(UserError, match=rf"config argument {other} .*\b{first}\b") as said:
        module(name).get_config(argument)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    "name, argument",
    [("star_arithmetic.py", "steps=0"), ("star_arithmetic.py", "loops=0"), ("quiet_star_text.py", "steps=0")],
)
def test_a_zero_that_would_be_the_default_is_refused(name, argument):
    with pytest.raises(UserError, match=f"config argument {argument} must be 1 or more; leave it out for the default"):
        module(name).get_config(argument)


def test_an_empty_value_is_refused_and_a_mode_that_is_off_excludes_nothing():
    with pytest.raises(UserError, match="config argument data= is empty"):
        module("star_gsm8k.py").get_config("smoke,data=")
    config = module("star_gsm8k.py").get_config("qwen05,svamp=0,smoke=0,prompts=/p,data=d")
    assert config.name == "star_gsm8k_qwen05"


def test_a_large_model_behind_an_endpoint_has_no_settings_of_a_folder():
    config = module("guided_cot_hotpotqa.py").get_config("qwen05,url=http://x,name=big")
    assert config.guided.large.to_dict() == {"url": "http://x", "model": "big"}


@EVERY
@pytest.mark.parametrize(
    "flag",
    [
        "--config.train.learning_rate=1",
        "--config.trian.lr=1",
        "--config.evaluate.evry=2",
        "--config.colour=1",
    ],
)
def test_a_value_it_does_not_know_is_refused_before_anything_is_written(name, flag, tmp_path, capsys):
    from qstar.__main__ import main

    code = main(["train", f"--config={ROOT}/configs/{name}:smoke", f"--workdir={tmp_path}/run", flag])
    said = capsys.readouterr().err
    assert code == 2 and not (tmp_path / "run").exists()
    assert said.count("\n") == 1 and flag.partition("=")[0].rpartition(".")[2].replace("lr", "trian") in said


@EVERY
def test_its_docstring_names_the_command(name):
    commands = re.findall(r"qstar train --config=(\w+)(?::\S*)? --workdir=\S+", module(name).__doc__)
    assert commands and {f"{command}.py" for command in commands} == {name}


@pytest.mark.parametrize("name", ["v_star_gsm8k.py", "v_star_mbpp.py"])
def test_a_v_star_docstring_is_plain_about_what_was_run(name):
    assert "not run here" in " ".join(module(name).__doc__.split()).lower()


@STAR
def test_its_docstring_is_plain_about_what_was_run(name):
    assert "not run here" in " ".join(module(name).__doc__.split()).lower() or name == "star_arithmetic.py"


@pytest.mark.parametrize("name", QUIET)
def test_the_smoke_mode_of_quiet_star_runs_to_the_end(name):
    folder = smoke_of(name)
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "report.html").stat().st_size > 10_000 and (folder / "environment.json").exists()
    for arm, recipe in config["arms"].items():
        last = json.loads((folder / arm / "summary.json").read_text())["steps"]
        assert 0 < last <= recipe["steps"]
        rows = [r for r in metrics.read(folder) if r["stage"] == "evaluation" and r["arm"] == arm]
        assert rows[-1]["step"] == last and rows[-1]["nll_base/all"] > 0
        thinks = recipe.get("thought_source", "sampled") != "none"
        assert ("nll/all" in rows[-1]) == thinks
        texts = sorted((folder / arm / "thoughts").glob("*.jsonl"))
        assert bool(texts) == thinks
        for text in read_jsonl(texts[-1])[:3] if texts else ():
            assert len(text["base_nll"]) == len(text["tokens"]) - 1 == len(text["thoughts"][0]["tokens"])


@STAR
def test_the_smoke_mode_runs_to_the_end(name):
    folder = smoke_of(name)
    config = json.loads((folder / "config.json").read_text())
    assert (folder / "report.html").stat().st_size > 10_000 and (folder / "environment.json").exists()
    for arm in config["arms"]:
        n = config["loop"]["n_iters"]
        assert json.loads((folder / arm / "status.json").read_text()) == {
            "status": "finished",
            "reason": "",
            "iterations": n,
        }
        rows = [r for r in metrics.read(folder) if r["stage"] == "iteration" and r["arm"] == arm]
        assert [r["iteration"] for r in rows] == list(range(n + 1))
        assert all(r["train_steps"] > 0 and r["trained_rows"] > 0 for r in rows[1:])
        assert sorted(p.name for p in (folder / arm / "rationales").glob("[!.]*")) == [
            f"iter_{i:03d}.jsonl" for i in range(1, n + 1)
        ]
        assert read_jsonl(folder / arm / "evaluation" / "iter_000.jsonl")
        assert list((folder / "tensorboard" / arm).iterdir())


def test_the_papers_settings_stand_in_the_configs_of_its_tasks():
    """2203.14465, appendix H, and the release: 1e-6 after 100 steps, batch 8, 40 x 1.2^n steps."""
    for name in ("star_gsm8k.py", "star_commonsense_qa.py"):
        config = module(name).get_config()
        loop = star.VariantConfig(**config.loop.to_dict())
        assert (loop.restart, loop.steps, loop.problems_per_iter, loop.k) == ("base", "exp:40:1.2", 10_000, 1)
        train = config.train
        assert (train.lr, train.warmup, train.batch_size, train.schedule, train.clip) == (
            1e-6,
            100,
            8,
            "constant",
            1.0,
        )
        assert config.evaluate.split == "val"  # nothing is chosen on the test set
        assert {arm.preset for arm in config.arms.values()} == {"star", "star_norat"}
    assert module("star_commonsense_qa.py").get_config().loop.few_shot_in_train


def test_the_arms_of_the_sums_differ_in_rationalisation_alone(tmp_path):
    config = module("star_arithmetic.py").get_config()
    ctx = RunContext.make(config, tmp_path, stub.Silent())
    arms = arms_from(star.VariantConfig, vars(ctx.settings), "loop", star.PRESETS)
    one, other = arms["rationalisation"], arms["no_rationalisation"]
    differ = {k for k, v in vars(one).items() if v != getattr(other, k)}
    assert differ == {"rationalize"} and one.rationalize
    assert one.seed_share == 0.15 and one.p_keep_hint == 0
