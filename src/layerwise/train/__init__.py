"""The training loop, its policies and its checkpoints."""
