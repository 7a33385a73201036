"""V-STaR's loop with scripted samplers and trainers: what enters D_GEN and D_VER, and what is trained on what, per preset."""

import json
import shutil

import pytest

from qstar.data.sources import read_jsonl
from qstar.errors import TrainingFailed, UserError
from qstar.methods import star, v_star, v_star_eval
from qstar.methods.v_star import VStarContext
from qstar.runs import context
from qstar.runs.context import Arm
from qstar.runs.settings import arms_from
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.tokenizer import char_tokenizer
from qstar.train import metrics
from tests.methods import stub


class Fake:
    """A model that is only a name."""

    config = None
    params: dict = {}

    def __init__(self, name):
        self.name = name


def context_of(tmp_path, preset, **own):
    from configs.v_star_arithmetic import get_config

    config = get_config("smoke")
    config.task.pool, config.task.seeds = {"1": 6}, {"1": (4, 0)}
    config.task.update(eval_digits=[1], eval_per_length=4)
    config.sft = {"problems": 3, "steps": "lin:2:0"}
    config.loop = {"n_iters": 3, "k": 2, "steps": "lin:2:0"}
    config.select.update(samples=2)
    config.arms = {"arm": {"preset": preset, "k": 2, **own}}
    ctx = VStarContext.make(config, tmp_path, stub.Silent())
    ctx.tokenizer = char_tokenizer(ALPHABET, pad=PAD, eos=EOS)
    ctx.start()
    return ctx


@pytest.fixture
def calls(monkeypatch):
    """Scripted stages. Of problems whose first digit is odd, sample 0 is right (`right`, another text in every iteration);
    sample 1 is wrong. Returns what was done, in order."""
    log = []

    def attempt(model, task, problems, settings, *, stage, k=1, iteration=0, **_):
        log.append(("sample" if stage == "sample" else "test", model.name, iteration))
        rows = []
        for p in problems:
            odd = int(p.id[0]) % 2
            for j in range(k):
                text = right(p, iteration) if odd and j == 0 else f"#{iteration}{j}"
                rows.append(stub.rollout(task, p, text, iteration=iteration, sample=j))
        return rows

    def train(arm, loop, start, examples, n):
        rows = sorted(arm.ctx.tokenizer.decode(e.prompt + e.completion) for e in examples)
        log.append(("sft", start.name, rows))
        return Fake(f"G{n}"), {"trained_rows": len(rows)}

    def dpo(sft, pairs, stage, bar):
        log.append(("dpo", sft.name, pairs))
        return Fake("V"), {"steps": 1, "loss": 0.5, "accuracy": 1.0, "pairs": len(pairs)}

    def head(sft, kind, solutions, task, problems, stage, labels, bar):
        log.append((kind, sft.name, solutions))
        assert {s.problem_id for s in solutions} <= problems.keys()
        return Fake(kind), {"steps": 1, "loss": 0.5, "accuracy": 1.0}

    monkeypatch.setattr(star, "sample_rollouts", attempt)
    monkeypatch.setattr(v_star_eval, "sample_rollouts", attempt)
    monkeypatch.setattr(context, "sample_rollouts", attempt)
    monkeypatch.setattr(star, "train", train)
    monkeypatch.setattr(v_star, "train_dpo", dpo)
    monkeypatch.setattr(v_star, "train_head", head)
    monkeypatch.setattr(v_star_eval, "score", lambda v, prompts, texts: __import__("numpy").zeros(len(texts)))
    return log


def loop_of(ctx, name):
    return arms_from(v_star.VStarConfig, vars(ctx.settings), "loop", v_star.PRESETS)[name]


def go(ctx):
    loop = loop_of(ctx, "arm")
    arm = Arm(ctx, "arm")
    v_star.outer_loop(arm, loop, Fake("base"), Fake("G_SFT"), v_star.supervised_data(ctx))
    return arm


def right(problem, n):
    """What the script of iteration n answers."""
    return "|" * n + f"#{problem.gold}"


def test_v_star_accumulates_restarts_from_the_base_and_trains_one_verifier_from_g_sft(tmp_path, calls):
    ctx = context_of(tmp_path, "v_star")
    go(ctx)
    kinds = [(kind, name) for kind, name, *_ in calls if kind != "test"]
    assert kinds == [("sample", "G_SFT"), ("sft", "base"), ("sample", "G1"), ("sft", "base"), ("sample", "G2"),
                     ("sft", "base"), ("dpo", "G_SFT")]  # fmt: skip
    odd = [p for p in ctx.task.pool(1, ctx.seed, None) if int(p.id[0]) % 2]
    gold = [s.prompt + s.completion for s in v_star.supervised_data(ctx)]
    for n, rows in enumerate([rows for kind, _, rows in calls if kind == "sft"], 1):
        assert rows == sorted(gold + [ctx.task.prompt(p) + right(p, m) for p in odd for m in range(1, n + 1)])


def test_the_buffers_hold_who_found_what_and_the_pairs_come_from_all_of_them(tmp_path, calls):
    ctx = context_of(tmp_path, "v_star")
    arm = go(ctx)
    d_ver = [row for n in range(4) for row in read_jsonl(arm.folder / "d_ver" / f"iter_{n:03d}.jsonl")]
    d_gen = [row for n in range(4) for row in read_jsonl(arm.folder / "d_gen" / f"iter_{n:03d}.jsonl")]
    assert all(row["correct"] for row in d_gen) and {r["source"] for r in d_gen} == {"human", "model"}
    assert {(r["iteration"], r["source"]) for r in d_ver if not r["correct"]} == {(n, "model") for n in (1, 2, 3)}
    assert [r for r in d_ver if r["source"] == "human"] == [r for r in d_gen if r["source"] == "human"]
    pairs = next(what for kind, _, what in calls if kind == "dpo")
    wrong = {r["completion"] for r in d_ver if not r["correct"]}
    assert pairs and {p.rejected for p in pairs} <= wrong and {p.rejected[1] for p in pairs} == {"1", "2", "3"}


def test_an_arm_that_trains_no_generator_and_no_verifier_fails_the_run(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(v_star.data, "build_pairs", lambda *_: [])
    ctx = context_of(tmp_path, "verification")
    arm = go(ctx)
    with pytest.raises(TrainingFailed, match="no arm has trained a model: arm arm: neither a generator nor a verif"):
        ctx.close()
    found = json.loads((arm.folder / "status.json").read_text())
    assert found["status"] == "stopped" and (arm.folder / "selection" / "iter_001.json").exists()


@pytest.mark.parametrize(
    "preset, samples, generators, verified",
    [
        ("sft", [], [], []),
        ("verification", ["G_SFT"], [], ["dpo"]),
        ("star", ["G_SFT", "G1", "G2"], ["model"] * 3, []),
        ("rft", ["G_SFT"], ["both"], []),
        ("star_dagger", ["G_SFT", "G1", "G2"], ["both"] * 3, []),
        ("v_star_1iter", ["G_SFT"], ["both"], ["dpo"]),
        ("v_star", ["G_SFT", "G1", "G2"], ["both"] * 3, ["dpo"]),
    ],
)
def test_the_rows_of_the_table_of_baselines(tmp_path, calls, preset, samples, generators, verified):
    """2402.06457, table 1: data of the generator, data of the verifier, iterative or not."""
    ctx = context_of(tmp_path, preset)
    go(ctx)
    gold = {s.prompt + s.completion for s in v_star.supervised_data(ctx)}
    assert [name for kind, name, *_ in calls if kind == "sample"] == samples
    trained = [(name, set(rows)) for kind, name, rows in calls if kind == "sft"]
    assert all(name == "base" for name, _ in trained) and len(trained) == len(generators)
    for (_, rows), what in zip(trained, generators):
        assert (gold <= rows) == (what == "both") and rows - gold
    assert [kind for kind, *_ in calls if kind == "dpo"] == verified
    assert v_star.PRESETS[preset].get("k", 16) * max(1, len(samples)) in (16, 48)  # as many samples in all


def test_iterative_rpo_goes_on_from_the_generator_before_with_pairs_of_its_own_samples(tmp_path, calls):
    ctx = context_of(tmp_path, "rpo")
    arm = go(ctx)
    assert [(kind, name) for kind, name, *_ in calls if kind != "test"] == [
        ("sample", "G_SFT"), ("dpo", "G_SFT"), ("sample", "V"), ("dpo", "V"), ("sample", "V"), ("dpo", "V")]  # fmt: skip
    odd = {p.id: p for p in ctx.task.pool(1, ctx.seed, None) if int(p.id[0]) % 2}
    for n, pairs in enumerate([pairs for kind, _, pairs in calls if kind == "dpo"], 1):
        assert {(p.problem_id, p.chosen, p.rejected) for p in pairs} == {
            (i, right(p, n), f"#{n}1") for i, p in odd.items()
        }
    rows = [r for r in metrics.read(tmp_path) if r["stage"] == "iteration" and r["iteration"]]
    assert [r["trained_rows"] for r in rows] == [len(odd)] * 3 and rows[0]["rpo_accuracy"] == 1.0
    assert not (arm.folder / "verifiers").exists()


def test_a_verifier_in_every_iteration_and_other_kinds_if_asked_for(tmp_path, calls):
    ctx = context_of(tmp_path, "v_star", verifier_every_iter=True, verifiers=("dpo", "orm", "prm"))
    arm = go(ctx)
    kinds = [kind for kind, *_ in calls if kind in ("dpo", "orm", "prm")]
    assert kinds == ["dpo", "orm", "prm"] * 3
    sizes = [len(what) for kind, _, what in calls if kind == "orm"]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert sorted(p.name for p in (arm.folder / "selection").glob("iter_*.json")) == [
        f"iter_{n:03d}.json" for n in (1, 2, 3)
    ]
    found = json.loads((arm.folder / "selection" / "iter_003.json").read_text())
    assert {"best/generator", "best/dpo", "best/dpo_logratio", "best/orm", "best/prm_min", "best/random"} <= set(
        found["curves"]
    )


def test_samples_of_g_sft_are_shared_by_arms_with_equally_many(tmp_path, calls, monkeypatch):
    folders = []
    inner = star.sample_rollouts

    def attempt(*args, folder, seed, **kw):
        folders.append((folder.relative_to(tmp_path), seed))
        return inner(*args, **kw)

    monkeypatch.setattr(star, "sample_rollouts", attempt)
    ctx = context_of(tmp_path, "v_star")
    ctx.settings.arms["other"] = {"preset": "v_star", "k": 2}
    for name in ("arm", "other"):
        loop = loop_of(ctx, name)
        v_star.outer_loop(Arm(ctx, name), loop, Fake("base"), Fake("G_SFT"), v_star.supervised_data(ctx))
    assert folders[0] == folders[3] and len({f for f in folders}) == 5


@pytest.mark.parametrize(
    "own", [{"problems_per_iter": 3}, {"few_shot_at_sample": False}, {"fresh": True, "problems_per_iter": 4}]
)
def test_arms_that_ask_g_sft_otherwise_have_samples_of_their_own(tmp_path, calls, monkeypatch, own):
    folders = {}
    inner = star.sample_rollouts

    def attempt(model, task, problems, *args, folder, iteration, **kw):
        if iteration == 1:
            folders.setdefault(folder, []).append([p.id for p in problems])
        return inner(model, task, problems, *args, iteration=iteration, **kw)

    monkeypatch.setattr(star, "sample_rollouts", attempt)
    ctx = context_of(tmp_path, "v_star")
    ctx.settings.arms["other"] = {"preset": "v_star", "k": 2, **own}
    for name in ("arm", "other"):
        loop = loop_of(ctx, name)
        v_star.outer_loop(Arm(ctx, name), loop, Fake("base"), Fake("G_SFT"), v_star.supervised_data(ctx))
    assert len(folders) == 2 and all(len(asked) == 1 for asked in folders.values())


@pytest.mark.parametrize("few_shot", [True, False])
def test_an_arm_is_measured_with_the_prompts_that_it_samples_with(tmp_path, calls, monkeypatch, few_shot):
    """Greedy answers, test samples and the samples themselves: all with the few-shot text in front, or none."""
    seen = set()
    inner = star.sample_rollouts

    def attempt(*args, stage, **kw):
        seen.add((stage.split("_")[0], kw.get("few_shot", True)))
        return inner(*args, stage=stage, **kw)

    for module in (star, v_star_eval, context):
        monkeypatch.setattr(module, "sample_rollouts", attempt)
    ctx = context_of(tmp_path / "run", "v_star")
    ctx.writer.close()
    shutil.rmtree(tmp_path / "run")
    ctx.settings.loop["few_shot_at_sample"] = few_shot
    base = Fake("base")
    monkeypatch.setattr(v_star.base_model, "checked", lambda *_: base)
    monkeypatch.setattr(v_star.base_model, "show_parameters", lambda *_: None)
    monkeypatch.setattr(v_star.base_model, "train_on_seeds", lambda *_: base)
    monkeypatch.setattr(v_star, "supervised", lambda *_: Fake("G_SFT"))
    monkeypatch.setattr(v_star.VStarContext, "make", lambda *_: ctx)
    v_star.run(ctx.config, tmp_path / "run", stub.Silent())
    v_star.gate_metrics(ctx, Fake("G_SFT"))
    assert seen == {(stage, few_shot) for stage in ("iter", "sample", "samples", "val")}


@pytest.mark.parametrize(
    "own",
    [
        {"verifiers": ("dop",)},
        {"rationalize": True},
        {"accumulate": False},
        {"update": "dpo"},
        {"few_shot_in_train": True},
        {"patience": 2},
    ],
)
def test_switches_that_make_no_sense_are_named(own, tmp_path):
    ctx = context_of(tmp_path, "v_star", **own)
    with pytest.raises(UserError, match=next(iter(own))):
        loop_of(ctx, "arm")


@pytest.mark.parametrize("human", [False, True])
def test_a_sample_that_equals_the_human_solution_counts_as_the_models(tmp_path, calls, monkeypatch, human):
    """It is sampled most often, so that the cap of 1 keeps it and not another right one; once where both are trained on."""
    own = {"n_iters": 1, "k": 1, "cap_per_problem": 1, "include_sft_data": human, "verifiers": ()}
    ctx = context_of(tmp_path, "v_star", **own)
    monkeypatch.setattr("tests.methods.test_v_star.right", lambda p, n: ctx.task.solution(p))
    go(ctx)
    (rows,) = (rows for kind, _, rows in calls if kind == "sft")
    odd = [p for p in ctx.task.pool(1, ctx.seed, None) if int(p.id[0]) % 2]
    gold = [s.prompt + s.completion for s in v_star.supervised_data(ctx)] if human else []
    sampled = [ctx.task.prompt(p) + ctx.task.solution(p) for p in odd]
    assert rows == sorted({*gold, *sampled}) and sampled


def test_verifiers_know_the_problems_of_all_iterations(tmp_path, calls):
    """`calls` compares the solutions with the problems that the head is given."""
    go(context_of(tmp_path, "v_star", fresh=True, problems_per_iter=2, verifiers=("orm",)))
    (solutions,) = (rows for kind, _, rows in calls if kind == "orm")
    assert len({s.problem_id for s in solutions}) > 2


def test_arms_share_the_prompts_that_g_sft_is_trained_with(tmp_path):
    ctx = context_of(tmp_path, "star_dagger", few_shot_in_train=True)
    with pytest.raises(UserError, match="config.arms.arm.few_shot_in_train: all arms start from one G_SFT"):
        v_star.run(ctx.config, tmp_path / "run", stub.Silent())


def test_data_without_solutions_is_refused(tmp_path, monkeypatch):
    ctx = context_of(tmp_path, "v_star")
    monkeypatch.setattr(type(ctx.task), "solution", lambda self, problem: None)
    with pytest.raises(UserError, match="D_SFT"):
        v_star.supervised_data(ctx)
