"""Supervised fine-tuning: the likelihood of the answers."""

import jax.numpy as jnp


def sft(policy, reference, batch):
  """Negative log-likelihood summed over targets; the weight is their number.

  batch['mask'] [B, T] weighs each token as a target. Loss / weight is in nats
  a target token.
  """
  del reference
  mask = batch['mask'].astype(jnp.float32)
  loss_sum = -(policy.logprobs(batch) * mask).sum()
  return loss_sum, mask.sum(), {}
