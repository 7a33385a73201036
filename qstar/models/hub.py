"""Models by name: a local folder, or `owner/name[@revision]` on the Hugging Face hub.

resolve("runs/export")              the local folder, unchanged
resolve("Qwen/Qwen3-0.6B@main")     a snapshot in the cache of huggingface_hub (HF_HOME moves it)
resolve("random-tiny")              a random model that smoke runs take where no other is named (`random_tiny`)
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from qstar.errors import UserError, require
from qstar.models import random_tiny
from qstar.models.weight_files import INDEX, SINGLE, read_json

_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# All but the weights. Names from the top: copies of the model in subfolders (onnx/, original/) are not fetched.
_SMALL = (
    *("config.json", "generation_config.json", INDEX, _ADAPTER[0]),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
_ACCESS = "set HF_TOKEN, or log in with `hf auth login`"
_FAULTS: dict[type[Exception], str] = {  # subclasses stand before their base
    errors.GatedRepoError: f"is gated: accept its terms on the model's page of the hub, then {_ACCESS}",
    errors.RepositoryNotFoundError: "is neither a local folder nor a model of the hub that you can read; correct the "
    f"name, or, if the model is private, {_ACCESS}",
    errors.RevisionNotFoundError: "has no such revision; name a branch, a tag or a commit of its hub page",
    errors.HFValidationError: "is neither a local folder nor a valid name of the hub; correct it",
}


def is_local(name: str | os.PathLike) -> bool:
    """Returns whether `name` is meant as a local folder: it exists, is a path object, or is not `owner/name[@revision]`."""
    text = os.fspath(name)
    path_like = isinstance(name, os.PathLike) or text.startswith((".", "/", "~"))
    return path_like or _NAME.fullmatch(text) is None or Path(text).exists()


def split_revision(name: str) -> tuple[str, str | None]:
    """Returns the name and the revision of `owner/name[@revision]`; a local folder has none."""
    match = None if is_local(name) else _NAME.fullmatch(name)
    return (match["name"], match["revision"]) if match else (name, None)


def resolve(name: str | os.PathLike, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns the local folder of a model, downloading a hub model that the cache does not hold yet.

    Only files that are read here are fetched: configs, tokenizer, chat template, and the safetensors of the index. The
    library locks each file: of the processes of a host one downloads it, and the others wait. A token is read from
    HF_TOKEN or the library's login.

    Args:
      name: a local folder (it wins if it exists; `./x`, `/x` and `~x` are always local), or `owner/name[@revision]`.
      revision: branch, tag or commit of a hub model. None or "": that in the name, or the default branch.
      weights: whether the weights are needed; False fetches the small files alone.

    Raises:
      UserError: the hub has no such model or revision, access to it is denied, it cannot be reached, or the model has no
        safetensors. A local folder is not checked (see `hf.read_config`).
    """
    text = os.fspath(name)
    if is_local(name):
        fault = f"model {text!r} is a local folder, which has no revision={revision!r}; leave the revision out"
        require((not revision, fault))
        if text == random_tiny.NAME and not Path(text).exists():
            return random_tiny.folder()
        return Path(os.path.expanduser(text))
    repository, named = split_revision(text)
    twice = f"model {text!r} names a revision, and revision={revision!r} is another; leave one of them out"
    require((not (revision and named) or revision == named, twice))
    return _snapshot(repository, revision or named, weights)


# Cached: a run that reads a model several times asks the hub once, and reads one revision.
@functools.cache
def _snapshot(name: str, revision: str | None, weights: bool) -> Path:
    what = f"model {name!r}" + (f", revision {revision!r}," if revision else "")
    folder = _fetch(what, name, revision, _SMALL)
    if not weights:
        return folder
    index = folder / INDEX
    parts = read_json(index).get("weight_map") if index.is_file() else None
    files = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else [SINGLE, _ADAPTER[1]]
    # Of the commit that the index is of, in case the branch has moved meanwhile.
    commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else revision
    folder = _fetch(what, name, commit, files)
    found = [file for file in files if (folder / file).is_file()]
    if found and (len(found) == len(files) or parts is None):
        return folder
    # Off line, older versions of the library return a snapshot without the files that it lacks.
    require((not constants.HF_HUB_OFFLINE, _not_cached(what)))
    listed = f"not all files that {INDEX} lists" if parts else "no safetensors, the only format of weights that is read"
    raise UserError(
        f"{what} has {listed}; choose another model or revision (refs/pr/N of a conversion), or convert it: "
        "save_pretrained of a current transformers"
    )


def _fetch(what: str, name: str, revision: str | None, files: Sequence[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except tuple(_FAULTS) as e:
        fault = next(text for kind, text in _FAULTS.items() if isinstance(e, kind))
        raise UserError(f"{what} {fault}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise UserError(_not_cached(what)) from None
    except Exception as e:  # noqa: BLE001  the errors of networks and servers share no base class
        line = " ".join(str(e).split())[:300] or type(e).__name__
        raise UserError(f"{what} could not be downloaded ({line}); try again, or give a local folder") from e


def _not_cached(what: str) -> str:
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    return (
        f"{what} is no local folder and not (whole) in the cache {constants.HF_HUB_CACHE}, and {why}; fetch it where there "
        "is a network (`hf download NAME`) and copy the cache, or give a local folder"
    )
