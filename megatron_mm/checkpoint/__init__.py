"""Checkpoints on disk: what makes one, and how they are saved, loaded, verified, and read or written by tensors."""
