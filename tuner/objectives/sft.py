"""Supervised fine-tuning: the likelihood of the answers."""

import jax.numpy as jnp


def sft(policy, reference, batch, balance: float = 0.0, kl: float = 0.0):
  """Negative log-likelihood summed over targets; the weight is their mask's.

  batch['mask'] [B, T] weighs each token as a target: 0, or the weight of its
  row. Where all rows weigh 1, loss / weight is in nats a target token; else it
  is the mean of those by weight, and the weight is no number of tokens.

  balance: what the load-balancing loss of a mixture of experts weighs
    (`router_aux_loss_coef` at Hugging Face; Fedus et al. 2021, eq. 4), with
    metrics `balance`, K when even, and `busiest`, the busiest expert's share.
    It is a product of two means over the tokens of a micro-batch: with it, 1 x
    4 accumulation is not 4 x 1.
  kl: what KL(policy || reference) at each target weighs, in nats, against
    forgetting, with the metric `kl`; 0 at the start, where a LoRA is its base.
    This direction is that of the penalty in Ziegler et al. 2019, eq. 2, and
    what retention measures: it is dear to put mass where the base had none,
    and cheap to leave some of what the base thought possible, as an answer in
    a strict form must. Here it is the whole sum over the vocabulary, at the
    tokens of the rows, and costs a forward pass of the base. Raises ValueError
    for full fine-tuning, which keeps none.
  """
  for name, value in (('balance', balance), ('kl', kl)):
    if value < 0:
      raise ValueError(f'config.objective.{name}: {value}; at least 0.')
  mask = batch['mask'].astype(jnp.float32)
  routed = {}
  if kl:
    logprobs, kl_BT, routed = policy.compared_logprobs(reference, batch)
  elif balance:
    logprobs, routed = policy.routed_logprobs(batch)
  else:
    logprobs = policy.logprobs(batch)
  weight, metrics = mask.sum(), {}
  loss_sum = -(logprobs * mask).sum()
  if kl:
    metrics['kl'] = (kl_BT * mask).sum()
    loss_sum += kl * metrics['kl']
  if balance:
    if not routed:
      raise ValueError('config.objective.balance: this model has no experts.')
    # Means: as the sums of weight equal ones, what is divided gives them again.
    routed = {name: value * weight for name, value in routed.items()}
    metrics |= routed
    loss_sum += balance * routed['balance']
  return loss_sum, weight, metrics
