"""The outer loop: its switches, where each training starts from, and when it ends."""

import contextlib
import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from qstar.data.sources import read_jsonl
from qstar.errors import TrainingFailed, UserError
from qstar.methods import star
from qstar.methods.star import VariantConfig, steps_for
from qstar.runs import stages
from qstar.runs.settings import arms_from
from qstar.train import metrics
from qstar.train.loop import Diverged
from tests.methods import stub

# ----------------------------------------------------------------------------------------------- its switches


def test_steps_grow_as_in_the_release():
    """The paper's appendix H and the release's `exponential_grow`."""
    wanted = [40, 48, 57, 69, 82, 99, 119, 143, 171, 206]
    assert [steps_for("exp:40:1.2", n, 1, 1) for n in range(1, 11)] == wanted
    assert steps_for("exp:40:1.2", 20, 1, 1) == 1277 and steps_for("exp:40:1.2", 30, 1, 1) == 7912
    assert [steps_for("lin:300:20", n, 1, 1) for n in (1, 2, 3)] == [300, 320, 340]


def test_steps_in_epochs_count_rows():
    """The release: int(count * (1 + 0.2 (n - 1)) // batch)."""
    assert [steps_for("epochs:1:0.2", n, 1000, 8) for n in (1, 2, 6)] == [125, 150, 250]
    assert steps_for("epochs:3:0", 5, 100, 32) == 9
    assert steps_for("epochs:1:0.2", 1, 3, 8) == 1  # a handful of rows is one update, not none


@pytest.mark.parametrize(
    "spec", ["", "exp", "exp:40", "exp:40:1.2:3", "exp:a:b", "geo:40:1.2", "epochs:1:nan", "lin:inf:1"]
)
def test_a_step_rule_of_no_known_form_is_named(spec):
    with pytest.raises(UserError, match="steps="):
        steps_for(spec, 1, 10, 2)
    with pytest.raises(UserError, match="steps="):
        VariantConfig(steps=spec)


PRESETS = {
    "star": {
        "rationalize": True,
        "k": 1,
        "temperature": None,
        "accumulate": False,
        "include_sft_data": False,
        "restart": "base",
        "p_rationalize": 1.0,
        "p_keep_hint": 0.0,
        "steps": "exp:40:1.2",
        "n_iters": 16,
        "problems_per_iter": 10_000,
        "few_shot_at_sample": True,
        "few_shot_in_train": False,
        "dedupe": True,
        "cap_per_problem": None,
        "max_epochs": 10.0,
    },
    "star_norat": {"rationalize": False, "k": 1, "accumulate": False, "restart": "base"},
    "sft": {"rationalize": False, "k": 0, "n_iters": 1, "include_sft_data": True},
    "star_dagger": {
        "rationalize": False,
        "k": 16,
        "temperature": 0.7,
        "accumulate": True,
        "include_sft_data": True,
        "restart": "base",
    },
    "rft": {
        "rationalize": False,
        "k": 100,
        "temperature": 0.7,
        "n_iters": 1,
        "include_sft_data": True,
        "steps": "epochs:3:0",
        "dedupe": True,
    },
    "rest_em": {
        "rationalize": False,
        "k": 32,
        "temperature": 0.7,
        "cap_per_problem": 10,
        "n_iters": 3,
        "accumulate": False,
        "restart": "base",
    },
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_switches_of_the_one_loop(preset, tmp_path):
    assert set(PRESETS) == set(star.PRESETS)
    ctx = stub.context(tmp_path, loop={}, arms={"star": {"preset": preset}})
    settings = dataclasses.asdict(stub.arm_of(ctx)[1])
    assert {k: settings[k] for k in PRESETS[preset]} == PRESETS[preset]


def test_an_arm_overrides_its_preset_and_the_preset_the_loop(tmp_path):
    arms = {"a": {"preset": "rest_em", "k": 4}, "b": {}}
    ctx = stub.context(tmp_path, loop={"k": 2, "n_iters": 9, "min_kept": 5}, arms=arms)
    a, b = arms_from(VariantConfig, vars(ctx.settings), "loop", star.PRESETS).values()
    assert (a.k, a.n_iters, a.cap_per_problem, a.min_kept) == (4, 3, 10, 5)
    assert (b.k, b.n_iters, b.cap_per_problem, b.min_kept) == (2, 9, None, 5)


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"loop": {"n_itres": 3}}, "config.loop.n_itres"),
        ({"arms": {"star": {"preset": "start"}}}, "config.arms.star.preset='start'"),
        ({"arms": {"star": {"rationalise": True}}}, "config.arms.star.rationalise"),
        ({"loop": {"restart": "last"}}, "restart='last'"),
        ({"loop": {"k": 0}}, "k=0"),
        ({"loop": {"seed_share": 1.5}}, "seed_share=1.5"),
    ],
)
def test_an_unknown_switch_is_named_before_anything_is_written(sections, named, tmp_path):
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        star.run(stub.config(**sections), tmp_path / "run", stub.Silent())
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------- whole, scripted runs


@pytest.fixture
def starts(monkeypatch):
    """What enters every first update: (parameters, optimiser state), as host arrays, in order."""
    seen = []
    made = stages.sft_step

    def spied(config, settings):
        tx, step = made(config, settings)

        def first(state, batch, lr):
            if int(state.step) == 0:
                seen.append(jax.device_get((state.params["policy"], state.opt_state)))
            return step(state, batch, lr)

        return tx, first

    monkeypatch.setattr(stages, "sft_step", spied)
    return seen


def play(tmp_path, monkeypatch, write, answer=None, fails="", **sections):
    """Runs the scripted job; returns (its folder, every arm's last model, what was asked of the sampler)."""
    models = {}
    outer = star.outer_loop
    monkeypatch.setattr(star, "outer_loop", lambda arm, *rest: models.setdefault(arm.name, outer(arm, *rest)))
    asked = stub.script(monkeypatch, write, answer)
    with pytest.raises(TrainingFailed, match=fails) if fails else contextlib.nullcontext():
        star.run(stub.config(**sections), tmp_path / "run", stub.Silent())
    return tmp_path / "run", models, asked


def gold(problem, hinted, n):
    return problem.solution


def same(a, b):
    leaves = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in leaves)


def saved(folder):
    """The parameters that a fine-tuning left in a folder, read by orbax alone."""
    import orbax.checkpoint as ocp

    (at,) = (folder / "model").glob("*/state")
    return ocp.PyTreeCheckpointer().restore(at)


def status(run, arm="star"):
    return json.loads((run / arm / "status.json").read_text())


def test_a_loop_starts_from_the_base_or_from_the_model_before(tmp_path, monkeypatch, starts):
    arms = {"base_": {"restart": "base"}, "previous": {"restart": "previous"}}
    run, models, _ = play(tmp_path, monkeypatch, gold, loop={"n_iters": 3, "steps": "lin:2:0"}, arms=arms)
    assert len(starts) == 1 + 2 * 3  # the base's own training first
    base = saved(run / "base")
    trained = {arm: [saved(run / arm / "checkpoints" / f"iter_{n:03d}") for n in (1, 2, 3)] for arm in arms}
    assert [same(params, base) for params, _ in starts[1:4]] == [True] * 3
    assert [same(params, before) for (params, _), before in zip(starts[4:], [base, *trained["previous"]])] == [True] * 3
    assert not any(same(model, base) for made in trained.values() for model in made)
    assert all(same(models[arm].params, trained[arm][-1]) for arm in arms)


def test_every_loop_starts_with_empty_moments(tmp_path, monkeypatch, starts):
    play(tmp_path, monkeypatch, gold, loop={"restart": "previous", "n_iters": 2, "steps": "lin:2:0"})
    assert len(starts) == 3
    for _, moments in starts:
        leaves = [x for x in jax.tree.leaves(moments) if getattr(x, "size", 0)]
        assert len(leaves) > 10 and not any(np.any(x) for x in leaves)


def test_without_a_learning_rate_every_model_is_the_base(tmp_path, monkeypatch):
    for restart in ("base", "previous"):
        run, models, _ = play(
            tmp_path / restart,
            monkeypatch,
            gold,
            loop={"restart": restart, "steps": "lin:2:0", "n_iters": 2},
            train={"lr": 0.0},
        )
        assert same(models["star"].params, saved(run / "base"))


def test_a_loop_that_keeps_nothing_ends_the_arm_and_the_model_before_stays(tmp_path, monkeypatch, starts):
    run, models, asked = play(
        tmp_path,
        monkeypatch,
        lambda p, hinted, n: p.solution if n == 1 else "#0",
        loop={"n_iters": 4, "steps": "lin:2:0"},
    )
    found = status(run)
    assert found["status"] == "stopped" and found["iterations"] == 1
    assert found["reason"].startswith("0 rows kept of 28 attempts")  # 14 problems, all of them also with their hint
    assert same(models["star"].params, saved(run / "star" / "checkpoints" / "iter_001"))
    assert not (run / "star" / "checkpoints" / "iter_002").exists() and len(starts) == 2
    assert {r["verdict"] for r in read_jsonl(run / "star" / "rationales" / "iter_002.jsonl")} == {"rejected"}
    assert max(n for _, _, n, _ in asked) == 2
    assert [r["iteration"] for r in metrics.read(run) if r["stage"] == "iteration"] == [0, 1]


def test_a_first_loop_that_keeps_nothing_leaves_the_base(tmp_path, monkeypatch, starts):
    arms = {"one": {}, "two": {"preset": "star_norat"}}
    fails = "no arm has trained a model: arm one: 0 rows kept of 28 attempts"
    run, models, _ = play(tmp_path, monkeypatch, lambda *_: None, fails=fails, arms=arms)
    assert len(starts) == 1  # the base's training is the only one
    for arm, attempts in (("one", 28), ("two", 14)):
        assert status(run, arm)["iterations"] == 0
        assert status(run, arm)["reason"].startswith(f"0 rows kept of {attempts} attempts")
        assert same(models[arm].params, saved(run / "base"))


def test_patience_may_not_choose_by_test_problems(tmp_path):
    with pytest.raises(
        UserError, match="patience=2 would choose a loop by test problems; set config.evaluate.split='val'"
    ):
        star.run(stub.config(loop={"patience": 2}, evaluate={"split": "test"}), tmp_path / "run", stub.Silent())
    assert not (tmp_path / "run").exists()


def test_fewer_rows_than_asked_for_end_the_arm(tmp_path, monkeypatch):
    def write(problem, hinted, n):
        return problem.solution if len(problem.id) == 5 else None  # the four sums of two digits

    run, _, _ = play(tmp_path, monkeypatch, write, loop={"min_kept": 4, "n_iters": 1, "steps": "lin:2:0"})
    assert status(run) == {"status": "finished", "reason": "", "iterations": 1}
    fails = "no arm has trained a model: arm star: 4 rows kept"
    run, _, _ = play(tmp_path / "b", monkeypatch, write, fails=fails, loop={"min_kept": 5, "n_iters": 1})
    assert (
        status(run)["status"] == "stopped"
        and "4 rows kept" in status(run)["reason"]
        and "min_kept=5" in status(run)["reason"]
    )


@pytest.mark.parametrize(("patience", "loops"), [(1, 3), (2, 4), (0, 5)])
def test_patience_counts_loops_without_a_better_accuracy(patience, loops, tmp_path, monkeypatch):
    """Accuracies 0, 1/12, 6/12, 6/12, 1/12, ...: the best is loop 2's, and one as good is not better."""
    right = {0: 0, 1: 1, 2: 6, 3: 6}

    def evaluate(problem, hinted, n):
        return problem.solution if problem in problems[: right.get(n, 1)] else None

    problems = stub.context(tmp_path).task.problems("val")
    run, _, _ = play(
        tmp_path,
        monkeypatch,
        gold,
        evaluate,
        loop={"n_iters": 5, "patience": patience, "steps": "lin:2:0"},
        evaluate={"split": "val", "hinted": False},
    )
    scores = [r["accuracy"] for r in metrics.read(run) if r["stage"] == "iteration"]
    assert scores[:4] == [right[n] / len(problems) for n in range(4)][: len(scores)]
    assert len(scores) - 1 == status(run)["iterations"] == loops
    assert status(run)["status"] == ("stopped" if patience else "finished")
    if patience:
        assert f"no better validation accuracy for {patience} loops" in status(run)["reason"]
    (tested,) = [r for r in metrics.read(run) if r["stage"] == "test"]
    assert tested["iteration"] == 2  # chosen on "val"; "test" is read once, with that model


def test_the_test_split_is_answered_by_the_chosen_model(tmp_path, monkeypatch):
    """`evaluate.split=val` chooses: "test" is answered by the model of the best loop, not of the last."""
    from qstar.runs import context as run_context

    def evaluate(problem, hinted, n):
        return problem.solution if n == 1 else None

    used = {}
    stub.script(monkeypatch, gold, evaluate)
    scripted = run_context.sample_rollouts

    def attempt(model, *args, **kwargs):
        used[kwargs["stage"]] = model.params
        return scripted(model, *args, **kwargs)

    monkeypatch.setattr(run_context, "sample_rollouts", attempt)
    config = stub.config(
        loop={"n_iters": 2, "steps": "lin:2:0", "restart": "previous"},
        evaluate={"split": "val", "hinted": False},
    )
    star.run(config, tmp_path / "run", stub.Silent())
    assert same(used["test"], saved(tmp_path / "run/star/checkpoints/iter_001"))
    assert same(used["iter_002"], saved(tmp_path / "run/star/checkpoints/iter_002"))


def test_without_samples_the_gold_solutions_are_trained_on(tmp_path, monkeypatch):
    def none(*_):
        raise AssertionError("nothing is to be sampled")

    arms = {"star": {"preset": "sft", "steps": "lin:2:0"}}
    run, _, _ = play(tmp_path, monkeypatch, none, lambda p, hinted, n: p.solution, arms=arms, loop={})
    (found,) = [r for r in metrics.read(run) if r["stage"] == "iteration" and r["iteration"] == 1]
    assert (found["trained_rows"], found["attempted"], found["kept"]) == (14, 0, 0)
    for wrong in ({"k": 0}, {"k": 0, "include_sft_data": True}):
        with pytest.raises(UserError, match="k=0 samples nothing"):
            VariantConfig(**wrong)


@pytest.mark.parametrize(("cap", "steps"), [(None, 9), (10.0, 9), (2.0, 7), (0.01, 1)])
def test_updates_are_capped_in_epochs_over_the_kept_rows(cap, steps, tmp_path, monkeypatch):
    """14 rows of one example each at batch 4: two epochs are 7 updates."""
    run, _, _ = play(tmp_path, monkeypatch, gold, loop={"n_iters": 1, "steps": "lin:9:0", "max_epochs": cap})
    (found,) = [r for r in metrics.read(run) if r["stage"] == "iteration" and r["iteration"] == 1]
    assert (found["trained_rows"], found["train_steps"]) == (14, steps)


def test_epochs_are_counted_in_packed_rows(tmp_path, monkeypatch):
    """Several examples share a row, and a batch is made of rows: one epoch is one pass over the rows."""
    ctx = stub.context(
        tmp_path,
        train={"packed": True, "row_length": 128},
        loop={"n_iters": 1, "steps": "lin:99:0", "max_epochs": 4.0},
    )
    pool = ctx.task.pool(1, ctx.seed)
    examples = [ctx.seed_example(p, False) for p in pool]
    rows = len(stages.pack_rows(examples, ctx.settings.train)["tokens"])
    assert rows <= 4 < len(examples)
    asked = {}

    def fine_tune(start, examples, stage, **_):
        asked["steps"] = stage.steps
        return start, {"tokens": 1.0, "steps": stage.steps, "loss": 0.0}

    monkeypatch.setattr(star, "fine_tune", fine_tune)
    ctx.writer = None
    arm, loop = stub.arm_of(ctx)
    start = types.SimpleNamespace(config=ctx.config)  # of no encoder-decoder
    star.train(arm, loop, start, examples, 1)
    assert asked["steps"] == 4 * rows // 4
    star.train(arm, dataclasses.replace(loop, steps="epochs:8:0", max_epochs=None), start, examples, 1)
    assert asked["steps"] == 8 * rows // 4


def test_divergence_ends_the_arm_with_the_model_before(tmp_path, monkeypatch):
    made = star.fine_tune

    def fine_tune(start, examples, stage, **rest):
        if "iter_002" in str(stage.folder):
            raise Diverged("20 updates in a row were not finite, up to step 20; lower the learning rate")
        return made(start, examples, stage, **rest)

    monkeypatch.setattr(star, "fine_tune", fine_tune)
    loop = {"n_iters": 4, "steps": "lin:2:0"}
    run, models, _ = play(tmp_path, monkeypatch, gold, fails="arm star, loop 2: 20 updates", loop=loop)
    assert (
        status(run)["status"] == "stopped" and status(run)["iterations"] == 1 and "not finite" in status(run)["reason"]
    )
    assert same(models["star"].params, saved(run / "star/checkpoints/iter_001"))


def test_a_base_that_diverges_is_a_mistake_of_the_settings(tmp_path, monkeypatch):
    config = stub.config(base={"lr": 1e38, "steps": 4, "max_bad": 3, "clip": 0.0, "log_every": 4, "warmup": 0})
    stub.script(monkeypatch, gold)
    for _ in range(2):  # and again when it is started again
        with pytest.raises(UserError, match="config.base.lr=1e"):
            star.run(config, tmp_path / "run", stub.Silent())
    assert not (tmp_path / "run" / "star").exists()


# ------------------------------------------------------------------------------------ hinted seeds in the mix


def test_every_batch_of_both_arms_holds_the_share_of_hinted_seeds(tmp_path, monkeypatch):
    batches, seen = stages.batches, {}

    def spied(arrays, batch_size, *, mix, **rest):
        inner = batches(arrays, batch_size, mix=mix, **rest)
        seen.setdefault(len(seen), (arrays, mix, [inner[s] for s in range(40)]))
        return inner

    monkeypatch.setattr(stages, "batches", spied)
    arms = {"rat": {"preset": "star"}, "norat": {"preset": "star_norat"}}
    play(
        tmp_path,
        monkeypatch,
        lambda p, hinted, n: p.solution if hinted or p.group == "1" else None,
        arms=arms,
        loop={"n_iters": 1, "steps": "lin:2:0", "seed_share": 0.25},
        train={"batch_size": 8},
    )
    ctx = stub.context(tmp_path)
    bracket = ctx.tokenizer.encode("(")[0]
    gold_rows = {tuple(ctx.seed_example(p, True).prompt) for p, hinted in ctx.task.seeds() if hinted}
    assert len(seen) == 3 and seen[0][1] is None  # the base has no mix
    for arrays, mix, made in (seen[1], seen[2]):
        assert mix[1] == 0.25 and not np.any(arrays["tokens"] == bracket)  # none of the arm's own rows shows a hint
        mixed = {tuple(row[: list(row).index(ctx.tokenizer.encode(")")[0]) + 1]) for row in mix[0]["tokens"]}
        assert mixed == gold_rows
        for batch in made:
            assert np.any(batch["tokens"] == bracket, axis=1).sum() == 2 == round(0.25 * 8)
    assert len(seen[1][0]["tokens"]) != len(seen[2][0]["tokens"])  # one arm has the rationalised rows besides
