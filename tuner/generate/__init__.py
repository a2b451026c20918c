"""Generation: a KV cache and greedy decoding on the training mesh."""
