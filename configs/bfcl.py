"""One function call for a question (BFCL simple_python), with a LoRA.

python scripts/fetch_quickstart.py; python scripts/fetch_bfcl.py
python -m tuner.main --config=configs/bfcl.py --workdir=runs/bfcl
Hardware: 2 CPU cores, 4 GB. Time: 8 minutes of training on a busy machine, 4
more for base and tuned each. Expected on 105 questions of other functions:
function_call 0.57 [0.48, 0.66]; the base has 0 (docs/results.md).
"""

import os

import ml_collections

CACHE = os.environ.get('TUNER_CACHE') or '~/.cache/tuner'


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(path=f'{CACHE}/SmolLM2-135M-Instruct')
  config.data = dict(
    path=f'{CACHE}/bfcl.train.jsonl',
    template='chatml',  # SmolLM2's own shows no tools.
    max_tokens=512,
    carry=('accepted',),  # What the leaderboard takes for each argument.
    dev=f'{CACHE}/bfcl.dev.jsonl',  # Of other functions, as those of test.
    test=f'{CACHE}/bfcl.test.jsonl',
  )
  config.batch = dict(rows=1, tokens=1024)
  config.train = dict(steps='1 epoch', clip_norm=1.0)
  config.adapt = dict(name='lora', rank=16, alpha=32.0)
  config.objective = dict(name='sft')
  config.optimizer = dict(name='adamw', b2=0.99)
  config.schedule = dict(name='cosine', peak=2e-3, warmup_steps=5)
  config.evaluate = dict(
    metrics=('function_call', 'exact'), max_tokens=128, rows=64
  )
  config.checkpoint = dict(every=50, keep_last=2)
  config.export = dict(formats=('adapter', 'model'))
  config.mesh = dict(devices=1)  # One row a step is for one device.
  return config
