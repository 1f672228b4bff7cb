"""The training loop, its folder, and the choice of tensors that train."""
