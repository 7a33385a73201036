"""V-STaR on MBPP with Code Llama and LoRA: solutions are labelled by running their tests (2402.06457, section 4).

    qstar train --config=v_star_mbpp:model=CodeLlama-7b-hf --workdir=runs/v_star_mbpp

Printed: LoRA throughout, 3 epochs for G_SFT, 16 samples per query in each of three iterations, the first of them from the
pretrained model with three shots (here from G_SFT, as on GSM8K), 128 candidates at test. What it does not print stands as in
v_star_gsm8k.py. The paper's figures at 7B: about 53% best-of-64 and 46% pass@1 on MBPP.

Not run here at that size: only `smoke`, on 260K-parameter weights that write no Python, a test of the machinery. `data` is a
folder with all 974 tasks in mbpp.jsonl; without it they come from the hub.

`qwen05` is the run on a real language model that fits two CPU cores, Qwen2.5-Coder-0.5B-Instruct in bfloat16 with LoRA
of rank 16, prompts in its chat template without examples:

    qstar train --config=v_star_mbpp:qwen05,model=Qwen2.5-Coder-0.5B-Instruct,data=mbpp --workdir=runs/v_star_qwen05

Plan, written before the run (since then, before anything had run: bfloat16 instead of float32, and one iteration on 200
problems instead of two on all, because the rest would take two cores more than three hours by an estimate). G_SFT: one
pass over the 374 training solutions; one iteration of 4 samples for each of 200 problems; then a DPO verifier and an
ORM on the same labelled samples (`pairs.per_problem` 2). Test: 16 candidates for each of the first 150 test problems,
the same ones for every rule. On a machine without instructions for bfloat16: float32 (`--config.model.dtype=float32`;
products with the vocabulary take half the time there). By an estimate two cores of 115 GFLOP/s take six hours. For
less: 100 problems, 8 candidates, fewer updates (`--config.loop.problems_per_iter=100 --config.select.samples=8
--config.sft.steps=lin:16:0 --config.loop.steps=lin:24:0 --config.dpo.steps=40 --config.orm.steps=30`), and the table says
so; chosen when a first run had shown G_SFT's greedy pass@1 alone (.360 of 150). At 146 GFLOP/s an unfinished run of it
(seed 0) took 47 s per update of G_SFT, .95 s per sample, 38 s per update of the generator and 60 s of DPO, so that the
whole takes two and a half hours; G_SFT solved .300 of the 150, .303 of its 400 samples were correct. Reported: pass@1,
pass@k, majority of 16 (equal programs), best of 16 by DPO verifier, ORM and the generator's own log-probability,
with 95% intervals over problems; HumanEval with the same models by `qstar evaluate --verifier`.
Success: best of 16 by a verifier above pass@1 with a paired interval above 0; the method's claim needs it above
majority, too. Nothing is chosen on the test problems. A failed arm is reported, and up to two more settings are tried
(samples per problem, passes of the verifier), each named.
"""

from qstar.configs.common import parse_arg
from qstar.configs.v_star_gsm8k import get_config as gsm8k


def get_config(arg=None):
    """Arguments: model=DIR, data=DIR, qwen05 (0.5B parameters on two cores), smoke, seed=N, arms=A+B, orm."""
    modes = {"qwen05": False, "smoke": False, "orm": False}
    arg = parse_arg(arg, "smoke qwen05", model="CodeLlama-7b-hf", data="", **modes, seed=0, arms="v_star")
    orm = int(arg.orm or arg.qwen05)
    config = gsm8k(f"model={arg.model},seed={arg.seed},arms={arg.arms},smoke={int(arg.smoke)},orm={orm}")
    config.name = "v_star_mbpp"
    config.task = {"name": "mbpp", "shots": (), "format": "plain"}  # G_SFT has learnt the format
    if arg.data or arg.smoke:
        config.task.data = f"{arg.data}/mbpp.jsonl" if arg.data else "built-in:mbpp"
    if arg.smoke:  # the problems whose prompts fit into 512 tokens of a vocabulary of 512
        config.loop.problems_per_iter = 7
        config.evaluate.limit = 2
        config.select.limit = 2
    else:
        config.sft.steps = "epochs:3:0"
        config.loop.steps = "epochs:3:0"
        config.sample.max_new_tokens = 384
    if arg.qwen05:
        qwen05(config)
    return config


def qwen05(config):
    """LoRA on two CPU cores: 4 rows of 512 tokens or pairs of 768, one at a time."""
    config.name = "v_star_mbpp_qwen05"
    config.mesh = "data=-1"
    config.task.format = "chat"
    config.model.update(dtype="bfloat16", remat="none", scan_unroll=24)
    config.sft.steps = "epochs:1:0"
    config.loop.update(n_iters=1, k=4, problems_per_iter=200, steps="epochs:1:0")
    config.pairs.per_problem = 2
    config.sample.update(max_new_tokens=200, slots=64, round_size=320)
    often = {"accumulate": 4, "warmup": 5, "save_every": 5, "log_every": 5}
    config.train.update(batch_size=4, row_length=512, **often)
    for kind, length in (("rpo", 768), ("dpo", 768), ("orm", 512), ("prm", 512)):
        config[kind].update(batch_size=4, row_length=length, **often)
    config.evaluate.update(limit=150)
    config.select.update(samples=16, limit=150)
