"""lm-eval's tasks on a policy: the numbers of its own model of Hugging Face."""

import json
import pathlib
import sys
import types

import numpy as np
import pytest
import support

from tuner.data import template
from tuner.evals import harness, likelihood
from tuner.models import policy, weights

pytest.importorskip('lm_eval')
pytestmark = pytest.mark.usefixtures('quick_compiles')
ROWS = pathlib.Path(__file__).with_name('tasks') / 'rows.jsonl'
STOP = (2,)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The task files, whose data has its place; no cache but our own."""
  import datasets

  path = tmp_path_factory.mktemp('tasks')
  for file in ROWS.parent.iterdir():
    text = file.read_text().replace('FOLDER', str(path))
    (path / file.name).write_text(text)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(datasets.config, 'HF_DATASETS_CACHE', path / 'cache')
    yield path


@pytest.fixture(scope='module')
def tiny(tiny_dir):
  return support.load_model(tiny_dir)


@pytest.fixture(scope='module')
def runner(tiny):
  return policy.Policy(weights.fill(*tiny), chunk=16)


@pytest.fixture(scope='module')
def tokenizer(tiny_dir):
  return template.load_tokenizer(tiny_dir)


@pytest.fixture
def run(runner, tokenizer, folder):
  def run(*tasks, runner=runner, **given):
    return harness.run(
      runner, tokenizer, STOP, tasks, include_path=folder, tokens=256, **given
    )

  return run


def read_rows():
  return [json.loads(line) for line in ROWS.read_text().splitlines()]


def predictions(path, suite='harness'):
  lines = (path / f'{suite}.predictions.jsonl').read_text().splitlines()
  return {line['id']: line for line in map(json.loads, lines)}


def test_accuracies_are_those_of_our_own_choices(run, runner, tokenizer):
  """acc is by the sum of nats; acc_norm by nats a character."""
  found = run('tiny_choice')['tiny_choice']
  chosen = likelihood.choose(runner, read_rows(), tokenizer.encode)
  wanted = likelihood.accuracies(chosen)
  for ours, theirs in {
    'accuracy': 'acc',
    'accuracy_by_byte': 'acc_norm',
  }.items():
    assert found[theirs]['n'] == 12
    assert found[theirs]['value'] == pytest.approx(wanted[ours].mean)
    assert 0 < found[theirs]['stderr'] < 0.2


def test_what_is_written(run, tmp_path):
  """The results, what they were made with, and every example's scores."""
  found = run(
    'tiny_choice', 'tiny_rolling', limit=5, folder=tmp_path, suite='a'
  )
  written = json.loads((tmp_path / 'a.json').read_text())
  assert written['tasks'] == found
  assert written['suite'] == 'a' and written['truncated'] == 0
  assert written['library'].startswith('lm-eval 0.')
  assert found['tiny_rolling']['word_perplexity']['stderr'] is None
  lines = predictions(tmp_path, 'a')
  assert list(lines)[:5] == [f'tiny_choice/{i}' for i in range(5)]
  for metric in ('acc', 'acc_norm'):
    scores = [lines[f'tiny_choice/{i}']['scores'][metric] for i in range(5)]
    assert found['tiny_choice'][metric]['value'] == pytest.approx(
      np.mean(scores)
    )
    assert found['tiny_choice'][metric]['n'] == 5


def test_a_group_is_of_its_tasks(run):
  found = run('tiny_all', limit=4)
  both = [found[name]['acc'] for name in ('tiny_choice', 'tiny_fewshot')]
  assert [one['n'] for one in both] == [4, 4]
  assert found['tiny_all']['acc']['n'] == 8
  assert found['tiny_all']['acc']['value'] == pytest.approx(
    np.mean([one['value'] for one in both])
  )


def test_what_is_too_long_loses_its_left_end(runner, tokenizer):
  """Of a pair and of a prompt; both are counted."""
  model = harness.load().Model(runner, tokenizer, STOP)
  context = 'ab' * 200
  (cut,) = model.loglikelihood([request(context, 'yes')], disable_tqdm=True)
  kept = tokenizer.encode(context)[-256:]
  wanted = likelihood.score(runner, [(kept, tokenizer.encode('yes'))])
  assert cut[0] == pytest.approx(-wanted[0].nats, abs=1e-4)
  assert model.truncated == 1
  settings = {'until': [], 'max_gen_toks': 8}
  found = model.generate_until(
    [request(context, settings), request(context[-248:], settings)]
  )
  assert found[0] == found[1]
  assert model.truncated == 2


def test_sampled_answers_differ_and_come_again(runner, tokenizer):
  """By the task's temperature; the seed is the request's place."""
  model = harness.load().Model(runner, tokenizer, STOP)
  settings = {'do_sample': True, 'temperature': 2.0, 'max_gen_toks': 8}
  asked = [request('hi', settings)] * 4
  found = model.generate_until(asked)
  assert len(set(found)) > 1
  assert model.generate_until(asked) == found
  greedy = {'do_sample': False, 'temperature': 2.0, 'max_gen_toks': 8}
  assert len(set(model.generate_until([request('hi', greedy)] * 4))) == 1


def test_an_answer_ends_before_its_stop_string(runner, tokenizer):
  """A part of it as without; nothing after it is written."""
  model = harness.load().Model(runner, tokenizer, STOP)
  settings = {'until': [], 'max_gen_toks': 40}
  (whole,) = model.generate_until([request('Be', settings)])
  stop = whole[5:7]
  (found,) = model.generate_until([request('Be', {**settings, 'until': stop})])
  assert found == whole[: whole.index(stop)]


def test_a_special_token_that_is_a_stop_string_ends_an_answer(
  runner, tokenizer
):
  """Although the text does not show it; its own letters stop nothing."""
  model = harness.load().Model(runner, tokenizer, ())
  settings = {'until': ['<|im_start|>', 'art|>'], 'max_gen_toks': 8}
  own = model._request(0, request('Be', settings))
  assert model._stop_ids(own.stop) == (1, 2)
  assert own.stop == ('<|im_start|>', 'art|>', '<|im_end|>')


@pytest.mark.parametrize(
  ('settings', 'words'),
  [
    ({'do_sample': True}, "task 'one' asks for do_sample and says no temp"),
    ({'max_gen_toks': 256}, 'max_gen_toks = 256; the model has 256 positions'),
    ({'typical_p': 0.9}, "'one' asks to generate with typical_p=0.9; known"),
    (
      {'do_sample': True, 'temperature': 1.0, 'top_p': 2.0, 'max_gen_toks': 8},
      'top_p',
    ),
  ],
)
def test_what_cannot_be_generated_is_refused(
  runner, tokenizer, settings, words
):
  model = harness.load().Model(runner, tokenizer, STOP)
  with pytest.raises(ValueError, match=words):
    model.generate_until([request('hi', settings)])


def request(*args):
  return types.SimpleNamespace(args=args, task_name='one')


def test_a_text_that_begins_begins_once(runner, tokenizer):
  """Neither a second first token, nor none, where the tokenizer adds one."""
  from tokenizers import processors

  model = harness.load().Model(runner, tokenizer, STOP)
  plain = model.tok_encode('hi')
  backend = tokenizer.backend_tokenizer
  before = backend.post_processor
  backend.post_processor = processors.TemplateProcessing(
    single='<|im_start|> $A', special_tokens=[('<|im_start|>', 1)]
  )
  try:
    assert model.tok_encode('hi') == [1, *plain]
    assert model.tok_encode('<|im_start|>hi') == [1, *plain]
    assert model.tok_encode('hi', add_special_tokens=False) == plain
  finally:
    backend.post_processor = before


def test_a_conversation_is_a_text(runner, tokenizer):
  """As the tokenizer's template has it, to be answered or to go on."""
  model = harness.load().Model(runner, tokenizer, STOP)
  asked = [{'role': 'user', 'content': 'hi'}]
  text = model.apply_chat_template(asked)
  assert text == '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'
  begun = [*asked, {'role': 'assistant', 'content': 'yes'}]
  text = model.apply_chat_template(begun, add_generation_prompt=False)
  assert text.endswith('<|im_start|>assistant\nyes')


@pytest.mark.parametrize(
  ('tasks', 'given', 'words'),
  [
    (('tiny_chioce',), {}, "no task 'tiny_chioce'; did you mean tiny_choice"),
    ((), {}, 'no task is named'),
    (('tiny_choice',), {'limit': 0}, 'limit is 0'),
    (('tiny_choice',), {'limit': 0.5}, 'limit is 0.5'),
    (('tiny_choice',), {'fewshot': -1}, 'fewshot is -1'),
    (('tiny_unsafe',), {}, 'unsafe'),
    (('tiny_absent',), {}, 'tiny_absent: .*none.jsonl'),
    (('tiny_beams',), {}, "'tiny_beams' asks to generate with num_beams=4"),
  ],
)
def test_what_cannot_be_run_is_refused(run, tasks, given, words):
  with pytest.raises(ValueError, match=words):
    run(*tasks, **given)


def test_a_folder_that_is_not_there_is_refused(runner, tokenizer, tmp_path):
  with pytest.raises(ValueError, match='include_path: .*none is not a dir'):
    harness.run(runner, tokenizer, STOP, ['a'], include_path=tmp_path / 'none')


def test_without_the_library_the_extra_is_named(run, monkeypatch):
  monkeypatch.delitem(sys.modules, 'tuner.evals.harness_model', raising=False)
  monkeypatch.setitem(sys.modules, 'lm_eval', None)
  with pytest.raises(ValueError, match=r"pip install 'tuner\[harness\]'"):
    run('tiny_choice')


@pytest.mark.slow
@pytest.mark.parity
def test_numbers_are_those_of_lm_evals_own_model(
  run, tiny_dir, folder, tmp_path
):
  """Each example's likelihoods to 1e-3, each answer, and every metric."""
  import torch
  from lm_eval import evaluator, tasks
  from lm_eval.models import huggingface

  torch.set_num_threads(1)
  names = ['tiny_choice', 'tiny_fewshot', 'tiny_generate', 'tiny_rolling']
  found = run(*names, folder=tmp_path)
  theirs = evaluator.simple_evaluate(
    huggingface.HFLM(
      pretrained=str(tiny_dir), device='cpu', dtype='float32', batch_size=4
    ),
    tasks=names,
    task_manager=tasks.TaskManager(
      include_path=str(folder), include_defaults=False
    ),
    bootstrap_iters=100,
  )
  lines = predictions(tmp_path)
  for name in names:
    for sample in theirs['samples'][name]:
      answers = lines[f'{name}/{sample["doc_id"]}']['answers']
      for ours, wanted in zip(answers, sample['filtered_resps'], strict=True):
        if isinstance(wanted, tuple):
          assert ours[0] == pytest.approx(wanted[0], abs=1e-3)
          assert ours[1] == wanted[1]
        elif isinstance(wanted, float):
          assert ours == pytest.approx(wanted, rel=1e-5)
        else:
          assert ours == wanted
    for metric, own in found[name].items():
      wanted = theirs['results'][name][f'{metric},none']
      assert own['value'] == pytest.approx(wanted, rel=1e-4), (name, metric)
      assert own['n'] == 12
