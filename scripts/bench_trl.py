"""Prints one JSON line: what TRL + PEFT reach on a CPU, for bench_cpu.py.

Runs in TRL's own virtual environment and knows nothing of tuner. It trains
with SFTTrainer itself, in float32, loss on the assistant's turn and its stop
token, and times steps from a TrainerCallback. Layouts of a batch:

  grouped  rows of like length together, batches in random order, padded to
           the longest of the batch
  packed   TRL's best-fit-decreasing packing into rows of --tokens; padding
           free, with transformers' block-diagonal mask under sdpa
  padded   rows in random order, padded to the longest of the batch

`grouped` is the default: in one run of three steps each (trl 1.16.0, torch
2.13.0, LoRA, two cores that were not quite idle) it reached 164 real tokens/s
and `packed`, whose dense mask makes every row attend over all 1,024 tokens,
99. With --compile no step had ended after 170 s on busy cores (shapes differ
from batch to batch). `padded` and eager attention were not measured.
"""

import argparse
import itertools
import json
import os
import random
import resource
import tempfile
import time
import typing

import datasets
import peft
import torch
import transformers
import trl

# ChatML, marked so that TRL finds the assistant's turn and its stop token.
# `check_template` holds it to what the model's own template renders.
CHATML = (
  "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
  "{% if m['role'] == 'assistant' %}{% generation %}"
  "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
  '{% endfor %}'
)


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line's values; bench_cpu.py passes all of them."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', required=True, help='Hugging Face directory')
  parser.add_argument('--rows', required=True, help='JSONL of messages')
  parser.add_argument('--method', choices=['lora', 'full'], default='lora')
  layouts = ['grouped', 'packed', 'padded']
  parser.add_argument('--layout', choices=layouts, default='grouped')
  parser.add_argument('--optim', default='adamw_torch_fused')
  parser.add_argument('--attention', default='sdpa')
  parser.add_argument('--compile', action='store_true', help='torch.compile')
  parser.add_argument('--tokens', type=int, default=1024, help='a step')
  parser.add_argument('--warmup', type=int, default=3, help='untimed steps')
  parser.add_argument('--steps', type=int, default=8, help='timed steps')
  parser.add_argument('--lr', type=float, default=1e-3)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--threads', type=int, default=2)
  return parser.parse_args(argv)


def since_start_s() -> float:
  """Seconds since this process was started (Linux, to 10 ms)."""
  with open('/proc/self/stat') as f:
    ticks = int(f.read().rpartition(')')[2].split()[19])
  with open('/proc/uptime') as f:
    uptime_s = float(f.read().split()[0])
  return uptime_s - ticks / os.sysconf('SC_CLK_TCK')


def read_rows(path: str) -> list[list[dict[str, str]]]:
  """The messages of every line of `path`."""
  with open(path, encoding='utf-8') as f:
    return [json.loads(line)['messages'] for line in f]


def check_template(tokenizer: typing.Any, messages: list) -> None:
  """Raises ValueError where CHATML is not what the model's template says."""
  own = tokenizer.apply_chat_template(messages, tokenize=False)
  ours = tokenizer.apply_chat_template(
    messages, tokenize=False, chat_template=CHATML
  )
  if own != ours:
    raise ValueError(
      f"the model's chat template renders {own!r}, CHATML of this script "
      f'{ours!r}: only ChatML models can be measured here.'
    )


def lengths_tokens(tokenizer: typing.Any, rows: list) -> list[int]:
  """The length of every row with the chat template."""
  texts = [tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
  return [len(tokenizer(t, add_special_tokens=False).input_ids) for t in texts]


def order_rows(rows: list, lengths: list[int], batch: int, flags) -> list:
  """`rows` in the order of training; shuffled unless the layout sorts.

  group_by_length of transformers also sorts within megabatches, but runs
  through each from the longest down, so that a short measurement would see
  long rows only; hence whole batches are shuffled here.
  """
  rng = random.Random(flags.seed)
  order = list(range(len(rows)))
  rng.shuffle(order)
  if flags.layout == 'grouped':
    order.sort(key=lambda i: lengths[i])
    groups = [order[i : i + batch] for i in range(0, len(order), batch)]
    rng.shuffle(groups)
    order = list(itertools.chain.from_iterable(groups))
  return [rows[i] for i in order]


def sft_config(flags: argparse.Namespace, batch: int, where: str):
  """The SFTConfig: nothing but training, and all that helps a CPU."""
  packed = flags.layout == 'packed'
  return trl.SFTConfig(
    output_dir=where,
    max_steps=flags.warmup + flags.steps,
    per_device_train_batch_size=1 if packed else batch,
    gradient_accumulation_steps=1,
    max_length=flags.tokens,
    packing=packed,
    packing_strategy='bfd',
    train_sampling_strategy='random' if packed else 'sequential',
    assistant_only_loss=True,
    learning_rate=flags.lr,
    lr_scheduler_type='cosine',
    optim=flags.optim,
    weight_decay=0.0,
    max_grad_norm=1.0,
    gradient_checkpointing=False,
    torch_compile=flags.compile,
    bf16=False,
    use_cpu=True,
    dataloader_num_workers=0,
    dataloader_pin_memory=False,
    logging_steps=1,
    logging_nan_inf_filter=False,
    save_strategy='no',
    report_to='none',
    disable_tqdm=True,
    seed=flags.seed,
  )


class Clock(transformers.TrainerCallback):
  """Notes wall and processor time after every step, and the losses."""

  def __init__(self):
    """Starts with no step seen."""
    self.times_s: list[float] = []
    self.cpu_s: list[float] = []
    self.first_step_s = 0.0
    self.losses: list[float] = []

  def on_step_end(self, args, state, control, **kwargs):
    """Called by Trainer after the optimizer's step."""
    self.times_s.append(time.perf_counter())
    self.cpu_s.append(time.process_time())
    self.first_step_s = self.first_step_s or since_start_s()

  def on_log(self, args, state, control, logs=None, **kwargs):
    """Called by Trainer with the logged values of a step."""
    if 'loss' in logs:
      self.losses.append(float(logs['loss']))


def count_tokens(batch: dict[str, torch.Tensor]) -> tuple[int, int]:
  """(non-pad tokens, tokens in the loss) of a collated batch.

  A padding-free batch has no attention_mask: every token of it is real.
  """
  mask = batch.get('attention_mask', torch.ones_like(batch['input_ids']))
  return int(mask.sum()), int((batch['labels'][:, 1:] != -100).sum())


def make_trainer(flags: argparse.Namespace, where: str):
  """(SFTTrainer, Clock, counts): counts grows by one entry a batch."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(flags.model)
  rows = read_rows(flags.rows)
  check_template(tokenizer, rows[0])
  lengths = lengths_tokens(tokenizer, rows)
  batch = max(1, round(flags.tokens * len(rows) / sum(lengths)))
  rows = order_rows(rows, lengths, batch, flags)
  tokenizer.chat_template = CHATML
  model = transformers.AutoModelForCausalLM.from_pretrained(
    flags.model, dtype=torch.float32, attn_implementation=flags.attention
  )
  lora = peft.LoraConfig(
    r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM'
  )
  clock = Clock()
  trainer = trl.SFTTrainer(
    model=model,
    args=sft_config(flags, batch, where),
    train_dataset=datasets.Dataset.from_list([{'messages': r} for r in rows]),
    processing_class=tokenizer,
    peft_config=lora if flags.method == 'lora' else None,
    callbacks=[clock],
  )
  counts: list[tuple[int, int]] = []
  collate = trainer.data_collator

  def collate_and_count(examples):
    """What TRL's collator returns, its tokens counted on the way."""
    out = collate(examples)
    counts.append(count_tokens(out))
    return out

  trainer.data_collator = collate_and_count
  return trainer, clock, counts


def measure(flags: argparse.Namespace) -> dict[str, typing.Any]:
  """Trains and returns the figures of the timed steps."""
  torch.set_num_threads(flags.threads)
  with tempfile.TemporaryDirectory() as where:
    trainer, clock, counts = make_trainer(flags, where)
    trainer.train()
  # Batches are collated in the order of the steps, up to one ahead of them.
  timed = counts[flags.warmup : flags.warmup + flags.steps]
  peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  params = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
  return {
    'real_tokens': sum(real for real, _ in timed),
    'target_tokens': sum(target for _, target in timed),
    'seconds': clock.times_s[-1] - clock.times_s[flags.warmup - 1],
    'cpu_seconds': clock.cpu_s[-1] - clock.cpu_s[flags.warmup - 1],
    'steps': len(timed),
    'peak_rss_bytes': peak_kib * 1024,
    'first_step_s': clock.first_step_s,
    'losses': clock.losses,
    'trainable_params': sum(params),
    'layout': flags.layout,
    'attention': trainer.model.config._attn_implementation,
    'versions': {
      m.__name__: m.__version__ for m in (torch, transformers, trl, peft)
    },
  }


def main() -> None:
  """Prints the figures as the last line of stdout."""
  flags = parse_flags()
  if flags.warmup < 1 or flags.steps < 1:
    raise ValueError(
      f'--warmup={flags.warmup} --steps={flags.steps}: both must be at least '
      '1; time is counted from the end of the last warm-up step.'
    )
  print(json.dumps(measure(flags)), flush=True)


if __name__ == '__main__':
  main()
