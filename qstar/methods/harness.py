"""`HarnessModel`, qstar's model class for lm-evaluation-harness, and `evaluate_harness`, which runs its tasks.

Contexts, continuations, BOS tokens and windows are those of lm_eval's own `hf` class, so that the scores agree.
`python -m qstar.methods.harness --model qstar --model_args pretrained=DIR --tasks ...` is lm_eval's own command line
with this class registered. A task file that needs no network names local data:

    task: my_task
    dataset_path: json
    dataset_kwargs: {data_files: {test: test.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "Question: {{question}}\\nAnswer:"
    doc_to_choice: "{{choices}}"
    doc_to_target: "{{choices.index(answer)}}"
"""

from __future__ import annotations

import collections
import difflib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qstar import files, tree
from qstar.data.sources import write_jsonl
from qstar.errors import QstarWarning, UserError, pip_install, require
from qstar.mesh import put_global_batch, to_host
from qstar.methods.quiet_eval import Row, answer_arrays, thinking_config
from qstar.models.encdec import EncDecConfig
from qstar.models.model import Model, load
from qstar.models.scoring import token_scores
from qstar.models.thought_config import ThoughtConfig
from qstar.runs.folder import stable_seed
from qstar.runs.rollouts import generate, tokenizer_of
from qstar.sample.batching import default_slots
from qstar.thoughts import layout, measure

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as e:
    install = pip_install("harness")
    raise UserError(f"lm-evaluation-harness is not installed ({e}): {install}") from None

THOUGHT_ROWS = 16  # texts per forward pass with thoughts
ROUND = 512  # generations between two reports to lm_eval's cache
USED = ("temperature", "top_k", "top_p", "do_sample")  # options of generations, besides `until`, `max_gen_toks`


@register_model("qstar")
class HarnessModel(TemplateLM):
    """A model of qstar as lm_eval calls it: log-likelihoods, rolling log-likelihoods, generations, chat templates."""

    def __init__(
        self,
        pretrained: str | Model,
        *,
        dtype: str | None = None,
        thoughts: bool | ThoughtConfig | None = None,
        thought_temperature: float | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        seed: int = 0,
        **_: Any,
    ):
        """Reads a model.

        Args:
          pretrained: a model, or what `qstar.load` takes. dtype: to compute in; None: as stored.
          thoughts: mix a thought into the prediction of every token that is scored or written (Quiet-STaR); None: if
            the model can. thought_temperature: 0 is greedy; None: as trained.
          max_length: of context and continuation in tokens; None: the model's context.
          max_gen_toks: tokens of a generation whose task names no number.
          batch_size: rows decoded side by side; 1 or "auto": chosen by qstar, which batches by tokens.
          seed: of sampled generations and thoughts.

        Raises:
          UserError: a model that cannot be read, has no tokenizer, or cannot think.
        """
        super().__init__()
        self.model = pretrained if isinstance(pretrained, Model) else load(pretrained, dtype=dtype)
        where = "this model" if isinstance(pretrained, Model) else pretrained
        fault = f"{where}: the harness needs a tokenizer; put its files in the folder"
        require((self.model.tokenizer is not None, fault))
        self.tokenizer = tokenizer_of(self.model).hf
        self.backend = "seq2seq" if isinstance(self.model.config, EncDecConfig) else "causal"
        self.config, self.thoughts = self.model.config, None
        if self.backend == "causal" and (thoughts or thoughts is None and self.config.thoughts is not None):
            self.config = thinking_config(self.model, thoughts or True)
            self.thoughts = self.config.thoughts
            if self.thoughts and thought_temperature is not None:
                self.thoughts = self.thoughts.replace(temperature=thought_temperature)
        # With thoughts the last token of a text is read, too.
        self.max_length = max_length or self.model.config.max_positions - (self.thoughts is not None)
        self.max_gen_toks, self.seed = max_gen_toks, seed
        self.slots = int(batch_size) if str(batch_size).isdigit() and int(batch_size) > 1 else None

    @property
    def eot_token_id(self) -> int:
        return tokenizer_of(self.model).eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = tokenizer_of(self.model).bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns messages as text, by the tokenizer's template; without a generation prompt the last stays open."""
        chat = tokenizer_of(self.model).chat
        if chat is None:
            raise UserError("this model's tokenizer has no chat template; leave --chat out")
        return chat.render(chat_history, reply=add_generation_prompt, goes_on=not add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Returns ids with BOS in front where the tokenizer puts one, unless the text begins with it already."""
        if self.backend == "seq2seq":
            return getattr(self.model.tokenizer, "encode" if add_special_tokens is False else "encode_prompt")(string)
        # As in the `hf` class: an empty text gives BOS alone only if the tokenizer always puts it in front.
        if not string:
            return self.tokenizer.encode("")
        return tokenizer_of(self.model).encode(string, bos=add_special_tokens is not False)

    # -------------------------------------------------------------------------------------------- log-likelihoods

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            # As in the `hf` class: what does not fit is cut on the left; the last token is predicted, not read.
            room = self.max_length if self.backend == "seq2seq" else self.max_length + 1 - len(continuation)
            rows.append((list(context or [self.prefix_token_id])[-room:], list(continuation)))
        if self.thoughts:
            found = self._score_with_thoughts(rows, self.thoughts)
        else:
            scores = token_scores(self.model, *map(list, zip(*rows))) if rows else []
            found = [(float(s.logprobs.sum(dtype=np.float64)), bool(s.hits.all())) for s in scores]
        for (text, *_), result in zip(requests, found):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, result)
        return found

    def _score_with_thoughts(self, pairs: list[tuple[list, list]], thoughts: ThoughtConfig) -> list[tuple[float, bool]]:
        places = [list(range(len(p) - 1, len(p) + len(q) - 1)) for p, q in pairs]
        rows = [Row([*p, *q], at, [0] * len(at)) for (p, q), at in zip(pairs, places)]
        out: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].tokens))
        for number, begin in enumerate(range(0, len(order), THOUGHT_ROWS)):
            members = order[begin : begin + THOUGHT_ROWS]
            tokens, mask, positions, _, counts = answer_arrays([rows[i] for i in members], THOUGHT_ROWS)
            tokens, mask, positions = put_global_batch((tokens, mask, positions), self.model.mesh)
            key = jax.random.fold_in(tree.random_key(self.seed), number)
            how = {"temperature": jnp.float32(thoughts.temperature), "positions": positions}
            batch = layout.text_batch(tokens, mask)
            found = to_host(measure.score(self.model.params, self.config, batch, key, **how))
            for r, i in enumerate(members):
                real = counts[r] > 0
                out[i] = float(-found.nll[r, 0][real].sum(dtype=np.float64)), bool(found.hit[r, 0][real].all())
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts, read in windows of the model's context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owner: list[int] = []
        for i, (text,) in enumerate(r.args for r in requests):
            found = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(w)) for w in found]
            owner += [i] * (len(windows) - len(owner))
        out = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows)):
            out[i] += logprob
        for request, total in zip(requests, out):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return out

    # ------------------------------------------------------------------------------------------------ generations

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns continuations up to the first of the task's stop strings, or the EOS token."""
        out: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(i)
        for members in groups.values():
            # By length, so that a round compiles few prompt lengths.
            members = sorted(members, key=lambda i: len(requests[i].args[0]))
            slots = self.slots or default_slots(min(ROUND, len(members)))
            for begin in range(0, len(members), ROUND):
                some = members[begin : begin + ROUND]
                # A seed per round: draws depend on it and on the index in the call.
                seed = stable_seed(self.seed, *members[:1], begin)
                texts = self._generate([requests[i].args[0] for i in some], requests[some[0]].args[1], slots, seed)
                for i, text in zip(some, texts):
                    out[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return out

    def _generate(self, contexts: list[str], options: Mapping[str, Any], slots: int, seed: int) -> list[str]:
        options = dict(normalize_gen_kwargs(dict(options), self.max_gen_toks))
        until, new = handle_stop_sequences(options.pop("until"), eos=None), options.pop("max_gen_toks")
        if ignored := sorted(options.keys() - set(USED)):
            text = f"generation options {', '.join(ignored)} of the task are not supported and left out"
            warnings.warn(text, QstarWarning, stacklevel=2)
        room = self.max_length - (0 if self.backend == "seq2seq" else new)
        fault = f"max_gen_toks={new} leaves no room in the context of {self.max_length}; lower max_gen_toks"
        require((room > 0, fault))
        prompts = [(self.tok_encode(text) or [self.prefix_token_id])[-room:] for text in contexts]
        filters = {k: options[k] for k in ("top_k", "top_p") if options.get(k) is not None}
        sampling = {"temperature": options.get("temperature", 0.0) if options["do_sample"] else 0.0, **filters}
        stop = [text for text in until if text]
        more: dict[str, Any] = {"thoughts": self.thoughts, "seed": seed, "slots": slots}
        found = generate(self.model, prompts, max_new_tokens=new, stop=stop, **sampling, **more)
        return [postprocess_generated_text(row[0].text, stop, None) for row in found]


# --------------------------------------------------------------------------------------------------- running tasks


def evaluate_harness(
    model: str | Model,
    tasks: Sequence[str],
    *,
    limit: int = 0,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    chat: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Evaluates a model on tasks of lm-evaluation-harness.

    Args:
      model: a model, or what `qstar.load` takes.
      tasks: names of tasks, groups or tags, or yaml files.
      limit: problems of each task, from the first; 0: all. num_fewshot: examples in front; None: as the task says.
      include_path: a folder of further task files. chat: apply the tokenizer's chat template.
      options: of `HarnessModel`.

    Returns:
      What `lm_eval.simple_evaluate` returns: "results", "configs", "versions", "n-shot", "samples", ...

    Raises:
      UserError: an unknown task, data that cannot be read, or see `HarnessModel`.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # Reading the index of all tasks takes seconds, and is rarely needed with a folder of task files.
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    if include_path is not None and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)
    # Before the model is read: faults in names and data show at once.
    loaded = _load_tasks(manager, list(tasks))
    manager.load = lambda _: loaded  # simple_evaluate would read all data again
    lm = HarnessModel(model, **options)
    more = {"num_fewshot": num_fewshot, "limit": limit or None, "apply_chat_template": chat}
    return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, fewshot_as_multiturn=chat, **more)


def _load_tasks(manager: Any, names: list[str]) -> dict[str, Any]:
    for name in names:
        if name not in manager.all_tasks and not name.endswith((".yaml", ".yml")):
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            meant = f"; did you mean {', '.join(close)}?" if close else ""
            raise UserError(f"harness task {name!r} is unknown{meant} (`lm_eval ls tasks` lists them)")
    try:
        loaded = manager.load(names)
    # Whatever a data set, the network or a task's own code raises.
    except Exception as e:
        text = " ".join(f"{type(e).__name__}: {e}".split())[:300]
        advice = "without a network, name task files with dataset_path: json (--include-path)"
        raise UserError(f"harness task {', '.join(names)}: cannot be loaded ({text}); {advice}") from None
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    advice = "python -m qstar.methods.harness run --model qstar ... --confirm_run_unsafe_code"
    require((not unsafe, f"harness task {', '.join(unsafe)} runs generated programs; to allow it: {advice}"))
    return loaded


def tables(found: Mapping[str, Any]) -> str:
    """Returns lm_eval's tables of tasks and groups, as it prints them."""
    from lm_eval.utils import make_table

    return "\n".join(make_table(found, column) for column in ("results", "groups") if found.get(column))


def write_results(found: Mapping[str, Any], folder: Path) -> None:
    """Writes results.json, and samples_TASK.jsonl with every problem, request and answer."""
    folder.mkdir(parents=True, exist_ok=True)
    rest = {k: v for k, v in found.items() if k != "samples"}
    files.write(folder / "results.json", (json.dumps(rest, indent=2, default=str) + "\n").encode())
    for name, rows in found.get("samples", {}).items():
        plain = [json.loads(json.dumps(row, default=str)) for row in rows]
        write_jsonl(folder / f"samples_{name.replace('/', '_')}.jsonl", plain)


def main() -> int:
    """Runs lm_eval's own command line, with the model class `qstar` registered."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as e:
        print(f"qstar: {e}", file=sys.stderr)
        return e.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
