"""The run: state, step, loop, evaluation, checkpoints, metrics."""
