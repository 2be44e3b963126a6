"""One decoder-only transformer in Flax NNX."""
