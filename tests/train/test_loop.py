"""A run that stops anywhere and goes on ends with the same bits; what cannot be restored is named; divergence stops."""

from __future__ import annotations

import errno
import functools
import gc
import math
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qstar import UserError, preemption
from qstar.errors import Unreachable
from qstar.train import optim
from qstar.train.checkpoint import Checkpoints
from qstar.train.loop import Diverged, fit
from qstar.train.profile import Watch
from qstar.train.state import create_state, optimizer_for
from qstar.train.step import make_step
from tests.train.problem import batch, loss, params, same

STEPS = 9
TX = optimizer_for(optim.adamw(weight_decay=0.1), "kernel|scale")  # the state has empty places, too
STEP = make_step(functools.partial(loss, noise=0.5), TX)
lr_at = optim.schedule("cosine", 0.05, warmup=3, steps=STEPS)


def fresh():
    return create_state(params(), TX, seed=7)


def saved(folder):
    """The steps of the finished checkpoints in a folder."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def run(folder=None, batch_at=batch, steps=STEPS, **settings):
    """Trains to the end, with checkpoints if a folder is given; returns the last Progress."""
    checkpoints = Checkpoints(folder) if folder else None
    try:
        *_, last = fit(
            fresh(),
            lambda s: STEP,
            batch_at,
            lr_at,
            steps=steps,
            checkpoints=checkpoints,
            **{"log_every": 4, **settings},
        )
        return last
    finally:
        if checkpoints:
            checkpoints.close()


class Killed(BaseException):
    """A process that dies."""


def until(stop):
    """Batches up to update `stop`, where the process is killed."""

    def at(step):
        if step == stop:
            raise Killed
        return batch(step)

    return at


def untimed(metrics):
    return {k: v for k, v in metrics.items() if not any(word in k for word in ("second", "recompiles"))}


@pytest.fixture(scope="module")
def whole():
    return run()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "training"
    run(folder)
    return folder


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_stopped_after_any_step_and_restarted_ends_with_the_same_bits(stop, whole, tmp_path):
    """Checkpoints at 3 and 6: up to three updates are done twice, from the same batches, keys and rates."""
    with pytest.raises(Killed):
        run(tmp_path, until(stop), save_every=3)
    assert saved(tmp_path) == ([] if stop < 3 else [3] if stop < 6 else [3, 6])
    again = run(tmp_path, save_every=3)
    assert again.step == STEPS and int(again.state.step) == STEPS
    same(again.state, whole.state)
    assert untimed(again.metrics) == untimed(whole.metrics)


def test_a_finished_run_only_loads_and_a_longer_one_goes_on(finished, whole, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    again = run(tmp_path / "copy", batch_at=None)  # no batch is asked for
    assert again.step == STEPS and untimed(again.metrics) == untimed(whole.metrics)
    same(again.state, whole.state)
    same(run(tmp_path / "copy", steps=STEPS + 3).state, run(steps=STEPS + 3).state)


def test_nothing_is_overwritten(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    checkpoints = Checkpoints(tmp_path / "copy")
    files = {f: f.read_bytes() for f in (tmp_path / "copy" / str(STEPS)).rglob("*") if f.is_file()}
    checkpoints.save(STEPS, jax.tree.map(lambda x: x, fresh()), {"other": 1})
    checkpoints.close()
    assert {f: f.read_bytes() for f in files} == files


def test_on_a_cpu_a_checkpoint_is_on_disk_before_the_next_update(tmp_path):
    """Its copies and the temporaries of the update would need memory at once."""
    seen = []

    def step_at(n):
        def step(*arguments):
            seen.append(sorted(p.name for p in tmp_path.iterdir()))
            return STEP(*arguments)

        return step

    state = create_state(params(), TX, seed=0)
    list(fit(state, step_at, batch, lr_at, steps=3, checkpoints=Checkpoints(tmp_path), save_every=1, log_every=1))
    assert seen == [[], ["1"], ["1", "2"]]


def test_the_newest_checkpoints_stay_with_their_records(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 5, 9):
        checkpoints.save(step, {"w": jnp.full(3, float(step))}, {"step": step})
    checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["5", "9"]
    assert (checkpoints.restore({"w": jnp.zeros(3)})[0]["w"] == 9).all()
    state, record = checkpoints.restore({"w": jnp.zeros(3)}, 5)
    assert record == {"step": 5} and (state["w"] == 5).all()
    checkpoints.close()


@pytest.mark.parametrize("when", ["before the last update", "while it is saved"])
def test_told_to_end_in_its_last_update_a_run_does_not_go_on_to_what_follows(when, tmp_path, monkeypatch):
    """All of it is saved, and `Preempted` is raised, so that no evaluation keeps the machine."""
    tell = lambda: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    save = Checkpoints.save
    if when == "while it is saved":
        monkeypatch.setattr(Checkpoints, "save", lambda self, *a, **k: (save(self, *a, **k), tell()))
    early = lambda s: (tell() if s == STEPS - 1 and when != "while it is saved" else None, batch(s))[1]  # noqa: E731
    with preemption.listening(), pytest.raises(preemption.Preempted):
        run(tmp_path, early)
    monkeypatch.undo()
    assert run(tmp_path, batch_at=None).step == STEPS


def test_means_are_over_the_updates_since_the_last_report():
    host = STEP(fresh(), batch(0), np.float32(lr_at(0)))[1]
    one = [at for at in fit(fresh(), lambda s: STEP, batch, lr_at, steps=STEPS, log_every=1)]
    four = [at.step for at in fit(fresh(), lambda s: STEP, batch, lr_at, steps=STEPS, log_every=4)]
    assert four == [4, 8, 9] and [at.step for at in one] == list(range(1, STEPS + 1))
    assert one[0].metrics["loss"] == pytest.approx(float(host["loss"]))
    assert one[0].metrics["tokens"] == batch(0)["mask"].sum()
    last = [at.metrics for at in fit(fresh(), lambda s: STEP, batch, lr_at, steps=STEPS, log_every=4)]
    assert last[1]["loss"] == pytest.approx(np.mean([at.metrics["loss"] for at in one[4:8]]))
    m = last[0]
    assert m["tokens_per_second"] == pytest.approx(m["tokens"] / m["seconds_per_step"])


def test_after_a_resume_seconds_are_of_all_updates_and_mfu_of_this_process(tmp_path):
    class Clock(Watch):
        seconds = None

        def report(self, seconds):
            Clock.seconds = seconds
            return {}

    checkpoints = Checkpoints(tmp_path)
    state = fresh()
    for step in range(2):
        state, found = STEP(state, batch(step), np.float32(lr_at(step)))
    window = [{k: float(v) for k, v in found.items()}] * 2
    checkpoints.save(2, state, {"window": window, "bad": 0, "learnt": 2, "seconds": 1000.0, "extra": {}})
    how = dict(checkpoints=checkpoints, steps=4, log_every=4, watch=Clock())
    *_, last = fit(fresh(), lambda s: STEP, batch, lr_at, **how)
    checkpoints.close()
    assert 4 * last.metrics["seconds_per_step"] == pytest.approx(1000 + Clock.seconds) and Clock.seconds < 500


# ------------------------------------------------------------------------------------------------------- divergence


def with_bad(*bad):
    def at(step):
        rows = batch(step)
        if step in bad:
            rows["x"][0, 0] = np.nan
            rows["mask"][0, 0] = 1
        return rows

    return at


@pytest.mark.parametrize("log_every,save_every", [(1, 0), (3, 0), (50, 0), (50, 2), (4, 3)])
def test_a_run_of_bad_updates_stops_with_the_last_good_state_saved(log_every, save_every, tmp_path):
    good = run(steps=2)
    with pytest.raises(Diverged, match="in a row were not finite"):
        run(tmp_path, with_bad(*range(2, 7)), max_bad=4, log_every=log_every, save_every=save_every)
    checkpoints = Checkpoints(tmp_path)
    state, _ = checkpoints.restore(fresh())
    assert saved(tmp_path)[-1] >= 6
    checkpoints.close()
    if state.step <= 7:  # later ones saw good batches again
        same(state.params, good.state.params)
        same(state.opt_state, good.state.opt_state)
    with pytest.raises(Diverged):  # and again when it is started again
        run(tmp_path, max_bad=4)


@pytest.mark.parametrize("log_every,save_every", [(1, 0), (50, 0), (50, 2), (50, 1), (4, 3)])
def test_bad_updates_that_good_ones_interrupt_do_not_stop_a_run(log_every, save_every, tmp_path):
    bad = (0, 1, 2, 4, 5, 6, 8)
    at = run(tmp_path, with_bad(*bad), max_bad=4, log_every=log_every, save_every=save_every)
    assert at.step == STEPS and int(at.state.step) == STEPS
    if log_every == 50:
        assert at.metrics["skipped"] == len(bad) and math.isfinite(at.metrics["loss"])  # of those that were made


def test_a_step_of_which_some_updates_were_skipped_does_not_count_towards_divergence():
    # A step of RL is several updates, and `skipped` their share.
    step = lambda state, rows, lr: (state, {"loss": jnp.float32(1), "skipped": jnp.float32(0.125)})  # noqa: E731
    *_, last = fit(fresh(), lambda s: step, batch, lr_at, steps=STEPS, log_every=STEPS, max_bad=2)
    assert last.step == STEPS and last.metrics["skipped"] == STEPS / 8


@pytest.mark.parametrize("log_every,save_every", [(1, 0), (4, 0), (50, 2)])
def test_a_run_whose_updates_were_all_skipped_does_not_end_as_if_it_had_learnt(log_every, save_every, tmp_path):
    how = dict(max_bad=20, log_every=log_every, save_every=save_every)
    for _ in range(2):  # and not when it is started again, either
        with pytest.raises(Diverged, match="none of 9 updates"):
            run(tmp_path, with_bad(*range(STEPS)), **how)
    with pytest.raises(Diverged, match="4 updates in a row were not finite, up to step 9"):  # the last loss is none
        run(tmp_path / "late", with_bad(*range(5, STEPS)), max_bad=20, log_every=5)


def test_a_failed_training_ends_with_exit_code_1(monkeypatch, capsys):
    from qstar import __main__

    def dispatch(argv):
        raise Diverged("none of 9 updates was finite")

    monkeypatch.setattr(__main__, "dispatch", dispatch)
    assert __main__.main(["train"]) == 1
    assert capsys.readouterr().err == "qstar: none of 9 updates was finite\n"


def test_what_takes_long_between_two_updates_is_cut_off_by_sigterm_after_saving(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with preemption.listening(), pytest.raises(preemption.Preempted, match="saved after update 4"):
        for at in fit(fresh(), lambda s: STEP, batch, lr_at, steps=STEPS, checkpoints=checkpoints, log_every=4):
            with at.interruptible():
                os.kill(os.getpid(), signal.SIGTERM)
                raise AssertionError("it went on")
    assert saved(tmp_path) == [4]
    checkpoints.close()
    same(run(tmp_path).state.params, run().state.params)


def test_without_checkpoints_divergence_is_told_all_the_same():
    with pytest.raises(Diverged):
        run(batch_at=with_bad(*range(STEPS)), max_bad=3)


# --------------------------------------------------------------------------------------------- what cannot be restored


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda p: p["policy"].pop("norm"), "norm/scale"),
        (lambda p: p["policy"].update(extra=jnp.zeros(2)), "no params/policy/extra"),
        (
            lambda p: p["policy"]["dense"].update(kernel=jnp.zeros((6, 3))),
            r"params/policy/dense/kernel is \(6, 2\), expected \(6, 3\)",
        ),
    ],
    ids=["less", "more", "another shape"],
)
def test_another_models_checkpoint_is_refused_by_the_leaf_that_differs(change, message, finished):
    other = params()
    change(other)
    checkpoints = Checkpoints(finished)
    with pytest.raises(UserError, match="of another model: .*" + message) as error:
        checkpoints.restore(create_state(other, TX, seed=0))
    checkpoints.close()
    assert "\n" not in str(error.value)


def test_an_empty_folder_and_one_that_cannot_be_made(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.resume(fresh()) is None
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.restore(fresh())
    checkpoints.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Checkpoints(tmp_path / "file" / "folder")


@pytest.mark.parametrize("fault, kind, says", [
    (ConnectionResetError(104, "reset"), Unreachable, "cannot be read now .*start the command again"),
    (ValueError("UNAVAILABLE: 503 from gs://b/state"), Unreachable, "cannot be read now"),
    (ValueError("PERMISSION_DENIED: 403 from gs://b/state"), Unreachable, "cannot be read now"),
    (OSError(errno.EMFILE, "Too many open files"), OSError, "Too many open files"),
])  # fmt: skip
def test_a_checkpoint_that_cannot_be_reached_is_not_damaged(fault, kind, says, finished, monkeypatch):
    def fail(*args, **options):
        raise fault

    checkpoints = Checkpoints(finished)
    before = sorted(p.name for p in finished.iterdir())
    monkeypatch.setattr(checkpoints._manager, "restore", fail)
    with pytest.raises(kind, match=says):
        checkpoints.resume(fresh())
    checkpoints.close()
    assert sorted(p.name for p in finished.iterdir()) == before


DAMAGES = (
    lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    lambda f: f.write_bytes(b""),
    lambda f: f.unlink(),
)


def refuses(folder, state, what) -> bool:
    """Whether a checkpoint is refused with one line; if not, it must hold this state (or be none at all)."""
    checkpoints = Checkpoints(folder)
    try:
        if saved(folder):
            same(checkpoints.restore(fresh())[0], state)
        return False
    except UserError as e:
        assert "\n" not in str(e) and str(folder) in str(e), what
        return True
    except Exception as e:
        pytest.fail(f"{what}: {type(e).__name__}: {str(e)[:300]}")
    finally:
        checkpoints.close()


@pytest.mark.filterwarnings("ignore")  # orbax leaves coroutines behind
def test_a_damaged_file_gives_one_line_or_the_right_state(finished, whole, tmp_path):
    """Each file of a checkpoint in turn is cut to half, emptied, or lost. Never a traceback, never other numbers."""
    files = sorted(f.relative_to(finished) for f in (finished / str(STEPS)).rglob("*") if f.is_file())
    refused = 0
    for i, name in enumerate(files):
        for j, damage in enumerate(DAMAGES):
            folder = tmp_path / f"{i}-{j}"
            shutil.copytree(finished, folder)
            damage(folder / name)
            refused += refuses(folder, whole.state, f"{name}, damage {j}")
    gc.collect()  # here, where warnings are ignored
    assert refused >= len(files) // 2
