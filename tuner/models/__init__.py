"""Models: Flax NNX modules as plain pytrees; they know nothing of training."""
