"""What a user can get wrong: exit code 2, one line that names the culprit, no traceback, and no file touched.

Every case runs `main([...])` in this process, over a folder of files good and bad that must be the same afterwards,
to the byte and the last path: whatever would have been written lies in that folder, too.
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys
from importlib.util import find_spec

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qstar.__main__ import main
from qstar.flags import read_config
from qstar.models import hf
from qstar.models.config import preset
from qstar.models.hf_names import abstract_params
from qstar.models.model import Model, save
from qstar.runs.access import unlock
from qstar.runs.folder import open_run, write_json
from qstar.tasks.arithmetic import ALPHABET, EOS, PAD
from qstar.text.tokenizer import char_tokenizer
from qstar.train.checkpoint import Checkpoints
from qstar.train.metrics import Writer

ROOT = pathlib.Path(__file__).resolve().parents[1]
SUMS = f"{ROOT}/configs/star_arithmetic.py:smoke"
QUIET = f"train --config={ROOT}/configs/quiet_star_tiny.py:smoke --workdir={{root}}/new"
TEXT = f"train --config={ROOT}/configs/quiet_star_text.py:model={{root}}/models/good,data={{root}}/none.jsonl --workdir={{root}}/new"
GSM = f"{ROOT}/configs/star_gsm8k.py:smoke,model={{root}}/models/good"
TRAIN = f"train --config={SUMS} --workdir={{root}}/new"
SUMS_V = f"{ROOT}/configs/v_star_arithmetic.py:smoke"
V_STAR = f"train --config={SUMS_V} --workdir={{root}}/new"
SCORED = "evaluate --model={root}/models/good --task=arithmetic --samples=2 --out={root}/new"
COMPARE = "compare --a=x={root}/data/votes/a.jsonl --b=y={root}/data/votes/b.jsonl --out={root}/new"
COUNT = "compare --out={root}/votes --votes={root}/data/votes"
SAMPLE = "sample --model={root}/models/good --prompt=1+1="
EVALUATE = "evaluate --model={root}/models/good --out={root}/new"

# name: (command line, what the line must hold)
CASES = {
    # ---- the command line itself
    "no command": ("", "no command"),
    "unknown command": ("trian", "did you mean train?"),
    "unknown flag of sample": (SAMPLE + " --temprature=1", "--temprature=1"),
    "sample without a model": ("sample --prompt=x", "--model"),
    "sample without a prompt": ("sample --model={root}/models/good", "--prompt"),
    "unknown flag of train": ("train --confg=x", "--confg is unknown (did you mean --config?)"),
    "train with a bare word": (TRAIN + " smoke", "'smoke' is no flag"),
    "train without a config": ("train --workdir={root}/new", "--config=FILE is missing"),
    "unknown device": (TRAIN + " --device=abacus", "'abacus'"),
    "absent device": (SAMPLE + " --device=tpu", "--device=tpu"),
    # ---- Quiet-STaR
    "no thought tokens": (QUIET + " --config.thoughts.thought_tokens=0", "thought_tokens=0"),
    "unknown thought source": (QUIET + " --config.arms.quiet_star.thought_source=deep", "arms.quiet_star.thought_source='deep'"),
    "unknown corpus": (QUIET + " --config.data.name=told_digits", "did you mean fold_digits?"),
    "no documents in a row": (QUIET + " --config.data.documents=0", "documents=0"),
    "nothing to measure on": (QUIET + " --config.evaluate.rows=0", "evaluate.rows=0"),
    "start text outside the alphabet": (QUIET + " --config.thoughts.start_text=%", "config.thoughts.start_text"),
    "arm that starts from no arm": (QUIET + " --config.arms.quiet_star.start=nobody", "'nobody'"),
    "pattern that is none": (QUIET + " --config.arms.quiet_star.trainable=(", "trainable='('"),
    "thoughts longer than the context": (QUIET + " --config.model.max_positions=9", "the model has 9"),
    "text that is not there": (TEXT, "none.jsonl"),
    # ---- V-STaR
    "unknown row of the baselines": (V_STAR.replace("smoke", "smoke,arms=vstar"), "'vstar' is unknown (did you mean v_star?)"),
    "unknown V-STaR preset": (V_STAR + " --config.arms.v_star.preset=v_stra", "preset='v_stra' is unknown (did you mean v_star?)"),
    "unknown verifier": (V_STAR + """ --config.arms.v_star.verifiers='("dop",)'""", "verifiers: 'dop' is not one of dpo, orm, prm"),
    "no samples to learn from": (V_STAR + " --config.loop.k=0", "config.loop.k=0 must be at least 1"),
    "hints in V-STaR": (V_STAR + " --config.loop.rationalize=True", "config.loop.rationalize=True"),
    "verifier without its buffer": (V_STAR + " --config.loop.accumulate=False", "accumulate=False: a verifier needs D_VER"),
    "no pairs per problem": (V_STAR + " --config.pairs.per_problem=0", "config.pairs.per_problem=0"),
    "unknown negatives": (V_STAR + " --config.pairs.negatives=all", "config.pairs.negatives='all' is not one of parsed, any"),
    "unknown winners": (V_STAR + " --config.pairs.winners=best", "config.pairs.winners='best' is not one of"),
    "unknown pair setting": (V_STAR + " --config.pairs.per_prblem=4", "config.pairs.per_prblem is unknown (did you mean per_problem?)"),
    "beta 0": (V_STAR + " --config.dpo.beta=0", "config.dpo.beta=0.0 must be above 0"),
    "all of the head dropped": (V_STAR + " --config.orm.dropout=1", "config.orm.dropout=1.0"),
    "no supervised solutions": (V_STAR + " --config.sft.problems=0", "config.sft.problems=0"),
    "bad steps of G_SFT": (V_STAR + " --config.sft.steps=many", "config.sft.steps='many'"),
    "test samples below 0": (V_STAR + " --config.select.samples=-1", "config.select.samples=-1"),
    "a vote of none": (V_STAR + " --config.select.m=0", "config.select.m=0"),
    "V-STaR arm with a taken name": ("train --config={root}/configs/g_sft.py --workdir={root}/new", "config.arms.g_sft cannot be"),
    "gate that V-STaR does not measure": ("train --config={root}/configs/v_gate.py --workdir={root}/new", "metric='accuracy' is not one of pass@1"),
    "verifier folder that is not there": (SCORED + " --verifier=dpo={root}/none", "'{root}/none' does not exist"),
    "verifier without a name": (SCORED + " --verifier={root}/models/good", "must be NAME=DIR"),
    "verifier without a head as an orm": (SCORED + " --verifier=v={root}/models/good:orm", "score 'orm' needs a model with a value head"),
    "verifier with nothing to score": (SCORED.replace("--samples=2", "") + " --verifier=v={root}/models/good", "give --samples=N"),
    "export of an unknown verifier": ("export --run={root}/run --verifier=dop --out={root}/new", "--verifier: invalid choice: 'dop'"),
    "export of a verifier that STaR has not": ("export --run={root}/run --arm=rationalisation --verifier=dpo --out={root}/new", "only V-STaR has verifiers"),
    "export of a verifier not yet trained": ("export --run={root}/v_run --arm=v_star --verifier=orm --out={root}/new", "no finished orm verifier"),
    "export of an untrained G_SFT": ("export --run={root}/v_run --arm=v_star --out={root}/new", "G_SFT is not trained yet"),
    # ---- the blind comparison
    "comparison of one thing": (COMPARE.replace("--b=y=", "--b=x="), "both sides are called 'x'"),
    "comparison with nothing": (COMPARE.partition("--b=")[0] + "--out={root}/new", "--b=NAME=FILE is missing"),
    "comparison of missing rationales": (COMPARE.replace("b.jsonl", "none.jsonl"), "none.jsonl: no such file"),
    "comparison of rows without text": (COMPARE.replace("b.jsonl", "short.jsonl"), "short.jsonl:1: field 'completion' is missing"),
    "comparison of different problems": (COMPARE.replace("b.jsonl", "c.jsonl"), "have no problem in common"),
    "comparison of equal texts": (COMPARE.replace("b.jsonl", "a.jsonl"), "hold the same rationales"),
    "no questions": (COMPARE + " --count=0", "--count: '0'"),
    "votes beside rationales": (COMPARE + " --votes={root}/data/votes/a.jsonl", "leave --a and --b out"),
    "votes without a key": (COUNT.replace("out={root}/votes", "out={root}/papers") + "/votes.jsonl", "papers: holds no key.json"),
    "votes of another page": (COUNT + "/other.jsonl", "other.jsonl:1: a vote of page 'q', but the key is that of 'p'"),
    "votes for neither": (COUNT + "/choice.jsonl", "choice.jsonl:1: choice 'up' is not one of left, equal, right"),
    "votes about nothing": (COUNT + "/item.jsonl", "item.jsonl:1: item '009' is not on the page"),
    "comparison into a folder of something else": (COMPARE.replace("{root}/new", "{root}/papers"), "papers: holds 'notes.txt' but no comparison"),
    "comparison over another one": (COMPARE.replace("{root}/new", "{root}/votes"), "votes: holds another comparison"),
    "export of an empty arm": ("export --run={root}/run --arm= --out={root}/new", "--arm is empty"),
    "name that leaves runs": (TRAIN.partition(" --workdir")[0] + " --config.name=../x", "config.name='../x' must name a folder inside runs/"),
    # ---- the config file
    "no such config": ("train --config={root}/none.py", "{root}/none.py: no such file"),
    "config in the home of nobody": ("train --config=~nobody_here/x.py", "--config=~nobody_here/x.py: no such file"),
    "copy to the home of nobody": ("configs copy sft ~nobody_here/x.py", "~nobody_here/x.py cannot be written"),
    "run in the home of nobody": ("report ~nobody_here/x", "~nobody_here/x: no such folder"),
    "export to the home of nobody": ("export --run={root}/none --out=~nobody_here/x", "--run={root}/none"),
    "model in the home of nobody": ("sample --model=~nobody_here/x --prompt=x", "~nobody_here/x"),
    "two names of a task": (
        TRAIN + """ --task=numeric --task-options='{{"name":"mine"}}'""", "train: --task-options: name is that of --task; leave it out"),
    "no steps of a base": (f"train --config={ROOT}/configs/star_arithmetic.py:steps=0", "config argument steps=0 must be 1 or more"),
    "config with a syntax error": ("train --config={root}/configs/syntax.py", "{root}/configs/syntax.py:2"),
    "config that raises on import": ("train --config={root}/configs/raises.py", "raises.py:3: ZeroDivisionError"),
    "config that raises in get_config": ("train --config={root}/configs/key.py", "key.py:2: KeyError: 'learning_rate'"),
    "config without get_config": ("train --config={root}/configs/empty.py", "defines no get_config"),
    "config of another type": ("train --config={root}/configs/dict.py", "returned a dict"),
    "config without a method": ("train --config={root}/configs/bare.py --workdir={root}/new", "config.method=None"),
    "config without a section": ("train --config={root}/configs/short.py --workdir={root}/new", "config.mesh is missing"),
    "config that is no Python file": ("train --config={root}/papers/notes.txt", "notes.txt"),
    "unknown config argument": (TRAIN.replace("smoke", "smoek"), "'smoek' is unknown (did you mean smoke?)"),
    "config argument of another type": (TRAIN.replace("smoke", "seed=x"), "seed='x' must be of type int"),
    # ---- values given on the command line
    "unknown section": (TRAIN + " --config.trian.lr=1", "config.trian is unknown (did you mean train?)"),
    "unknown top-level key": (TRAIN + " --config.sed=1", "--config.sed is unknown (did you mean seed?)"),
    "unknown train key": (TRAIN + " --config.train.batchsize=8", "config.train.batchsize is unknown (did you mean batch_size?)"),
    "unknown base key": (TRAIN + " --config.base.stesp=8", "config.base.stesp is unknown"),
    "unknown sample key": (TRAIN + " --config.sample.temp=1", "config.sample.temp is unknown"),
    "unknown loop key": (TRAIN + " --config.loop.niters=1", "config.loop.niters is unknown (did you mean n_iters?)"),
    "unknown arm key": (TRAIN + " --config.arms.rationalisation.kk=2", "config.arms.rationalisation.kk is unknown"),
    "unknown arm": (TRAIN + " --config.arms.rationalization.k=2", "did you mean rationalisation?"),
    "unknown evaluate key": (TRAIN + " --config.evaluate.splt=test", "config.evaluate.splt is unknown"),
    "unknown model key": (TRAIN + " --config.model.hidden=8", "config.model.hidden is unknown"),
    "a section as a value": (TRAIN + " --config.train=3", "--config.train is a section"),
    "a flag without value": (TRAIN + " --config.train.lr", "--config.train.lr has no value"),
    "text for a number": (TRAIN + " --config.train.lr=fast", "--config.train.lr=fast must be of type float"),
    "fraction for a whole number": (TRAIN + " --config.train.batch_size=2.5", "--config.train.batch_size=2.5 must be of type int"),
    "text for a switch": (TRAIN + " --config.train.packed=maybe", "--config.train.packed=maybe must be of type bool"),
    "text for a new number": (TRAIN + " --config.loop.k=many", "config.loop.k='many' must be of type int"),
    # ---- values that make no sense
    "unknown method": (TRAIN + " --config.method=sta", "config.method='sta' is unknown (did you mean star?)"),
    "unknown task": (TRAIN + " --config.task.name=arithmetics", "'arithmetics' is unknown (did you mean arithmetic?)"),
    "unknown task option": (TRAIN + " --config.task.digits=3", "option 'digits' is unknown"),
    "task option of another type": (TRAIN + " --config.task.eval_digits=3", "option eval_digits=3"),
    "task option out of range": (TRAIN + " --config.task.eval_per_length=0", "eval_per_length=0"),
    "unknown preset": (TRAIN + " --config.arms.rationalisation.preset=satr", "preset='satr' is unknown (did you mean star?)"),
    "unknown model preset": (TRAIN + " --config.model.preset=tinny", "'tinny' is unknown (did you mean tiny?)"),
    "neither model nor preset": (TRAIN + " --config.model.preset=", "config.model: neither path"),
    "impossible model size": (TRAIN + " --config.model.num_heads=0", "num_heads=0"),
    "unknown dtype": (TRAIN + " --config.model.dtype=float8", "dtype='float8'"),
    "bad loop.steps": (TRAIN + " --config.loop.steps=40", "config.loop.steps='40' is not of the form"),
    "negative loop.steps": (TRAIN + " --config.loop.steps=lin:-5:1", "config.loop.steps='lin:-5:1'"),
    "bad restart": (TRAIN + " --config.loop.restart=last", "config.loop.restart='last' is not one of base, previous"),
    "bad share": (TRAIN + " --config.loop.seed_share=1.5", "config.loop.seed_share=1.5"),
    "unknown schedule": (TRAIN + " --config.train.schedule=step", "config.train.schedule='step' is not one of"),
    "batch size 0": (TRAIN + " --config.train.batch_size=0", "config.train.batch_size=0"),
    "batch size of the base 0": (TRAIN + " --config.base.batch_size=0", "config.base.batch_size=0"),
    "batch size and accumulate": (TRAIN + " --config.train.accumulate=5", "config.train.accumulate=5 does not divide batch_size=32"),
    "negative save_every": (TRAIN + " --config.train.save_every=-1", "config.train.save_every=-1"),
    "a profile that ends before it begins": (TRAIN + " --profile=13:10", "--profile=13:10 must be FIRST:LAST"),
    "unknown transfer guard": (TRAIN + " --config.train.transfer_guard=no", "transfer_guard='no' is not one of allow, log"),
    "no profile in a dry run": (TRAIN + " --dry-run --profile=abc", "--profile=abc must be FIRST:LAST"),
    "end of text of a model from scratch": (TRAIN + " --config.model.eos_id=-1", "config.model.eos_id: a model from scratch"),
    "no batch size": (TRAIN + " --config.train.batch_size=None", "config.train.batch_size=None must be of type int"),
    "unknown attention": (TRAIN + " --config.model.attention=flash", "attention='flash' is not one of auto, xla, tiles, splash"),
    "log_every 0": (TRAIN + " --config.train.log_every=0", "config.train.log_every=0"),
    "learning rate nan": (TRAIN + " --config.train.lr=nan", "config.train.lr=nan"),
    "negative temperature": (TRAIN + " --config.sample.temperature=-1", "config.sample.temperature=-1.0"),
    "top_p 0": (TRAIN + " --config.sample.top_p=0", "config.sample.top_p=0.0"),
    "unknown split": (TRAIN + " --config.evaluate.split=dev", "config.evaluate.split='dev' is not one of train, val, test"),
    "negative limit": (TRAIN + " --config.evaluate.limit=-1", "config.evaluate.limit=-1"),
    "gate on nothing": ("train --config={root}/configs/gate.py --workdir={root}/new", "config.gates.first.metric='acuracy'"),
    "arm with a taken name": ("train --config={root}/configs/arm.py --workdir={root}/new", "config.arms.base cannot be"),
    "no arms": ("train --config={root}/configs/no_arms.py --workdir={root}/new", "config.arms is empty"),
    "row shorter than the seed rows": (TRAIN + " --config.base.row_length=12", "config.base.row_length=12"),
    "row shorter than the hinted seeds": (TRAIN + " --config.train.row_length=12", "config.train.row_length=12"),
    "context shorter than a prompt": (TRAIN + " --config.model.max_positions=36", "model's context of 36 tokens"),
    # ---- the mesh
    "mesh of more devices": (TRAIN + " --config.mesh=data=1,fsdp=64", "mesh 'data=1,fsdp=64' needs 64 devices"),
    "unknown mesh axis": (TRAIN + " --config.mesh=date=1", "'date=1' is not one of data=N"),
    "two free mesh axes": (TRAIN + " --config.mesh=data=-1,fsdp=-1", "only one axis can be -1"),
    # ---- model folders
    "no model folder": ("sample --model={root}/none --prompt=x", "'{root}/none' does not exist"),
    "model folder without config.json": ("sample --model={root}/papers --prompt=x", "config.json is missing"),
    "broken config.json": ("sample --model={root}/models/broken --prompt=x", "{root}/models/broken/config.json:3"),
    "config.json with a text for a number": ("sample --model={root}/models/texts --prompt=x", "texts/config.json"),
    "unsupported model_type": ("sample --model={root}/models/mamba --prompt=x", "model_type 'mamba' is not one of"),
    "no weights": ("sample --model={root}/models/hollow --prompt=x", "hollow: no weights found"),
    "truncated weights": ("sample --model={root}/models/truncated --prompt=x", "truncated/model.safetensors: truncated"),
    "weights of another shape": ("sample --model={root}/models/shape --prompt=x", "'model.norm.weight' has shape (7,)"),
    "missing tensor": ("sample --model={root}/models/missing --prompt=x", "'model.norm.weight' that config.json asks for"),
    "pickled weights": ("sample --model={root}/models/pickle --prompt=x", "pytorch_model.bin"),
    "text without a tokenizer": ("sample --model={root}/models/mute --prompt=x", "no tokenizer"),
    "character outside the tokenizer": ("sample --model={root}/models/good --prompt=x", "'x'"),
    "training a model without weights": (TRAIN + " --config.model.path={root}/models/hollow", "config.model"),
    "training a folder that is not there": (f"train --config={GSM} --config.model.path={{root}}/none --workdir={{root}}/new", "{root}/none"),
    "size of a pretrained model": (TRAIN + " --config.model.path={root}/models/good", "is fixed by the weights"),
    # ---- sampling
    "prompt longer than the context": (SAMPLE.replace("1+1=", "1" * 60), "exceed the model's context of 40 tokens"),
    "empty prompt": (SAMPLE.replace("1+1=", ""), "prompt 0 is empty"),
    "bad temperature": (SAMPLE + " --temperature=-0.1", "--temperature: '-0.1'"),
    "temperature nan": (SAMPLE + " --temperature=nan", "--temperature: 'nan'"),
    "bad top_p": (SAMPLE + " --top-p=0", "--top-p: '0'"),
    "bad top_k": (SAMPLE + " --top-k=-1", "--top-k: '-1'"),
    "no samples": (SAMPLE + " --n=0", "--n: '0'"),
    "no tokens": (SAMPLE + " --max-new-tokens=0", "--max-new-tokens: '0'"),
    "unknown sample dtype": (SAMPLE + " --dtype=int8", "'int8'"),
    # ---- data
    "broken line": (f"train --config={GSM},data={{root}}/data/broken --workdir={{root}}/new", "data/broken/train.jsonl:2: not JSON"),
    "missing field": (f"train --config={GSM},data={{root}}/data/field --workdir={{root}}/new", "train.jsonl:2: field 'answer' is missing"),
    "number for a text": (f"train --config={GSM},data={{root}}/data/number --workdir={{root}}/new", "train.jsonl:1: field 'answer' is of type int"),
    "answer without a mark": (f"train --config={GSM},data={{root}}/data/mark --workdir={{root}}/new", "train.jsonl:1: field 'answer' has no '####"),
    "empty data set": (f"train --config={GSM},data={{root}}/data/empty --workdir={{root}}/new", "empty/train.jsonl: no records"),
    "no data file": (f"train --config={GSM},data={{root}}/none --workdir={{root}}/new", "{root}/none/train.jsonl: no such file"),
    "no prompts": (f"train --config={GSM},prompts={{root}}/none --workdir={{root}}/new", "{root}/none/gsm_prompts.txt: no such few-shot file"),
    # ---- run folders
    "a file for a run folder": (f"train --config={SUMS} --workdir={{root}}/papers/notes.txt", "notes.txt is a file"),
    "a run folder inside a file": (f"train --config={SUMS} --workdir={{root}}/papers/notes.txt/run", "notes.txt is a file"),
    "somebody's folder": (f"train --config={SUMS} --workdir={{root}}/papers", "papers: holds notes.txt but no run"),
    "run of another config": (f"train --config={SUMS} --config.train.lr=0.5 --workdir={{root}}/run", "config.train.lr=0.0015, now it is 0.5"),
    "run folder with a broken config.json": (f"train --config={SUMS} --workdir={{root}}/damaged", "damaged/config.json:1"),
    "checkpoint of another model": (f"train --config={SUMS} --workdir={{root}}/run", "embed/table is (20, 32), expected (20, 64)"),
    # ---- evaluate, export, report
    "evaluate an unknown task": (EVALUATE + " --task=gsm", "'gsm' is unknown (did you mean gsm8k?)"),
    "evaluate with broken JSON": (EVALUATE + " --task=arithmetic --task-options={{", "--task-options"),
    "evaluate with a JSON list": (EVALUATE + " --task=arithmetic --task-options=[]", "is a JSON list, not an object"),
    "evaluate with an unknown option": (EVALUATE + """ --task=gsm8k --task-options='{{"tset":"x"}}'""", "'tset' is unknown (did you mean test?)"),
    "evaluate on missing data": (EVALUATE + """ --task=gsm8k --task-options='{{"test":"{root}/x.jsonl"}}'""", "{root}/x.jsonl: no such file"),
    "evaluate on an unset variable": (EVALUATE + """ --task=gsm8k --task-options='{{"test":""}}'""", "'' is neither a file nor a hub name"),
    "evaluate in two formats": (
        EVALUATE + """ --task=math --task-options='{{"format":"gsm8k"}}' --format=plain""", "evaluate: --task-options has a format, too; leave one out"),
    "evaluate on half a test set": (EVALUATE + " --task=humaneval --split=train", "humaneval: has no 'train' problems, only test"),
    "unknown template": (EVALUATE + """ --task=humaneval --task-options='{{"template":"x"}}'""", "template='x' is not one of mbpp, completion"),
    "no time for programs": (EVALUATE + """ --task=mbpp --task-options='{{"timeout_s":0}}'""", "mbpp: timeout_s=0 must be above 0"),
    "shots from the test set": (EVALUATE + """ --task=mbpp --task-options='{{"shots":[2,11]}}'""", "11 is not a few-shot task"),
    "tests that test nothing": (
        EVALUATE + """ --task=mbpp --task-options='{{"data":"{root}/data/code/mbpp.jsonl"}}'""", "mbpp.jsonl:1: tests: assert nothing"),
    "prompt without its function": (
        EVALUATE + """ --task=humaneval --task-options='{{"data":"{root}/data/code/humaneval.jsonl"}}'""", "does not define 'g'"),
    "unknown subset": (EVALUATE + """ --task=math --task-options='{{"subset":"vstar"}}'""", "subset='vstar' is not one of all, v_star"),
    "solution without an answer": (
        EVALUATE + """ --task=math --task-options='{{"test":"{root}/data/code/math.jsonl"}}'""", "math.jsonl:1: the solution holds no \\boxed"),
    "evaluate a negative number of problems": (EVALUATE + " --task=arithmetic --limit=-1", "--limit: '-1'"),
    "evaluate answers with thoughts": (EVALUATE + " --task=gsm8k --thoughts=on", "--thoughts does not go with --metric=answers, only with --harness or --metric=expected or --metric=cot"),
    "evaluate probabilities of samples": (EVALUATE.split(" --out")[0] + " --task=gsm8k --metric=expected --samples=3", "--samples does not go with --metric=expected, only with --metric=answers or --metric=cot"),
    "evaluate an unknown split": (EVALUATE + " --task=arithmetic --split=dev", "'dev'"),
    "evaluate beyond the context": (EVALUATE + " --task=arithmetic --max-new-tokens=99", "model's context of 40 tokens"),
    "evaluate without a tokenizer": (EVALUATE.replace("good", "mute") + " --task=arithmetic", "needs a tokenizer"),
    "evaluate into somebody's folder": (
        EVALUATE.replace("/new", "/papers") + " --task=arithmetic --max-new-tokens=9", "--out={root}/papers: holds notes.txt"),
    "evaluate into a run": (EVALUATE.replace("/new", "/run") + " --task=arithmetic --max-new-tokens=9", "--out={root}/run: was made with"),
    "export of no folder": ("export --run={root}/none --out={root}/new", "--run={root}/none"),
    "export of no run": ("export --run={root}/models/good --out={root}/new", "not that of a run"),
    "export of an unknown arm": ("export --run={root}/run --arm=rationalization --out={root}/new", "did you mean rationalisation?"),
    "export of an unknown iteration": ("export --run={root}/run --arm=rationalisation --iteration=9 --out={root}/new", "no finished iteration 9"),
    "export of some arm or other": ("export --run={root}/run --out={root}/new", "name one with --arm"),
    "export of an untrained base": ("export --run={root}/early --iteration=0 --out={root}/new", "base is not trained yet"),
    "export of a foreign checkpoint": ("export --run={root}/run --iteration=0 --out={root}/new", "embed/table is (20, 32)"),
    "export onto somebody's folder": ("export --run={root}/run --out={root}/papers", "'notes.txt', which is no part of a model"),
    "export onto a file": ("export --run={root}/run --out={root}/papers/notes.txt", "notes.txt is a file"),
    "report of no folder": ("report {root}/none", "{root}/none: no such folder"),
    "report of no run": ("report {root}/papers", "{root}/papers: not the folder of a run"),
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The folder all cases look at and may not change."""
    root = tmp_path_factory.mktemp("world")
    make_configs(root / "configs")
    make_models(root / "models")
    make_data(root / "data")
    make_runs(root)
    (root / "papers").mkdir()
    (root / "papers" / "notes.txt").write_text("the only copy\n")
    return root


def make_configs(folder):
    head = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom configs import star_arithmetic\n"
    sums = head + "def get_config(arg=None):\n  c = star_arithmetic.get_config('smoke')\n  "
    verified = sums.replace("star_arithmetic", "v_star_arithmetic")
    texts = {
        "syntax": "x = 1\ndef get_config(:\n",
        "raises": "x = 1\n\ny = 1 / 0\n",
        "key": "def get_config(arg=None):\n  return {}['learning_rate']\n",
        "empty": "",
        "dict": "def get_config(arg=None):\n  return {}\n",
        "bare": "from ml_collections import ConfigDict\ndef get_config(arg=None):\n  return ConfigDict({'name': 'x'})\n",
        "short": sums + "del c.mesh\n  return c\n",
        "gate": sums + "c.gates = {'first': {'metric': 'acuracy', 'min': 0.5, 'why': 'it must'}}\n  return c\n",
        "arm": sums + "c.arms = {'base': {'preset': 'star'}}\n  return c\n",
        "g_sft": verified + "c.arms = {'g_sft': {'preset': 'v_star'}}\n  return c\n",
        "v_gate": verified + "c.gates = {'first': {'metric': 'accuracy', 'min': 0.5, 'why': 'it must'}}\n  return c\n",
        "no_arms": sums + "c.arms = {}\n  return c\n",
    }
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)


def zeros(config):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(config))


def make_models(folder):
    tokenizer = char_tokenizer(ALPHABET, pad=PAD, eos=EOS)
    small = preset("tiny", vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=1, max_positions=40)
    save(Model(small, zeros(small), tokenizer), folder / "good")
    save(Model(small, zeros(small)), folder / "mute")
    llama = preset(
        "llama_20m", hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=32
    )
    for name in ("broken", "texts", "mamba", "hollow", "truncated", "shape", "missing", "pickle"):
        hf.write_params(folder / name, llama, zeros(llama))
    config = json.loads((folder / "mamba" / "config.json").read_text())
    (folder / "mamba" / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    (folder / "texts" / "config.json").write_text(json.dumps({**config, "num_attention_heads": "two"}))
    (folder / "broken" / "config.json").write_text('{\n "a": 1,\n')
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    tensors = load_file(folder / "shape" / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "missing" / "model.safetensors")
    save_file({**tensors, "model.norm.weight": norm[:7]}, folder / "shape" / "model.safetensors")
    for name in ("hollow", "pickle"):
        (folder / name / "model.safetensors").unlink()
    (folder / "pickle" / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def make_data(folder):
    good = json.dumps({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}) + "\n"
    texts = {
        "broken": good + '{"question": "1',
        "field": good + '{"question": "1 + 1?"}\n',
        "number": '{"question": "1 + 1?", "answer": 2}\n',
        "mark": '{"question": "1 + 1?", "answer": "2"}\n',
        "empty": "\n",
    }
    for name, text in texts.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(text)
        (folder / name / "test.jsonl").write_text(good)

    row, votes = {"problem_id": "1", "prompt": "1 + 1?"}, {"page": "p", "item": "000", "choice": "left"}
    rows = {name: {**row, "completion": name} for name in "ab"}
    rows |= {"c": {**row, "problem_id": "2", "completion": "c"}, "short": row}
    rows |= {"other": {**votes, "page": "q"}, "choice": {**votes, "choice": "up"}, "item": {**votes, "item": "009"}}
    (folder / "votes").mkdir()
    for name, row in rows.items():
        (folder / "votes" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    code = {"mbpp": {"task_id": 11, "text": "t", "code": "x = 1", "test_list": ["f(1)"]}}
    code["humaneval"] = {
        "task_id": "a",
        "prompt": "def f(): 0",
        "canonical_solution": "",
        "test": "assert 1",
        "entry_point": "g",
    }
    code["math"] = {"problem": "1 + 1", "solution": "2", "level": "Level 1", "type": "Algebra"}
    (folder / "code").mkdir()
    for name, row in code.items():
        (folder / "code" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")


def make_runs(root):
    """`run`: its base is of another size than its config says; `early`: killed before the base was done."""
    config = read_config(SUMS).to_dict()
    for name in ("run", "early"):
        open_run(root / name, config)
        unlock(root / name)
        Writer(root / name).close()
    other = preset("tiny", vocab_size=20, hidden_size=32, num_layers=2)
    weights = Checkpoints(root / "run" / "base" / "model")
    weights.save(150, zeros(other))
    weights.close()
    write_json(root / "run" / "base" / "summary.json", {"steps": 150})
    open_run(root / "v_run", read_config(SUMS_V).to_dict())
    unlock(root / "v_run")
    (root / "votes").mkdir()
    write_json(root / "votes" / "key.json", {"page": "p", "a": "x", "b": "y", "items": {"000": {"left": "a"}}})
    (root / "damaged").mkdir()
    (root / "damaged" / "config.json").write_text('{"method": ')


def snapshot(folder):
    """Every path below a folder, with the bytes of the files; not when a run was started and ended."""
    found = [p for p in sorted(folder.rglob("*")) if p.name not in ("environment.json", "resolved.json")]
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_and_changes_nothing(name, root, capfd, monkeypatch):
    for variable in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):  # `main` sets them: back to these afterwards
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    monkeypatch.chdir(root)  # a default folder (runs/...) would show in the snapshot, too
    command, culprit = (text.format(root=root) for text in CASES[name])
    before = snapshot(root)
    code = main(shlex.split(command))
    error = capfd.readouterr().err
    assert code == 2, error
    lines = error.splitlines()
    assert len(lines) == 1 and lines[0].startswith("qstar: "), error
    assert culprit in lines[0]
    assert "Traceback" not in error
    assert snapshot(root) == before


@pytest.mark.skipif(find_spec("jax_cuda12_plugin") is not None, reason="JAX has its GPU plugin here")
def test_a_gpu_without_its_plugin(root):
    """In a process of its own, since JAX chooses its platform once; nothing else may stand on stderr either."""
    command = [sys.executable, "-m", "qstar", "sample", "--device=gpu", f"--model={root}/models/good", "--prompt=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("qstar: --device=gpu: JAX finds none") and done.stderr.count("\n") == 1, done.stderr


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    """Nothing but a UserError is caught: a bug must not pass for bad input."""
    monkeypatch.setattr("qstar.commands.report.main", lambda argv: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        main(["report", "x"])
