"""`qstar sample`: writes continuations of prompts."""

from __future__ import annotations

import json

from qstar.distributed import start_jax
from qstar.errors import require
from qstar.flags import COUNT, MODEL, POSITIVE, SEED, SHARE, TEMPERATURE, Parser


def main(argv: list[str]) -> int:
    """qstar sample --model=DIR --prompt=TEXT"""
    p = Parser("sample", "Writes continuations of a prompt.")
    p.flag("--model DIR", MODEL, required=True)
    p.flag("--prompt TEXT", "repeatable; '' starts from BOS", action="append", required=True)
    p.switch("--chat", "each prompt is a user's message, in the model's chat template; prints the replies")
    p.flag("--system TEXT", "the system message of --chat (default: the template's)")
    p.flag("--max-new-tokens N", "at most so many", POSITIVE, 128)
    p.flag("--temperature T", "0 = greedy", TEMPERATURE, 1.0)
    p.flag("--top-k K", "only the K likeliest tokens (0: all)", COUNT, 0)
    p.flag("--top-p P", "only the likeliest tokens that hold a share P", SHARE, 1.0)
    p.flag("--n N", "samples per prompt", POSITIVE, 1)
    p.flag("--stop TEXT", "ends a continuation; repeatable", default=[], action="append")
    p.flag("--seed N", "of the random draws", SEED, 0)
    p.flag("--dtype", "to compute in (default: as stored)", choices=("float32", "bfloat16", "float16"))
    p.flag("--weights", "int8: the blocks' weights in 8 bits (default: as stored)", default="", choices=("", "int8"))
    p.switch("--json", "an object per continuation, with tokens and log-probabilities")
    a = p.parse_args(argv)
    start_jax(a.device)
    import qstar

    flags = ("max_new_tokens", "temperature", "top_k", "top_p", "n", "seed", "weights")
    options = {name: getattr(a, name) for name in flags} | {"stop": tuple(a.stop)}
    require((a.chat or a.system is None, "sample: --system is a message of a chat; give --chat, too"))
    head = [{"role": "system", "content": a.system}] if a.system is not None else []
    prompts = [[*head, {"role": "user", "content": text}] if a.chat else text for text in a.prompt]
    found = qstar.generate(qstar.load(a.model, dtype=a.dtype), prompts, **options)
    pairs = [(prompt, c) for prompt, completions in zip(a.prompt, found) for c in completions]
    if a.json:
        print("\n".join(json.dumps({"prompt": prompt, **c.__dict__}) for prompt, c in pairs))
    else:
        print("\n\n".join((c.text or "").strip() if a.chat else f"{prompt}{c.text}" for prompt, c in pairs))
    return 0
