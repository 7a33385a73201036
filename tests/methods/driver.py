"""Runs jobs of qstar in forked children and kills each where its plan says, for the tests of resumption.

    python driver.py          reads paths of lists of jobs, one per line, and answers each with a line when they have ended

The jobs of a list run one after another; children inherit the imports and start JAX. Exit codes stand beside the list.

A job is {"config": "star_arithmetic.py:smoke", "flags": [..], "workdir": DIR, "xla_flags": the compiler's options, "kill":
EVENT or null}. The product knows nothing of this: its functions are wrapped here so that they tell *events*, and the child
sends itself SIGKILL when the first event that equals the plan comes by, SIGTERM where the plan is "term EVENT". Paths are
relative to the workdir. A plan "later SECONDS EVENT" sends the SIGTERM so long after the event, wherever the run then is.
With "command" a job is another command line of qstar than `train` with this config. With "drop": [EVENT, ...] it first
leaves the run by an exception (or, at "term EVENT", by SIGTERM) at each of these in turn and begins again in the same
process, which costs neither a start nor a compilation. A "later" one may come after the run's end: then the others are left
out.

    begin FILE          before a JSONL file is made      replace FILE        written under its temporary name
    done FILE           the file is there                batch FOLDER STEP   before an update
    save FOLDER STEP    before a checkpoint              saving FOLDER STEP  being written in the background
    saved FOLDER STEP   on disk (told if that matters)

Events of all children of a folder stand in WORKDIR.events, one per line, what they print in WORKDIR.log. With "copies",
{EVENT: DIR}, the workdir is copied as it is at an event: what a kill there would leave.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Dropped(BaseException):
    """The run was left at a planned event."""


class Events:
    """Tells what happens, and kills this process at the planned event."""

    def __init__(self, workdir, plan, copies):
        self.workdir, self.plan, self.copies = os.path.realpath(workdir), plan, copies
        self.timer = None
        self.file = open(f"{workdir}.events", "a", buffering=1, encoding="utf-8")

    def name(self, path):
        return os.path.relpath(os.path.realpath(path), self.workdir)

    def tell(self, *parts):
        event = " ".join(map(str, parts))
        print(event, file=self.file)
        if event in self.copies:
            shutil.copytree(self.workdir, self.copies[event])
        if event == self.plan:
            os.kill(os.getpid(), signal.SIGKILL)
        if f"term {event}" == self.plan:
            os.kill(os.getpid(), signal.SIGTERM)
        if f"drop {event}" == self.plan:
            raise Dropped(event)
        if (self.plan or "").startswith("later ") and self.plan.split(" ", 2)[2] == event:
            self.timer = threading.Timer(float(self.plan.split()[1]), os.kill, (os.getpid(), signal.SIGTERM))
            self.plan = None
            self.timer.start()


def wrap(events):
    """Makes the stages of qstar tell their events."""
    from qstar.runs import folder as run_folder
    from qstar.runs import stages
    from qstar.train.checkpoint import Checkpoints

    write, replace, save = run_folder.write_jsonl, os.replace, Checkpoints.save
    fit = stages.fit

    def write_jsonl(path, rows, **options):
        events.tell("begin", events.name(path))
        write(path, rows, **options)
        events.tell("done", events.name(path))

    def replaced(source, target, **how):
        if not events.name(target).startswith("..") and ".checksums" not in str(target):
            events.tell("replace", events.name(target))
        replace(source, target, **how)

    def saves(self, step, *args, **kwargs):
        where = f"{events.name(self.folder)} {step}"
        events.tell("save", where)
        save(self, step, *args, **kwargs)
        events.tell("saving", where)
        if (events.plan or "").startswith(
            ("saved", "batch", "drop")
        ):  # what is killed after it has to find it on the disk
            self.wait()
            events.tell("saved", where)

    def trains(state, step_at, batch_at, lr_at, *, checkpoints, **rest):
        folder = events.name(checkpoints.folder.parent)

        def told(step, *state):
            events.tell("batch", folder, step)
            return batch_at(step, *state)

        yield from fit(state, step_at, told, lr_at, checkpoints=checkpoints, **rest)

    run_folder.write_jsonl, os.replace, Checkpoints.save = write_jsonl, replaced, saves
    stages.fit = trains


def child(job):
    """Runs one job as `python -m qstar train` does and returns its exit code."""
    from qstar.__main__ import main

    log = open(f"{job['workdir']}.log", "a", encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ["XLA_FLAGS"] = job["xla_flags"]  # read where JAX starts, which no process before the fork has done
    try:
        events = Events(job["workdir"], None, job.get("copies", {}))
        wrap(events)
        where = f"--config={ROOT}/configs/{job.get('config')}", f"--workdir={job['workdir']}"
        command = job.get("command") or ["train", *where, *job.get("flags", [])]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a late one must not end this process between two runs
        for event in job.get("drop", []):
            told = event.startswith(("term ", "later "))
            events.plan = event if told else f"drop {event}"
            try:
                if (code := main(command)) or not told:
                    return code or 1  # it should not have come to its end
            except Dropped:
                pass
            if events.timer is not None:
                events.timer.cancel()
        events.plan = job.get("kill")
        return main(command)
    except BaseException:
        traceback.print_exc()
        return 1


def run(path):
    """Runs the jobs of a list in order; writes their exit codes (negative: the signal) beside it."""
    codes = []
    for job in json.loads(path.read_text(encoding="utf-8")):
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            code = child(job)
            sys.stdout.flush()
            os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    path.with_suffix(".codes").write_text(json.dumps(codes), encoding="utf-8")


def main():
    """Imports once what all children need, and runs lists until its input ends."""
    import rich.progress  # noqa: F401
    import tensorboardX  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import qstar.methods.guided_cot
    import qstar.methods.quiet_star
    import qstar.methods.rl
    import qstar.methods.star
    import qstar.methods.v_star
    import qstar.plan.host
    import qstar.report.pages  # noqa: F401

    for line in sys.stdin:
        run(pathlib.Path(line.rstrip("\n")))
        print("done", flush=True)


if __name__ == "__main__":
    main()
