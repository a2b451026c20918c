"""Base and tuned on the same held-out rows: loss, answers, scores, files."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest
import support

from tuner import experiment as experiment_lib
from tuner import measure, summary
from tuner.data import mask as mask_lib
from tuner.data import rows as rows_lib
from tuner.data import split as split_lib
from tuner.data import template as template_lib
from tuner.evals import compare, generative, stats
from tuner.generate import engine

pytestmark = pytest.mark.usefixtures('quick_compiles')


@pytest.fixture(scope='module')
def experiment(tiny_dir, tiny_rows):
  config = support.config(tiny_dir, tiny_rows)
  return experiment_lib.prepare(config)


@pytest.fixture(scope='module')
def base(experiment):
  with jax.set_mesh(experiment.mesh):
    return experiment.filled(experiment.load_base())


@pytest.fixture(scope='module')
def held_out(experiment):
  return measure.HeldOut(experiment, experiment.split.test)


def test_loss_is_the_sum_over_rows_computed_one_by_one(
  experiment, base, held_out
):
  """Packed in batches, the last one padded; here, each row alone."""
  interval, n = held_out.loss(base)
  nats, targets = [], []
  examples = held_out.examples
  for start, end in zip(examples.offsets[:-1], examples.offsets[1:]):
    tokens = np.full((1, 64), 2, np.int32)  # one width: compiled once
    tokens[0, : end - start] = examples.tokens[start:end]
    logits = np.asarray(support.logits(base.model, tokens), np.float64)[0]
    mask = np.flatnonzero(examples.mask[start:end])
    total = np.log(np.exp(logits).sum(-1))
    nats.append(sum(total[t - 1] - logits[t - 1, tokens[0, t]] for t in mask))
    targets.append(len(mask))
  assert n == len(nats) == len(experiment.split.test) > 4
  assert interval.mean == pytest.approx(sum(nats) / sum(targets), rel=1e-5)
  assert interval.low < interval.mean < interval.high
  rows = np.array(nats) / np.array(targets)
  assert rows.min() < interval.low and interval.high < rows.max()
  wanted = stats.bootstrap(rows, stats.SEED, weights=targets)
  assert tuple(interval) == pytest.approx(tuple(wanted), rel=1e-5)


def test_answers_are_those_of_each_row(base, held_out):
  """The batch that a prompt is answered in does not matter to its answer."""
  result = held_out.answer(base)
  assert [p['id'] for p in result.predictions] == [
    row.where for row in held_out.rows
  ]
  few = measure.HeldOut(held_out.experiment, held_out.rows, answers=5)
  again = few.answer(base)
  assert again.predictions == result.predictions[:5]


ROW = types.SimpleNamespace(
  where='f:1', prompt=({'role': 'user', 'content': 'q'},)
)


def test_answers_are_held_to_a_constraint(tiny_dir, tiny_rows, base, held_out):
  """And so are another result than those that are not."""
  config = support.config(tiny_dir, tiny_rows)
  config.evaluate.constraint = dict(kind='regex', text='(yes|no)!')
  experiment = experiment_lib.prepare(config)
  held = measure.HeldOut(experiment, held_out.rows)
  outputs = {p['output'] for p in held.answer(base).predictions}
  assert outputs and outputs <= {'yes!', 'no!'}
  assert held.key(['base']) != held_out.key(['base'])
  config.evaluate.constraint.text = 'yes'
  experiment = experiment_lib.prepare(config)
  assert held.key(0) != measure.HeldOut(experiment, held_out.rows).key(0)


def test_losses_of_rows_are_written_and_compared(tmp_path, base, held_out):
  """The difference of means is the mean of differences by their targets."""
  quiet = measure.HeldOut(held_out.experiment, held_out.rows, answers=0)
  found = quiet.measure(tmp_path, 'test.base', base, ['base'])
  rows = summary.losses(tmp_path, 'test.base')
  assert [row['id'] for row in rows] == [row.where for row in held_out.rows]
  nats, targets = (sum(r[k] for r in rows) for k in ('nats', 'targets'))
  value = found['metrics']['nats_per_token']['value']
  assert nats / targets == pytest.approx(value)
  rng = np.random.default_rng(0)
  better = [r | {'nats': r['nats'] - rng.uniform(0, 9)} for r in rows]
  better[0]['nats'] = rows[0]['nats'] + 1
  own = compare.losses(rows, better)
  wanted = sum(r['nats'] for r in better) / targets - nats / targets
  assert own['difference'] == pytest.approx(wanted)
  assert own['low'] < own['difference'] < own['high'] < 0
  assert (own['wins'], own['losses']) == (len(rows) - 1, 1)
  assert own['p'] < 0.01
  same = compare.losses(rows, rows)
  assert (same['difference'], same['p']) == (0, 1)
  with pytest.raises(ValueError, match='same targets in the same order'):
    compare.losses(rows[1:], rows)


def test_losses_go_by_the_row_that_they_are_of(tiny_dir, tmp_path, base):
  """Where the first row is left out."""
  rows = tmp_path / 'rows.jsonl'
  lines = [{'input': f'{i}', 'output': 'x' * (300 if i < 3 else 2)}
           for i in range(40)]  # fmt: skip
  rows.write_text('\n'.join(map(json.dumps, lines)))
  config = support.config(tiny_dir, rows)
  config.data.too_long = 'drop'
  config.data.test = 0.5
  experiment = experiment_lib.prepare(config)
  held = measure.HeldOut(experiment, experiment.split.test, answers=0)
  assert held.examples.dropped
  held.measure(tmp_path, 'test.base', base, ['base'])
  found = [row['id'] for row in summary.losses(tmp_path, 'test.base')]
  assert found == [row.where for row in held.rows]


def score(*answers):
  """Scores of answers in ids, where 2 and 9 are stop tokens."""
  return generative.score(
    [ROW] * len(answers),
    ['{}'] * len(answers),
    answers,
    lambda ids: ''.join({5: '{', 6: '}', 2: '<stop>'}[i] for i in ids),
    (2, 9),
    generative.find(['exact']),
    0,
  )


def test_the_stop_token_is_no_part_of_the_text():
  result = score([5, 6, 2], [5, 6, 9], [5, 6], [2], [], [2, 5])
  assert [p['output'] for p in result.predictions] == [
    '{}', '{}', '{}', '', '', '<stop>{',
  ]  # fmt: skip
  assert result.scores['exact'] == [1, 1, 1, 0, 0, 0]
  assert result.scores['stopped'] == [1, 1, 0, 1, 0, 0]
  assert [p['tokens'] for p in result.predictions] == [3, 3, 2, 1, 0, 2]
  assert result.intervals['stopped'].mean == 0.5
  assert result.n == 6


def test_files(tmp_path, base, held_out):
  found = held_out.measure(tmp_path, 'test.base', base, ['base'])
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    'test.base.json', 'test.base.losses.jsonl', 'test.base.predictions.jsonl',
  ]  # fmt: skip
  assert found == json.loads((tmp_path / 'test.base.json').read_text())
  assert set(found['metrics']) == {'json_valid', 'stopped', 'nats_per_token'}
  for metric in found['metrics'].values():
    assert metric['n'] == len(held_out.rows)
    assert metric['low'] <= metric['value'] <= metric['high']
  lines = summary.predictions(tmp_path, 'test.base')
  assert len(lines) == len(held_out.rows)
  for line, row in zip(lines, held_out.rows, strict=True):
    assert line['id'] == row.where and line['reference'] == row.reference
    assert line['prompt'] == list(row.prompt)
    assert 0 < line['tokens'] <= 8
    assert set(line['scores']) == {'json_valid', 'stopped'}


def test_a_result_is_read_again_only_with_an_equal_key(
  tmp_path, base, held_out, monkeypatch
):
  first = held_out.measure(tmp_path, 'test.base', base, ['base'])
  calls = []
  sums, answer = measure.HeldOut._sums, measure.HeldOut.answer

  def counted(name, method):
    def call(*args):
      calls.append(name)
      return method(*args)

    monkeypatch.setattr(measure.HeldOut, name, call)

  counted('_sums', sums)
  counted('answer', answer)
  assert held_out.measure(tmp_path, 'test.base', base, ['base']) == first
  assert calls == []
  other = held_out.measure(tmp_path, 'test.base', base, ['other'])
  assert calls == ['_sums', 'answer'] and other['key'] != first['key']
  fewer = measure.HeldOut(held_out.experiment, held_out.rows[:-1])
  half = measure.HeldOut(held_out.experiment, held_out.rows, answers=2)
  keys = {h.key(['base']) for h in (held_out, fewer, half)}
  assert len(keys) == 3
  (tmp_path / 'test.base.json').write_text('{}')  # of an older program
  assert held_out.measure(tmp_path, 'test.base', base, ['base']) == first


def test_the_key_is_of_what_is_measured(tiny_dir, tiny_rows, held_out):
  """Other tokens in the loss, or other prompts: another result."""
  config = support.config(tiny_dir, tiny_rows)
  keys = [held_out.key(['base'])]
  for loss in ('assistant', 'all'):
    config.data.loss = loss
    experiment = experiment_lib.prepare(config)
    keys.append(measure.HeldOut(experiment, held_out.rows).key(['base']))
  assert keys[0] == keys[1] != keys[2]
  other = measure.HeldOut(held_out.experiment, held_out.rows)
  other._turns[0] = ([1, 5], other._turns[0][1])
  assert other.key(['base']) != keys[0]


def test_what_is_known_of_rows_needs_no_row(held_out, monkeypatch):
  """Of a million rows none is parsed to name, digest and choose them."""

  def unread(*args):
    raise AssertionError('a row is read')

  digest, digested = split_lib.digest, []
  monkeypatch.setattr(rows_lib, 'loads', unread)
  monkeypatch.setattr(
    split_lib, 'digest', lambda rows: digested.append(1) or digest(rows)
  )
  quiet = measure.HeldOut(held_out.experiment, held_out.rows, answers=0)
  assert quiet.key(['a']) != quiet.key(['b'])
  assert len(digested) == 1


def test_without_metrics_nothing_is_generated(tmp_path, base, held_out):
  quiet = measure.HeldOut(held_out.experiment, held_out.rows, answers=0)
  found = quiet.measure(tmp_path, 'dev.2', base, ['base'])
  assert set(found['metrics']) == {'nats_per_token'}
  assert found['metrics']['nats_per_token']['n'] == len(held_out.rows)
  assert summary.predictions(tmp_path, 'dev.2') == []


def test_dropped_rows_are_neither_in_the_loss_nor_answered(
  tiny_dir, tiny_rows, tmp_path, base
):
  rows = tmp_path / 'rows.jsonl'
  long = {'input': '503 and 606', 'output': 'x' * 300}
  text = tiny_rows.read_text().splitlines()
  rows.write_text('\n'.join([json.dumps(long), *text]))
  config = support.config(tiny_dir, rows)
  config.data.too_long = 'drop'
  experiment = experiment_lib.prepare(config)
  assert experiment.split.test[0].where.endswith(':1')
  held_out = measure.HeldOut(experiment, experiment.split.test)
  assert held_out.examples.dropped == 1
  assert list(held_out.rows) == list(experiment.split.test[1:])
  assert list(held_out.examples.where) == [row.where for row in held_out.rows]
  found = held_out.measure(tmp_path, 'test.base', base, ['base'])['metrics']
  assert len({metric['n'] for metric in found.values()}) == 1


def test_rows_weigh_in_training_only(base, held_out, monkeypatch):
  """Nats a target token, whatever the rows weigh; 0 for all of them, too."""
  encode = measure.dataset.encode
  wanted, losses = held_out.loss(base), held_out.losses(base)
  n = len(held_out.examples)
  for weight in np.stack([np.linspace(0.25, 4, n), np.zeros(n)]):

    def weighed(*args, weight=weight):
      return dataclasses.replace(encode(*args), weight=weight)

    monkeypatch.setattr(measure.dataset, 'encode', weighed)
    own = measure.HeldOut(held_out.experiment, held_out.rows, answers=0)
    assert own.loss(base) == wanted
    np.testing.assert_array_equal(own.losses(base), losses)


def test_an_example_without_a_target_has_no_loss(held_out, monkeypatch):
  sums = np.array([3.0, 0.0]), np.array([2.0, 0.0])
  monkeypatch.setattr(measure.HeldOut, '_sums', lambda *args: sums)
  np.testing.assert_array_equal(held_out.losses(None), [1.5, np.nan])


def test_n_is_of_rows_where_a_row_gives_several_examples(
  tiny_dir, tmp_path, base
):
  rows = tmp_path / 'texts.jsonl'
  lines = [{'text': f'{i} ' * 40 * (1 + i % 3)} for i in range(40)]
  rows.write_text('\n'.join(map(json.dumps, lines)))
  config = support.config(tiny_dir, rows)
  config.data.long_text = 'split'
  experiment = experiment_lib.prepare(config)
  held_out = measure.HeldOut(experiment, experiment.split.test)
  assert len(held_out.examples) > len(held_out.rows) + 3
  found = held_out.measure(tmp_path, 'test.base', base, ['base'])
  assert set(found['metrics']) == {'nats_per_token'}  # no text is answered
  metric = found['metrics']['nats_per_token']
  assert metric['n'] == len(experiment.split.test)
  losses, row = held_out.losses(base), held_out.examples.row
  targets = held_out.examples.lengths - 1
  by_row = [
    np.average(losses[row == i], weights=targets[row == i])
    for i in range(len(held_out.rows))
  ]
  wanted = stats.bootstrap(
    by_row, stats.SEED, weights=np.bincount(row, targets)
  )
  own = metric['value'], metric['low'], metric['high']
  assert own == pytest.approx(tuple(wanted), rel=1e-5)


def say(*contents, **last):
  """Messages, the user's and the assistant's in turn."""
  roles = ('user', 'assistant') * len(contents)
  made = [{'role': r, 'content': c} for r, c in zip(roles, contents)]
  made[-1] |= last
  return made


def write(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)))
  return path


def test_the_last_turn_is_answered(tiny_dir, tmp_path, monkeypatch):
  """Of a completion of several turns, as of any other conversation."""
  talks = [say(f'{i}', 'no', 'hi', f'yes {i}') for i in range(40)]
  rows = [{'prompt': t[:1], 'completion': t[1:]} for t in talks]
  path = write(tmp_path / 'rows.jsonl', rows)
  config = support.config(tiny_dir, path)
  config.evaluate.metrics = ('exact',)
  experiment = experiment_lib.prepare(config)
  held_out = measure.HeldOut(experiment, experiment.split.test)
  assert {row.n_prompt for row in held_out.rows} == {2}
  seen = []

  def generate(model, requests, *args):
    seen.extend(request.prompt for request in requests)
    return [engine.Answer([2], [0.0], 'stop')] * len(requests)

  monkeypatch.setattr(measure.engine, 'generate', generate)
  result = held_out.answer(types.SimpleNamespace(model=None))
  texts = experiment.tokenizer.batch_decode(seen)
  for row, text, own in zip(
    held_out.rows, texts, result.predictions, strict=True
  ):
    first = row.messages[1]['content']
    assert text == (
      f'<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\n{first}<|im_end|>'
      '\n<|im_start|>assistant\nno<|im_end|>\n<|im_start|>user\nhi<|im_end|>'
      '\n<|im_start|>assistant\n'
    )
    assert own['prompt'] == list(row.messages[:-1])
    assert own['reference'] == f'yes {first}'


@pytest.mark.parametrize('loss', ['assistant', 'last', 'all', 'flags'])
def test_answers_start_from_the_shortened_conversation(
  loss, tiny_dir, tmp_path
):
  """What too_long='truncate_prompt' leaves out of the loss is not asked."""
  talks = [
    say(f'{i}', 'no', 'x' * (60 if i % 2 else 2), 'no', 'hi', 'yes', train=True)
    for i in range(40)
  ]
  path = write(tmp_path / 'rows.jsonl', [{'messages': t} for t in talks])
  config = support.config(tiny_dir, path)
  config.data.too_long, config.data.loss = 'truncate_prompt', loss
  config.data.system = None
  config.data.max_tokens = 60
  experiment = experiment_lib.prepare(config)
  held_out = measure.HeldOut(experiment, experiment.split.test)
  short = 0
  for row, (ids, text) in zip(held_out.rows, held_out._turns, strict=True):
    is_long = len(row.messages[2]['content']) > 2
    short += is_long
    shown = rows_lib.Row(row.messages[4 * is_long :])
    assert ids == template_lib.prompt_ids(shown, experiment.tokenizer)
    assert text == 'yes'
  assert 0 < short < len(held_out.rows)
  examples = held_out.examples
  for start, (ids, _) in zip(examples.offsets, held_out._turns):
    assert examples.tokens[start : start + len(ids)].tolist() == ids


def test_a_prompt_without_room_for_an_answer(tiny_dir, tmp_path):
  """The example ends before it: a turn of its own, and the last not trained."""
  template = tmp_path / 'forgets.jinja'
  template.write_text(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + "
    "'<|im_end|>' + '\\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt "
    "else 'no' if messages | length > 2 else 'yes' }}"
  )
  talks = [
    say(f'{10 + i}', 'no', 'x' * 300, 'yes', train=False) for i in range(40)
  ]
  path = write(tmp_path / 'rows.jsonl', [{'messages': t} for t in talks])
  config = support.config(tiny_dir, path)
  config.data.template = str(template)
  experiment = experiment_lib.prepare(config)
  with pytest.raises(ValueError) as error:
    measure.HeldOut(experiment, experiment.split.test)
  where = experiment.split.test.where(0)
  assert str(error.value).startswith(f'{where}: the prompt has 3')
  assert str(error.value).endswith(
    ' tokens and the model 256 positions, which leaves none for an answer; '
    'wanted: a shorter prompt, or config.evaluate.metrics=()'
  )


CALLS = (
  '{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}'
  '{% for c in m.tool_calls or [] %}[{{ c.function.name }} '
  '{{ c.function.arguments | tojson }}]{% endfor %}<|im_end|>{% endfor %}'
  '{% if tools %}{{ tools[0].function.name }}{% endif %}'
  '{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}'
)


@pytest.mark.parametrize('loss', ['assistant', 'last', 'all', 'flags'])
def test_references_are_what_generation_would_write(loss, monkeypatch):
  """A call as the template writes it, plain content as it is; never a flag."""
  tokenizer = support.make_tokenizer(CALLS)
  call = {'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}
  made = [
    rows_lib.Row(tuple(say('hi', answer, **last)), f'a:{i}')
    for i, (answer, last) in enumerate(
      [
        ('yes', {}),
        ('', {'tool_calls': [call]}),
        ('no', {'tool_calls': [call], 'train': False}),
      ]
    )
  ]
  encoder, encoders = mask_lib.encoder, []

  def counted(*args):
    encoders.append(args)
    return encoder(*args)

  monkeypatch.setattr(mask_lib, 'encoder', counted)
  prompts, references = zip(*measure.last_turns(made, tokenizer, (2,), loss))
  assert references == ('yes', '[f {"x": 1}]', 'no[f {"x": 1}]')
  text = '<|im_start|>user: hi<|im_end|><|im_start|>assistant: '
  assert tokenizer.batch_decode(prompts) == [text] * 3
  assert len(encoders) == 1


def test_a_reference_that_is_none_names_its_row():
  (row,) = [
    rows_lib.Row(tuple(say('hi', 'yes', reasoning_content='no')), 'a:7')
  ]
  with pytest.raises(ValueError, match=r'^a:7: messages\[1\]'):
    measure.last_turns([row], support.make_tokenizer(), (2,))


def test_one_row_has_no_interval_and_the_file_is_json(tmp_path, base, held_out):
  one = measure.HeldOut(held_out.experiment, held_out.rows[:1])
  found = one.measure(tmp_path, 'test.base', base, ['base'])

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  text = (tmp_path / 'test.base.json').read_text()
  assert json.loads(text, parse_constant=refuse) == found
  loss = found['metrics']['nats_per_token']
  assert (loss['low'], loss['high'], loss['n']) == ('nan', 'nan', 1)
  assert math.isfinite(loss['value'])


def test_samples_are_spread_over_the_rows():
  rows = [
    {'prompt': [{'content': 'x'}, {'content': f'q{i}'}], 'reference': 'r',
     'output': f'a{i}'} for i in range(9)
  ]  # fmt: skip
  found = summary.samples(rows, 3)
  assert found == [('q0', 'r', 'a0'), ('q3', 'r', 'a3'), ('q6', 'r', 'a6')]
  assert len(summary.samples(rows[:2], 3)) == 2
  assert summary.samples([], 3) == []
