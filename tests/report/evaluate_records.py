"""Records as `evaluate` writes them, made by script: JSON rows, and labels."""

import json
import pathlib
import random
import statistics

STREETS = ('Kastanienallee', 'Hauptstraße', 'Am Markt', 'Rosenweg', 'Lindenhof')
CITIES = ('Leipzig', 'Köln', 'Bad Tölz', 'Nürnberg', 'Halle (Saale)')


def metric(scores, kind):
  mean, low, high = interval(scores)
  return {
    'value': mean,
    'low': max(0.0, low),
    'high': min(1.0, high),
    'n': len(scores),
    'kind': kind,
  }


def interval(scores):
  """As wide as it would be; how it is made is of no matter to a page."""
  mean = statistics.fmean(scores)
  half = 1.96 * statistics.pstdev(scores) / len(scores) ** 0.5
  return mean, mean - half, mean + half


def compared(base, tuned):
  """The 'comparison' of two lists of predictions."""
  metrics, flips = {}, {}
  for name in tuned[0]['scores']:
    ours = [p['scores'][name] for p in tuned]
    theirs = [p['scores'][name] for p in base]
    gain, low, high = interval([a - b for a, b in zip(ours, theirs)])
    pairs = list(zip(tuned, ours, theirs, strict=True))
    won = [p['id'] for p, a, b in pairs if a > b]
    lost = [p['id'] for p, a, b in pairs if a < b]
    metrics[name] = {
      'difference': gain, 'low': low, 'high': high,
      'p': 0.5 ** min(40, len(won) + len(lost)) or 1.0, 'wins': len(won),
      'ties': len(tuned) - len(won) - len(lost), 'losses': len(lost),
    }  # fmt: skip
    flips[name] = {'won': won, 'lost': lost}
  return {'n': len(tuned), 'metrics': metrics, 'flips': flips}


def record_of(base, tuned, kinds, **own):
  systems = {
    name: {
      key: metric([p['scores'][key] for p in side], kinds[key])
      for key in side[0]['scores']
    }
    for name, side in (('base', base), ('tuned', tuned))
  }
  for name, value in (('base', 1.9132), ('tuned', 0.2144)):
    systems[name]['nats_per_token'] = {
      'value': value, 'low': 0.9 * value, 'high': 1.1 * value,
      'n': len(tuned), 'kind': 'likelihood',
    }  # fmt: skip
  samples = [
    {'prompt': p['prompt'], 'reference': p['reference'], 'base': b['output'],
     'tuned': p['output']}
    for b, p in list(zip(base, tuned, strict=True))[:4]
  ]  # fmt: skip
  return {
    'base': 'HuggingFaceTB/SmolLM2-135M-Instruct', 'step': 242,
    'split': 'test', 'n': len(tuned), 'reads': 1,
    'digest': 'b41f27a90c33', 'config': 'configs/addresses.py',
    'systems': systems, 'comparison': compared(base, tuned),
    'retention': make_retention(), 'samples': samples,
    'checkpoints': None, 'alphas': None, 'confusion': None,
  } | own  # fmt: skip


def make_retention():
  def of(value, low, high, n):
    return {'value': value, 'low': low, 'high': high, 'n': n}

  return {
    'base': {
      'general_nats': of(2.8713, 2.8012, 2.9407, 400),
      'nats_increase': of(0.0, 0.0, 0.0, 400),
      'quiz': of(0.535, 0.466, 0.603, 200),
      'quiz_increase': of(0.0, -0.0189, 0.0189, 200),
      'answer_tokens': of(121.4, 101.2, 142.9, 64),
      'refusals': of(0.0, 0.0, 0.0566, 64),
    },
    'tuned': {
      'general_nats': of(2.8923, 2.8219, 2.9611, 400),
      'nats_increase': of(0.021, 0.0173, 0.0247, 400),
      'kl_nats': of(0.0384, 0.0311, 0.0462, 64),
      'top1': of(0.9531, 0.9444, 0.9613, 64),
      'general_nats.dialogue': of(3.0117, 2.8911, 3.1399, 133),
      'quiz': of(0.54, 0.4708, 0.6077, 200),
      'quiz_increase': of(0.005, -0.0307, 0.0407, 200),
      'answer_tokens': of(98.2, 79.9, 118.0, 64),
      'refusals': of(0.0156, 0.0028, 0.0833, 64),
    },
  }


def make_curve(metric_name='json_equal', steps=11, bound=0.05):
  found = []
  for i in range(1, steps + 1):
    value = 0.43 + 0.47 * (1 - 0.72**i)
    nats = 0.0009 * i**2 - 0.002
    found.append({
      'step': 22 * i, 'metric': metric_name, 'value': value,
      'low': value - 0.06, 'high': min(1, value + 0.05),
      'nats_increase': nats, 'chosen': False, 'allowed': nats <= bound,
    })  # fmt: skip
  max((c for c in found if c['allowed']), key=lambda c: c['value'])[
    'chosen'
  ] = True
  return {'checkpoints': found, 'max_nats_increase': bound}


def make_alphas():
  return {'alphas': [
    {'alpha': a, 'value': 0.433 + 0.46 * a**0.7, 'low': 0.373 + 0.46 * a**0.7,
     'high': 0.48 + 0.46 * a**0.7, 'nats_increase': 0.0712 * a**2}
    for a in (0.0, 0.25, 0.5, 0.75, 1.0)
  ]}  # fmt: skip


def make_json(n=164, seed=3):
  """(record, base's predictions, tuned's): address to JSON."""
  chance = random.Random(seed)
  base, tuned = [], []
  for i in range(n):
    own = {'street': chance.choice(STREETS),
           'number': str(chance.randint(1, 99)),
           'city': chance.choice(CITIES),
           'postcode': f'{chance.randint(1000, 99999):05}'}  # fmt: skip
    text = f'{own["street"]} {own["number"]}, {own["postcode"]} {own["city"]}'
    prompt = [
      {'role': 'system', 'content': 'Write the address as JSON.'},
      {'role': 'user', 'content': text},
    ]
    wanted = json.dumps(own, ensure_ascii=False)
    bad = json.dumps(own | {'city': own['city'].split()[0] + '.'})
    talk = (
      f'Sure! Here is the address as JSON:\n\n```json\n{wanted}\n```\nI hope'
    )
    said = chance.choice([talk + ' this helps! ' * 40, bad, wanted, wanted])
    ours = chance.choice([wanted] * 9 + [bad])
    base.append(_json_row(i, prompt, wanted, said))
    tuned.append(_json_row(i, prompt, wanted, ours))
  kinds = {'json_equal': 'content', 'field_f1': 'content',
           'json_valid': 'format', 'stopped': 'format'}  # fmt: skip
  own = make_curve() | make_alphas()
  return record_of(base, tuned, kinds, **own), base, tuned


def _json_row(i, prompt, wanted, output):
  valid = float(output.startswith('{'))
  equal = float(output == wanted)
  return {
    'id': f'addresses.jsonl:{11 * i + 4}', 'prompt': prompt,
    'reference': wanted, 'output': output, 'tokens': len(output) // 3,
    'scores': {'json_equal': equal, 'field_f1': max(equal, 0.75 * valid),
               'json_valid': valid, 'stopped': valid},
  }  # fmt: skip


def make_labels(n=3080, count=77, seed=5):
  """(record, base's predictions, tuned's): messages and `count` labels."""
  chance = random.Random(seed)
  labels = [f'{_PLACES[i % 11]}_{_THINGS[i // 11]}' for i in range(count)]
  base, tuned = [], []
  for i in range(n):
    wanted = i % count
    near = min(count - 1, max(0, wanted + chance.choice([-1, 1, 1, 2])))
    said = wanted if chance.random() < 0.31 else chance.randrange(count)
    ours = wanted if chance.random() < 0.917 else near
    prompt = [{'role': 'user', 'content': f'My card {i} has not arrived yet?'}]
    for side, j in ((base, said), (tuned, ours)):
      side.append({
        'id': f'test.csv:{i + 2}', 'prompt': prompt,
        'reference': labels[wanted], 'tokens': 5,
        'output': 'Sure!' if side is base and i % 9 == 0 else labels[j],
        'scores': {'label_accuracy': float(j == wanted)},
      })  # fmt: skip
  place = {label: i for i, label in enumerate(labels)}
  confusion = {
    name: {
      'labels': labels,
      'counts': count_pairs(side, place),
      'absent': [],
    }
    for name, side in (('base', base), ('tuned', tuned))
  }
  kinds = {'label_accuracy': 'content'}
  own = make_curve('label_accuracy') | {'confusion': confusion}
  record = record_of(base, tuned, kinds, **own)
  for name, value in (('base', 0.287), ('tuned', 0.916)):
    record['systems'][name]['macro_f1'] = {
      'value': value, 'low': value - 0.011, 'high': value + 0.01, 'n': n,
      'kind': 'content',
    }  # fmt: skip
  return record, base, tuned


def count_pairs(predictions, place):
  counts = [[0] * (len(place) + 1) for _ in place]
  for p in predictions:
    said = place.get(p['output'], len(place))
    counts[place[p['reference']]][said] += 1
  return counts


_PLACES = ('card', 'cash', 'top_up', 'transfer', 'exchange', 'pin', 'refund',
           'fee', 'account', 'payment', 'identity')  # fmt: skip
_THINGS = ('arrival', 'not_working', 'delivery_estimate', 'pending', 'declined',
           'not_showing_up_in_statement', 'reverted')  # fmt: skip


def spread(made, text):
  """The record and the predictions with `text` where data and models speak."""
  record, base, tuned = made
  keys = ('won', 'lost')
  own = record | {
    'base': text, 'split': text, 'config': text, 'digest': text,
    'samples': [dict.fromkeys(sample, text) for sample in record['samples']],
    'metric': text + 'json_equal',
  }  # fmt: skip
  own['systems'] = {
    name: {text + key: m for key, m in system.items()}
    for name, system in record['systems'].items()
  }
  comparison = record['comparison']
  own['comparison'] = {
    'metrics': {text + k: each for k, each in comparison['metrics'].items()},
    'flips': {
      text + name: {key: [text + row for row in flips[key]] for key in keys}
      for name, flips in comparison['flips'].items()
    },
  }
  own['checkpoints'] = [
    point | {'metric': text} for point in record['checkpoints']
  ]
  own['confusion'] = record['confusion'] and {
    name: table | {'labels': [f'{text}{i}' for i in range(77)]}
    for name, table in record['confusion'].items()
  }
  sides = [
    [
      p | {
        'id': text + p['id'], 'reference': text, 'output': f'{text} {i}',
        'prompt': [{'role': text, 'content': text, 'name': text}],
      }
      for p in side
    ]
    for i, side in enumerate((base, tuned))
  ]  # fmt: skip
  return own, *sides


def check_golden(name, text):
  path = pathlib.Path(__file__).parent / name
  message = f'if the new text is right, write it to {path}:\n{text}'
  assert text == path.read_text(encoding='utf-8'), message
