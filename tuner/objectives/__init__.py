"""Objectives: (policy, reference, batch, **own) -> (loss_sum, weight, metrics).

The step adds loss_sum, weight and metrics (sums, too) over micro-batches,
devices and hosts, and divides once.
"""
