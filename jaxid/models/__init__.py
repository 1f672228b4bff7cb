"""The networks, in Flax NNX: what they are, and nothing of files or experiments."""
