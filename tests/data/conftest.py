"""A byte-level tokenizer with a ChatML template, small enough to read."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers

SPECIALS = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
# Each of these is one token; everything else is bytes.
WORDS = ('system', 'user', 'assistant', 'Be', 'hi', 'yes', 'no', 'ĊĊ', 'ĠĊ')
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
  "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(template=CHATML, **special):
  """The tiny tokenizer; `<|im_end|>` is its eos and its pad, id 2."""
  vocab = {token: i for i, token in enumerate(SPECIALS)}
  for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
    vocab[byte] = len(vocab)
  merges = []
  for word in WORDS:
    for end in range(1, len(word)):
      merges.append((word[:end], word[end]))
      vocab.setdefault(word[: end + 1], len(vocab))
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  backend.decoder = decoders.ByteLevel()
  special = {
    'bos_token': '<|im_start|>',
    'eos_token': '<|im_end|>',
    'pad_token': '<|im_end|>',
    'unk_token': '<|endoftext|>',
  } | special
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, **special
  )
  tokenizer.chat_template = template
  return tokenizer


@pytest.fixture(scope='session')
def tiny_tokenizer_dir(tmp_path_factory):
  """A Hugging Face directory: the tokenizer, its template, the stop token."""
  path = tmp_path_factory.mktemp('tiny_tokenizer')
  make_tokenizer().save_pretrained(path)
  config = {'eos_token_id': 2, 'pad_token_id': 2}
  (path / 'generation_config.json').write_text(json.dumps(config))
  return path


@pytest.fixture(scope='session')
def tokenizer():
  return make_tokenizer()


@pytest.fixture(scope='session')
def tokenizer_with():
  """make_tokenizer itself, for tests that need another template."""
  return make_tokenizer
