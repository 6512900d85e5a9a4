"""Checkpoints on disk: their form, and how they are saved, loaded, verified and read tensor by tensor."""
