"""BANKING77: 77 intents of a bank's customers, with a LoRA on SmolLM2-135M.

python scripts/fetch_quickstart.py; python scripts/fetch_banking77.py
python -m tuner.main --config=configs/banking77.py --workdir=runs/banking77
Hardware: 2 CPU cores, 3 GB. Time: 27 minutes of training on a busy machine, 8
more for base and tuned each. Expected on 3,080 test rows: label accuracy 0.78
[0.76, 0.79]; the base has 0. What it forgets: docs/results.md.
"""

import os

import ml_collections

CACHE = os.environ.get('TUNER_CACHE') or '~/.cache/tuner'


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(path=f'{CACHE}/SmolLM2-135M-Instruct')
  config.data = dict(
    path=f'{CACHE}/banking77/train.csv',  # 30 rows of each intent
    columns=dict(prompt='text', completion='category'),
    system='Name the intent of a message to a bank.',
    max_tokens=256,
    dev=f'{CACHE}/banking77/dev.csv',
    test=f'{CACHE}/banking77/test.csv',
  )
  config.batch = dict(rows=1, tokens=512)
  config.train = dict(steps='1 epoch', clip_norm=1.0)
  config.adapt = dict(name='lora', rank=16, alpha=32.0)
  config.objective = dict(name='sft')
  config.optimizer = dict(name='adamw', b2=0.99)
  config.schedule = dict(name='cosine', peak=2e-3, warmup_steps=10)
  config.evaluate = dict(metrics=('label', 'macro_f1'), max_tokens=20, rows=64)
  config.checkpoint = dict(every=100, keep_last=2)
  config.export = dict(formats=('adapter', 'model'))
  config.mesh = dict(devices=1)  # One row a step is for one device.
  return config
