"""What all tests share: quiet, offline, CPU-only settings, and the way to the files beside the repository.

Everything is set through environment variables, before any test imports jax, and jax is not imported here:
the tests of text, data and tasks never need it and stay fast. A value that is set already is respected.
"""

import gc
import importlib.metadata
import os
import pathlib
import shutil
import sys
import tempfile

import pytest

HERE = pathlib.Path(__file__).resolve().parent
CACHE = pathlib.Path(os.environ.get("QSTAR_TEST_CACHE") or "~/.cache/qstar-tests").expanduser()

for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),  # compiled programs survive from one test run to the next
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # The default writes 100 frames of the call stack beside every operation, and pytest's stack is deep.
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(_name, _value)

# With 16 threads the tiny programs of sample/test_generate.py took 84 s, with one 60. Simulated devices need a thread each:
# with fewer, a program can wait for itself.
os.environ.setdefault("PJRT_NPROC", "16" if "device_count" in os.environ.get("XLA_FLAGS", "") else "1")

# Most tests are short and their programs tiny: what they wait for is the compiler. Without LLVM's optimisations, with
# XLA's older emitters of fusions, and in one piece per program it needs less than a third of the time. What is set
# already stays: the tests of 8 devices are optimised, since without that one sum of gradients is off by 1.02e-5. XLA ends
# a process that names a flag it does not know: later jaxlibs have no older emitters.
_FLAGS = {"xla_backend_optimization_level": "0", "xla_cpu_parallel_codegen_split_count": "1"}
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS["xla_cpu_use_fusion_emitters"] = "false"
_flags = [f"--{name}={value}" for name, value in _FLAGS.items() if name not in os.environ.get("XLA_FLAGS", "")]
# The workers and processes that a session starts find them in their environment.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags]).strip()

# To trace a program makes some 100,000 objects that stay, and Python's collector looks at all of them again and again:
# an eighth of the time at its usual thresholds.
gc.set_threshold(100_000, 50, 100)

if str(HERE) not in sys.path:  # so that `from conftest import shared` works in every import mode of pytest
    sys.path.insert(0, str(HERE))


def shared(path: str) -> pathlib.Path:
    """A file or folder beside the repository (in QSTAR_SHARED, else ../shared); skips the test without it."""
    root = pathlib.Path(os.environ.get("QSTAR_SHARED") or HERE.parent.parent / "shared")
    if not (root / path).exists():
        reason = f"needs {path} in {root} (set QSTAR_SHARED to the folder that has it)"
        pytest.skip(reason, allow_module_level=True)
    return root / path


def real_model(name: str) -> pathlib.Path:
    """The folder of a pretrained model, in QSTAR_MODELS (else ~/.cache/qstar-models); skips the test without it."""
    folder = pathlib.Path(os.environ.get("QSTAR_MODELS") or "~/.cache/qstar-models").expanduser() / name
    if not (folder / "config.json").is_file():
        pytest.skip(
            f"needs the pretrained model {name} in {folder.parent} (set QSTAR_MODELS to the folder that has it)"
        )
    return folder


@pytest.fixture(name="shared", scope="session")
def _shared():
    return shared


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """Frees what a file compiled: each program maps a dozen regions, and Linux kills at 65,530 of them in a process."""
    yield
    if "jax" in sys.modules:
        # Always: some files replace constants of functions that others trace, too.
        sys.modules["jax"].clear_caches()
        maps = pathlib.Path("/proc/self/maps")
        if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:
            gc.collect()


LONG = (  # the longest files begin, so that no worker is left alone with one of them at the end
    "configs/test_config_files.py",
    "runs/test_preemption.py",
    "runs/test_resume.py",
    "thoughts/test_loss.py",
    "test_distributed.py",
    "runs/test_damage.py",
    "tasks/test_examples.py",
    "test_machine_faults.py",
    "test_uneven_batches.py",
    "methods/test_harness.py",
    "test_terminal.py",
    "thoughts/test_facts.py",
    "test_cli.py",
    "methods/test_quiet_star.py",
    "methods/test_quiet_eval.py",
    "methods/test_reinforce.py",
    "thoughts/test_parity.py",
    "thoughts/test_reference.py",
    "methods/test_guided_cot.py",
    "thoughts/test_memory.py",
)


# Left out by `launch/test.sh --fast`: files and folders that took more than 5 seconds (with a warm compile cache), because
# they train, start processes or compile whole models. `--durations=0` shows where a new file belongs.
SLOW = (
    "bench/", "configs/", "multi_device/", "notebooks/", "plan/test_tpu.py", "thoughts/",
    "methods/test_encoder_decoder.py", "methods/test_guided_cot.py",
    "methods/test_answerer.py", "methods/test_api.py", "methods/test_harness.py", "methods/test_quiet", "methods/test_reinforce.py", "methods/test_rl.py",
    "methods/test_star_loop.py", "methods/test_v_star",
    "models/test_decoder.py", "models/test_encdec.py", "models/test_export.py", "models/test_hf.py", "models/test_hub.py", "models/test_lora.py",
    "models/test_model.py", "models/test_prefix_attention.py", "models/test_reading.py", "models/test_relative.py",
    "models/test_shared_prompts.py", "models/test_stopping.py",
    "runs/test_bucket.py", "runs/test_damage.py", "runs/test_evaluate_export.py", "runs/test_preemption.py", "runs/test_resume.py",
    "runs/test_run_metrics.py", "runs/test_sampled_tokens.py", "runs/test_stage_folders.py", "runs/test_too_long.py",
    "runs/test_truncated_answers.py", "runs/test_two_processes.py",
    "sample/test_families.py", "sample/test_generate.py", "tasks/test_code_tasks.py", "tasks/test_sandbox.py",
    "train/test_distil.py", "train/test_loop.py", "train/test_profile.py", "train/test_rl.py", "train/test_step.py",
    "train/test_value.py",
    "test_cli.py", "test_distributed.py", "test_fuzz.py", "test_launch.py", "test_machine_faults.py", "test_preemption.py",
    "test_start.py", "test_terminal.py", "test_uneven_batches.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Marks slow tests and orders the files; within a file nothing changes."""
    rank = {HERE / name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    for item in items:
        if item.path.relative_to(HERE).as_posix().startswith(SLOW):
            item.add_marker("slow")


def pytest_configure(config):
    """A folder for whole runs, which all workers share; its path travels to them in the environment."""
    if not hasattr(config, "workerinput"):
        os.environ["QSTAR_TEST_RUNS"] = config.qstar_runs = tempfile.mkdtemp(prefix="qstar-runs-")


def pytest_unconfigure(config):
    if hasattr(config, "qstar_runs"):
        shutil.rmtree(config.qstar_runs, ignore_errors=True)
