"""The networks' parts and passes, in Flax NNX: nothing of families, files or experiments."""
