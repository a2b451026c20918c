"""Measures how a checkpoint is read onto devices, and prints a table.

  python scripts/bench_load.py --gb=3 --dtype=float32

A random Llama-shaped checkpoint of several files is written to a temporary
directory, a megabyte at a time. Each way of loading it runs in a process of
its own, on virtual CPU devices, whose memory is the host's. So what counts is
the peak of anonymous memory beyond what the process held before and the devices
hold after. Mapped pages of the checkpoint (RssFile) are the system's cache of
the file: they are counted apart, and a system short of memory takes them back.
`naive` reads each file whole (safetensors.numpy.load_file), stacks the layers
and puts them on the devices. `write` is the way back, from the devices to files
that are deleted again.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
MESHES = {'1': (1, 1, 1), 'fsdp=8': (1, 8, 1), 'fsdp=2,tensor=4': (1, 2, 4)}
WAYS = ('tuner', 'naive', 'write')
# Llama 3.2 3B: width, mlp, heads, key heads; half its vocabulary.
SHAPE = {
  'hidden_size': 3072,
  'intermediate_size': 8192,
  'num_attention_heads': 24,
  'num_key_value_heads': 8,
  'vocab_size': 64128,
}
SMALL = {
  'hidden_size': 512,
  'intermediate_size': 2048,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'vocab_size': 8192,
}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
  """The command line's values."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--gb', type=float, default=3.0, help='on disk, about')
  parser.add_argument('--dtype', default='bfloat16', help='on disk')
  parser.add_argument('--to', default='', help='dtype to load as; as on disk')
  parser.add_argument('--threads', default='', help='such as 1,2,4')
  parser.add_argument('--meshes', default=';'.join(MESHES), help='; between')
  parser.add_argument('--ways', default=','.join(WAYS))
  parser.add_argument('--tmp', default=None, help='where the checkpoint goes')
  parser.add_argument('--child', default='', help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def main() -> None:
  flags = parse_flags()
  if flags.child:
    print(json.dumps(measure(**json.loads(flags.child))))
    return
  threads = [int(n) for n in flags.threads.split(',') if n] or [0]
  with tempfile.TemporaryDirectory(dir=flags.tmp) as folder:
    path = pathlib.Path(folder)
    size = write_checkpoint(path, flags.gb * 1e9, flags.dtype)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f'{size / 1e9:.2f} GB of {flags.dtype}; its writer: {peak:.0f} MB')
    print(row('way', 'devices', 'threads', 's', 'CPU s', 'GB/s', 'devices MB',
              'beyond MB', 'group MB', 'file MB', 'VmHWM MB'))  # fmt: skip
    for mesh in flags.meshes.split(';'):
      for way in flags.ways.split(','):
        for n in threads if way == 'tuner' else [0]:
          what = dict(path=folder, mesh=mesh, way=way, threads=n)
          found = in_child(**what, dtype=flags.to or flags.dtype)
          print(line(way, mesh, found, size), flush=True)


def row(*cells: object) -> str:
  return ' '.join(str(cell).rjust(11) for cell in cells)


def line(way, mesh, found, size) -> str:
  mb = {name: f'{value / 1e6:.0f}' for name, value in found.items()}
  rate = size / found['seconds'] / 1e9
  return row(
    way, mesh.replace('tensor', 't').replace('fsdp', 'f'), found['threads'],
    f'{found["seconds"]:.1f}', f'{found["cpu"]:.1f}', f'{rate:.2f}',
    mb['devices'], mb['beyond'], mb['group'], mb['file'], mb['peak'],
  )  # fmt: skip


def in_child(**what) -> dict[str, float]:
  """What `measure` says in a process of its own."""
  flags = '--xla_force_host_platform_device_count=8'
  env = {**os.environ, 'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
  env['PYTHONPATH'] = str(ROOT)
  done = subprocess.run(
    [sys.executable, __file__, '--child', json.dumps(what)],
    env=env, stdout=subprocess.PIPE, text=True, check=True,
  )  # fmt: skip
  return json.loads(done.stdout)


def measure(path, mesh, way, dtype, threads) -> dict[str, float]:
  """Bytes and seconds of one way of loading."""
  import jax

  from tuner import mesh as mesh_lib
  from tuner.models import hub, load, weights

  if threads:
    load.THREADS = threads
  sizes = MESHES[mesh]
  on = mesh_lib.make(*sizes, math.prod(sizes))
  model = hub.declare(pathlib.Path(path))

  def place(r):
    return mesh_lib.sharding(on, r.dims, r.shape(model.config.sizes))

  read = hub.load if way == 'tuner' else naive
  jax.block_until_ready(jax.device_put(0, jax.devices()[0]))
  before = memory()
  if way == 'write':
    values = hub.load(pathlib.Path(path), model, place, dtype)
    before = memory()
    before['RssAnon'] -= held_bytes(values.values())
    read = functools.partial(write, values=values)
  with Peak() as peak:
    start, cpu = time.perf_counter(), time.process_time()
    values = read(pathlib.Path(path), model, place, dtype)
    jax.block_until_ready(values)
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
  rows = weights.rows(model).values()
  held = held_bytes(values.values())
  group = max(math.prod(r.shape(model.config.sizes)) for r in rows)
  return {
    'seconds': seconds,
    'cpu': cpu,
    'threads': load.THREADS if way == 'tuner' else 1,
    'devices': held,
    'beyond': peak.anon - before['RssAnon'] - held,
    'group': group * jax.numpy.dtype(dtype).itemsize,
    'file': peak.file - before['RssFile'],
    'peak': memory()['VmHWM'],
  }


def write(path, model, place, dtype, values):
  """The values, once they are in files again."""
  from tuner.models import hub

  del place
  with tempfile.TemporaryDirectory(dir=path) as folder:
    hub.write(pathlib.Path(folder), model, values.__getitem__, dtype)
  return values


def naive(path, model, place, dtype):
  """Files whole, then stacked, then put: what is not done."""
  import jax
  import numpy as np
  import safetensors.numpy

  from tuner.models import hub, weights

  held = {}
  for file in hub.weight_files(path):
    held |= safetensors.numpy.load_file(file)
  values, sizes = {}, model.config.sizes
  for r in weights.rows(model).values():
    letters, order = r.dims[len(r.stacked) :], ''.join(r.groups)
    split = [sizes[d] for d in order]
    turn = [order.index(d) for d in letters]
    one = [
      held[n].reshape(split).transpose(turn) for n in r.names(sizes).values()
    ]
    value = (np.stack(one) if r.stacked else one[0]).astype(dtype)
    values[r.path] = jax.device_put(value, place(r))
  return values


def held_bytes(arrays) -> int:
  """What the devices hold; memory that two of them share counts once."""
  found = {}
  for x in arrays:
    for shard in x.addressable_shards:
      found[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
  return sum(found.values())


def memory() -> dict[str, int]:
  """Bytes of VmHWM, RssAnon and RssFile of this process."""
  names = ('VmHWM', 'RssAnon', 'RssFile')
  found = {}
  for text in pathlib.Path('/proc/self/status').read_text().splitlines():
    name, _, value = text.partition(':')
    if name in names:
      found[name] = 1024 * int(value.split()[0])
  return found


class Peak:
  """The most anonymous and file memory, looked at every few milliseconds."""

  def __enter__(self):
    self.anon = self.file = 0
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._watch)
    self._thread.start()
    return self

  def _watch(self):
    while not self._done.wait(0.002):
      now = memory()
      self.anon = max(self.anon, now['RssAnon'])
      self.file = max(self.file, now['RssFile'])

  def __exit__(self, *_):
    self._done.set()
    self._thread.join()


def write_checkpoint(
  path: pathlib.Path, size_bytes: float, dtype: str, shape=None, files: int = 4
) -> int:
  """Writes config.json and shards with an index; the bytes of weights.

  The number of layers is what makes about `size_bytes`. Values are random bits
  of finite numbers, the same block over and over.
  """
  sys.path.insert(0, str(ROOT))
  from tuner.models import families, weights

  width = {'float32': 4, 'bfloat16': 2, 'float16': 2}[dtype]
  config = {
    'model_type': 'llama', 'architectures': ['LlamaForCausalLM'],
    'rms_norm_eps': 1e-5, 'max_position_embeddings': 4096,
    'rope_theta': 1e4, 'num_hidden_layers': 1, **(shape or SHAPE),
  }  # fmt: skip

  def tensors():
    model = families.decoder_of(config)
    own = model.config.sizes
    return [
      (name, row.hf_shape(own))
      for row in weights.rows(model).values()
      for name in row.names(own).values()
    ]

  def total():
    return width * sum(math.prod(s) for _, s in tensors())

  one = total()
  config['num_hidden_layers'] = 2
  layer = total() - one
  config['num_hidden_layers'] = 1 + max(1, round((size_bytes - one) / layer))
  (path / 'config.json').write_text(json.dumps(config))
  _write_files(path, tensors(), dtype, width, files)
  return total()


def _write_files(path, tensors, dtype, width, files) -> None:
  import numpy as np

  bits = np.random.default_rng(0).standard_normal(2**18, np.float32)
  block = (bits if width == 4 else bits.view(np.uint16)[1::2].copy()).tobytes()
  if dtype == 'float16':
    block = bits.astype(np.float16).tobytes()
  kind = {'float32': 'F32', 'bfloat16': 'BF16', 'float16': 'F16'}[dtype]
  weight_map, each = {}, -(-len(tensors) // files)
  for i in range(files):
    part = tensors[i * each : (i + 1) * each]
    name = f'model-{i + 1:05d}-of-{files:05d}.safetensors'
    header, end = {}, 0
    for tensor, shape in part:
      start, end = end, end + width * math.prod(shape)
      header[tensor] = dict(dtype=kind, shape=shape, data_offsets=[start, end])
      weight_map[tensor] = name
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)
    with (path / name).open('wb') as stream:
      stream.write(struct.pack('<Q', len(text)) + text)
      for at in range(0, end, len(block)):
        stream.write(block[: end - at])
  index = {'metadata': {}, 'weight_map': weight_map}
  (path / 'model.safetensors.index.json').write_text(json.dumps(index))


if __name__ == '__main__':
  main()
