"""Checkpoint folders to parameter pytrees and back. Nothing in a checkpoint is ever executed."""
