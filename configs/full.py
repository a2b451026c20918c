"""Full fine-tuning on your own pairs: fork this file.

python -m tuner.main --config=configs/full.py --workdir=runs/full
Hardware: 16 bytes a parameter for weights and AdamW, divided along fsdp.
Time: this model trains 190 tokens/s on 2 CPU cores (docs/performance.md).
Expected: base and tuned on your held-out rows.
"""

import ml_collections


def get_config():
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.model = dict(
    path='HuggingFaceTB/SmolLM2-135M-Instruct',  # hub id or directory
    dtype='bfloat16',
    master='float32',  # weights as the optimizer sees them
    remat='dots',
  )
  config.data = dict(
    path='data.jsonl',
    system=None,
    max_tokens=1024,
    too_long='error',
    test=0.1,
    dev=0.05,
  )
  config.batch = dict(rows=8, tokens=1024, accumulate=1)
  config.train = dict(steps='2 epochs', clip_norm=1.0)
  config.adapt = dict(name='full')
  config.objective = dict(name='sft')
  config.optimizer = dict(name='adamw', b2=0.95, weight_decay=0.01)
  config.schedule = dict(name='cosine', peak=3e-5, warmup_steps=20)
  config.evaluate = dict(
    metrics=('exact', 'contains'), max_tokens=256, rows=64, every=100
  )
  config.checkpoint = dict(every=100, keep_last=2, keep_best=1)
  config.export = dict(formats=('model',))
  config.mesh = dict(data=1, fsdp=-1, tensor=1)
  config.log = dict(writers=('jsonl', 'tensorboard'))
  return config
