"""Laws of what is measured of general ability."""

import json
import re

import jax
import numpy as np
import pytest
import support

from tuner import adapt, sections
from tuner import mesh as mesh_lib
from tuner.evals import general, plan, retention
from tuner.generate import greedy
from tuner.models import policy, weights

pytestmark = pytest.mark.usefixtures('quick_compiles')
STOP = (2,)
MUCH = 1e9


def write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A section whose texts, prompts and quiz are small."""
  folder = tmp_path_factory.mktemp('material')
  rng = np.random.default_rng(0)
  words = lambda n: ' '.join(str(x) for x in rng.integers(0, 99, n))
  texts = [
    {'text': words(6 + 3 * i), 'kind': 'even' if i % 2 == 0 else 'odd'}
    for i in range(8)
  ]
  prompts = [{'prompt': words(2)} for _ in range(5)]
  quiz = [
    {'question': words(3), 'choices': ['yes', 'no'], 'answer': i % 2}
    for i in range(6)
  ]
  return sections.Retention(
    texts=write(folder / 'texts.jsonl', texts),
    prompts=write(folder / 'prompts.jsonl', prompts),
    quiz=write(folder / 'quiz.jsonl', quiz),
  )


@pytest.fixture(scope='module')
def tiny(tiny_dir):
  return support.load_model(tiny_dir)


@pytest.fixture(scope='module')
def short():
  """Answers of eight tokens, which the tiny model's positions have room for."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plan, 'LENGTHS', (8,))
    yield


@pytest.fixture(scope='module')
def base(tiny):
  return policy.Policy(weights.fill(*tiny), chunk=16)


@pytest.fixture(scope='module')
def damage(files, tiny):
  """(adaptation, factors): a LoRA's step up the nats of the texts."""
  model, values = tiny
  adaptation = adapt.lora(weights.rows(model), rank=4)
  fresh = support.fresh_factors(model, adaptation)
  texts = general.load(files, support.make_tokenizer(), 256).texts
  batch = support.pack([[(text.ids, 1)] for text in texts], 96)

  def filled(tree):
    attached = adaptation.attach(values, tree)
    return policy.Policy(weights.fill(model, attached), chunk=16)

  up = jax.jit(jax.grad(lambda tree: -filled(tree).logprobs(batch).sum()))(
    fresh
  )
  size = np.sqrt(sum(np.square(x).sum() for x in up.values()))
  moved = {path: x + 2.0 * up[path] / size for path, x in fresh.items()}
  return adaptation, moved


@pytest.fixture(scope='module')
def damaged(tiny, damage):
  """The model with the damage attached."""
  (model, values), (adaptation, moved) = tiny, damage
  attached = adaptation.attach(values, moved)
  return policy.Policy(weights.fill(model, attached), chunk=16)


def make(files, tiny, budget=MUCH, **kept):
  tokenizer = support.make_tokenizer()
  return retention.Retention(files, tokenizer, STOP, tiny[0], budget, **kept)


@pytest.fixture(scope='module')
def measured(files, tiny, base, damaged, short):
  """(metrics of the damaged model, what measured them)."""
  own = make(files, tiny)
  return own.measure(damaged, base), own


def values_of(metrics):
  return {name: metric['value'] for name, metric in metrics.items()}


def test_the_base_against_itself_has_kept_all(files, tiny, measured, base):
  """As the same object, and as another one of the same weights."""
  twin = policy.Policy(weights.fill(*tiny), chunk=16)
  own = measured[1]
  found = own.measure(twin, base)
  assert found == own.measure(base, base)
  for name, value in {
    'kl_nats': 0, 'top1': 1, 'nats_increase': 0, 'quiz_increase': 0,
    'answer_ratio': 1, 'refusals_increase': 0,
  }.items():  # fmt: skip
    assert found[name]['value'] == value, name
  assert found['nats_increase']['low'] == found['nats_increase']['high'] == 0
  assert found.keys() == measured[0].keys()
  counts = {name: metric['n'] for name, metric in found.items()}
  assert counts['general_nats'] == counts['nats_increase'] == 8
  assert counts['general_nats.even'] == 4
  assert counts['kl_nats'] == counts['top1'] == counts['answer_tokens'] == 5
  assert counts['quiz'] == 6


def test_damage_shows(measured):
  found = measured[0]
  assert found['nats_increase']['low'] > 0
  assert found['kl_nats']['low'] > 0
  assert 0 <= found['top1']['low'] and found['top1']['high'] < 1
  for name, metric in found.items():
    assert metric['low'] <= metric['value'] <= metric['high'], name


def test_numbers_are_those_of_the_definition(measured, base, damaged):
  """By whole logits of each text, question and answer alone."""
  found, own = measured
  logs = {}
  for name, runner in (('own', damaged), ('base', base)):
    run = lambda ids, runner=runner: np.asarray(
      jax.nn.log_softmax(support.logits(runner.model, padded(ids)))
    )[0, : len(ids)]
    logs[name] = run

  def nats(run, ids, start=1):
    log = run(ids)
    return -sum(log[t - 1, ids[t]] for t in range(start, len(ids)))

  texts = [list(text.ids) for text in own.plan.texts]
  total = sum(len(ids) - 1 for ids in texts)
  sums = {
    name: sum(nats(run, ids) for ids in texts) for name, run in logs.items()
  }
  assert found['general_nats']['value'] == pytest.approx(
    sums['own'] / total, rel=1e-5
  )
  assert found['nats_increase']['value'] == pytest.approx(
    (sums['own'] - sums['base']) / total, rel=1e-4
  )
  prompts = [list(prompt.ids) for prompt in own.plan.prompts]
  answers = greedy.generate(base.model, prompts, STOP, own.plan.max_tokens)
  divergence = agreed = count = 0
  for prompt, answer in zip(prompts, answers, strict=True):
    log, other = (run([*prompt, *answer]) for run in logs.values())
    for t in range(len(prompt) - 1, len(prompt) + len(answer) - 1):
      divergence += (np.exp(log[t]) * (log[t] - other[t])).sum()
      agreed += log[t].argmax() == other[t].argmax()
      count += 1
  assert found['kl_nats']['value'] == pytest.approx(
    divergence / count, rel=1e-4
  )
  assert found['top1']['value'] == pytest.approx(agreed / count)
  right = 0
  for row in own.plan.quiz:
    pairs = own._choices(row)
    costs = [nats(logs['own'], [*a, *b], len(a)) for a, b in pairs]
    right += int(np.argmin(costs)) == row['answer']
  assert found['quiz']['value'] == pytest.approx(right / len(own.plan.quiz))
  lengths = [
    len(answer) - (answer[-1] in STOP)
    for answer in greedy.generate(
      damaged.model, prompts, STOP, own.plan.max_tokens
    )
  ]
  assert found['answer_tokens']['value'] == pytest.approx(np.mean(lengths))


def padded(ids, width=96):
  return np.pad(np.array(ids, np.int32), (0, width - len(ids)))[None]


def test_batches_and_time_do_not_matter(files, tiny, base, damaged, measured):
  """Rows of a batch, their width, another time: the same numbers."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(retention, 'ROWS', 1)
    patch.setattr(retention, 'TOKENS', 128)
    other = make(files, tiny).measure(damaged, base)
  again = make(files, tiny).measure(damaged, base)
  assert again == measured[0]
  assert values_of(other) == pytest.approx(values_of(measured[0]), rel=1e-4)


def test_eight_devices_equal_one(files, tiny, damage, measured):
  """Weights divided along data, fsdp and tensor, as training has them."""
  (model, values), (adaptation, moved) = tiny, damage
  mesh = mesh_lib.make(data=2, fsdp=2, tensor=2)
  placed = {
    path: jax.device_put(
      values[path], mesh_lib.sharding(mesh, row.dims, values[path].shape)
    )
    for path, row in weights.rows(model).items()
  }
  own = adaptation.attach(placed, moved), placed
  with jax.set_mesh(mesh):
    found = make(files, tiny).measure(
      *(policy.Policy(weights.fill(model, v), chunk=16) for v in own)
    )
  assert values_of(found) == pytest.approx(values_of(measured[0]), rel=1e-4)


def test_the_base_is_measured_once_and_kept(
  files, tiny, base, damaged, measured, tmp_path, monkeypatch
):
  """A later run reads what the base made, and its numbers are the same."""
  make(files, tiny, folder=tmp_path, base_key='a').measure(base, base)
  calls = []
  generate = greedy.generate
  monkeypatch.setattr(
    greedy, 'generate', lambda *a: calls.append(1) or generate(*a)
  )
  later = make(files, tiny, folder=tmp_path, base_key='a')
  assert later.measure(damaged, base) == measured[0]
  assert len(calls) == 1  # the tuned model's own
  make(files, tiny, folder=tmp_path, base_key='b').measure(damaged, base)
  assert len(calls) == 3


@pytest.mark.parametrize('budget', [0, 40, 400, 1000, 3000, 1e5])
def test_a_measurement_costs_no_more_than_it_may(files, budget, short):
  own = plan.make(files, support.make_tokenizer(), 256, budget)
  assert own.cost <= budget
  assert bool(own.texts) == (budget >= 400)
  for part, count in ((own.texts, 8), (own.prompts, 5), (own.quiz, 6)):
    assert not part or len(part) >= plan.FEWEST
    assert budget < 1e5 or len(part) == count
  if not own.texts:
    said = '\n'.join(own.lines)
    assert 'texts not measured' in said and 'config.retention.share' in said


def test_what_is_cut_is_cut_evenly(files):
  tokenizer = support.make_tokenizer()
  whole = plan.make(files, tokenizer, 256, MUCH).texts
  assert [text.kind for text in whole] == ['even', 'odd'] * 4
  some = plan.make(files, tokenizer, 256, 300).texts
  assert plan.FEWEST <= len(some) < len(whole)
  assert some == whole[: len(some)]


def test_the_allowance_is_a_share_of_training():
  assert plan.allowance(0.1, 12_000, 3) == pytest.approx(400)


def test_what_is_not_there_is_said(tiny):
  """Nothing was fetched: the packaged prompts alone."""
  own = make(sections.Retention(), tiny)
  assert not own.plan.texts and not own.plan.quiz
  assert len(own.plan.prompts) == 24
  assert own.lines[1:] == [
    'general text not measured: run scripts/fetch_retention.py or set '
    'config.retention.texts',
    'quiz not measured: run scripts/fetch_retention.py or set '
    'config.retention.quiz',
  ]


def test_a_file_of_the_user_s_stands_before_the_fetched_one(
  files, tiny, tmp_path, monkeypatch
):
  monkeypatch.setenv('TUNER_CACHE', str(tmp_path))
  (tmp_path / 'retention').mkdir()
  rows = [{'text': f'fetched {i}'} for i in range(4)]
  write(tmp_path / 'retention' / 'texts.jsonl', rows)
  tokenizer = support.make_tokenizer()
  fetched = general.load(sections.Retention(), tokenizer, 256)
  assert tokenizer.decode(fetched.texts[0].ids) == 'fetched 0'
  assert len(general.load(files, tokenizer, 256).texts) == 8


@pytest.mark.parametrize(
  ('key', 'row', 'said'),
  [
    ('texts', {'txt': 'a'}, "text: not there, beside 'txt'"),
    ('texts', {'text': 3}, 'text: found a number; wanted: a string'),
    ('texts', {'text': ' '}, 'text: found only whitespace'),
    ('texts', {'text': 'a'}, 'text: 1 token; wanted: two or more'),
    ('texts', {'text': 'a b', 'kind': 3}, 'kind: found a number'),
    ('texts', [], 'line: found a list; wanted: an object'),
    ('prompts', {}, 'prompt: not there, beside nothing'),
    ('prompts', {'prompt': ''}, 'prompt: found an empty string'),
    ('quiz', {'question': 'a', 'answer': 0}, 'choices: not there'),
    (
      'quiz',
      {'question': 'a', 'choices': ['b'], 'answer': 0},
      "choices: found ['b']; wanted: a list of two texts or more",
    ),
    (
      'quiz',
      {'question': 'a', 'choices': ['b', 4], 'answer': 0},
      'choices[1]: found a number',
    ),
    (
      'quiz',
      {'question': 'a', 'choices': ['b', 'c'], 'answer': 2},
      'answer: found 2; wanted: the index of the right choice, 0 to 1',
    ),
    (
      'quiz',
      {'question': 'a', 'choices': ['b', 'c'], 'answer': True},
      'answer: found True',
    ),
  ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, key, row, said):
  path = tmp_path / 'rows.jsonl'
  good = {
    'texts': {'text': 'a b'},
    'prompts': {'prompt': 'a'},
    'quiz': {'question': 'a', 'choices': ['b', 'c'], 'answer': 0},
  }[key]
  config = sections.Retention(**{key: write(path, [good, row])})
  wanted = re.escape(f'{path}:2: {said}')
  with pytest.raises(ValueError, match=wanted):
    general.load(config, support.make_tokenizer(), 256)


@pytest.mark.parametrize('key', ['texts', 'prompts', 'quiz'])
def test_a_named_file_that_is_not_there_is_an_error(tmp_path, key):
  path = str(tmp_path / 'none.jsonl')
  with pytest.raises(ValueError, match=re.escape(f'{path}: file: No such')):
    general.load(
      sections.Retention(**{key: path}), support.make_tokenizer(), 256
    )


def test_a_prompt_that_leaves_no_room_is_named(tmp_path, tiny):
  long = write(tmp_path / 'p.jsonl', [{'prompt': 'a b ' * 90}] * 4)
  with pytest.raises(
    ValueError, match=r'p.jsonl:1: prompt: \d+ tokens, and an'
  ):
    make(sections.Retention(prompts=long), tiny)


@pytest.mark.parametrize(
  ('text', 'refuses'),
  [
    ("I'm sorry, but I can't help with that.", True),
    ('I’m sorry, but I can’t help with that.', True),
    ('As an AI language model, I do not ...', True),
    ('Unfortunately, I am unable to do so.', True),
    ('The capital of France is Paris.', False),
    ('A can of paint. I can do that for you.', False),
    ('x' * 400 + ' I cannot', False),
    ('', False),
  ],
)
def test_refusals_are_told_by_their_opening(text, refuses):
  assert retention.is_refusal(text) == refuses
