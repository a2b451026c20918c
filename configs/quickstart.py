"""US addresses to JSON with a LoRA on SmolLM2-135M-Instruct.

scripts/quickstart.sh, or after scripts/fetch_quickstart.py:
python -m tuner.main --config=configs/quickstart.py --workdir=runs/quickstart
Hardware: 2 CPU cores, 3 GB. Time: 9 minutes. Expected on 164 held-out rows:
json_equal 0.46 [0.38, 0.53], field_f1 0.72 [0.67, 0.77]; the base has 0.
"""

import os

import ml_collections

CACHE = os.environ.get('TUNER_CACHE') or '~/.cache/tuner'


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(path=f'{CACHE}/SmolLM2-135M-Instruct')
  config.data = dict(
    path=f'{CACHE}/addresses.jsonl',
    system='Extract the parts of the US address as JSON.',
    max_tokens=256,
    test=0.12,
    ignore='[0-9]',  # PO boxes that differ by their number are one address.
  )
  config.batch = dict(rows=1, tokens=512)
  config.train = dict(steps='1 epoch', clip_norm=1.0)
  config.adapt = dict(name='lora', rank=16, alpha=32.0)
  config.objective = dict(name='sft')
  config.optimizer = dict(name='adamw', b2=0.99)
  config.schedule = dict(name='cosine', peak=2e-3, warmup_steps=10)
  config.evaluate = dict(
    metrics=('json_valid', 'json_equal', 'field_f1'), max_tokens=104, rows=64
  )
  config.checkpoint = dict(every=100, keep_last=2)
  config.export = dict(formats=('adapter', 'model'))
  config.mesh = dict(devices=1)  # One row a step is for one device.
  return config
