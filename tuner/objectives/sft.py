"""Supervised fine-tuning: the likelihood of the answers."""

import jax.numpy as jnp


def sft(policy, reference, batch, balance: float = 0.0):
  """Negative log-likelihood summed over targets; the weight is their mask's.

  batch['mask'] [B, T] weighs each token as a target: 0, or the weight of its
  row. Where all rows weigh 1, loss / weight is in nats a target token; else it
  is the mean of those by weight, and the weight is no number of tokens.

  balance: what the load-balancing loss of a mixture of experts weighs
    (`router_aux_loss_coef` at Hugging Face; Fedus et al. 2021, eq. 4), with
    metrics `balance`, K when even, and `busiest`, the busiest expert's share.
    It is a product of two means over the tokens of a micro-batch: with it, 1 x
    4 accumulation is not 4 x 1.
  """
  del reference
  if balance < 0:
    raise ValueError(f'config.objective.balance: {balance}; at least 0.')
  mask = batch['mask'].astype(jnp.float32)
  if not balance:
    return -(policy.logprobs(batch) * mask).sum(), mask.sum(), {}
  logprobs, routed = policy.routed_logprobs(batch)
  weight = mask.sum()
  # Means: as the sums of weight equal ones, what is divided gives them again.
  metrics = {name: value * weight for name, value in routed.items()}
  loss_sum = -(logprobs * mask).sum() + balance * metrics['balance']
  return loss_sum, weight, metrics
