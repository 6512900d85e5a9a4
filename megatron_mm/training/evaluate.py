"""The loss on held-out documents, of a run as it goes or of a checkpoint alone."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_mm.checkpoint.format import MANIFEST
from megatron_mm.checkpoint.load import load_weights
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import device
from megatron_mm.engine.agreement import together
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import ConfigError
from megatron_mm.kernels.select import select
from megatron_mm.model.loss import by_name
from megatron_mm.model.multimodal import build_chunks
from megatron_mm.source import Source
from megatron_mm.training.inputs import check_stored_tokenizer
from megatron_mm.training.state import ModelState, in_precision, settle_parameters
from megatron_mm.training.step import run_micro_batches


def evaluate(state: ModelState, loader: Loader) -> Tensor:
    """Return the loss on evaluation.samples samples of `loader`: (num_datasets, num_sources, 2) sums and counts.

    The samples are the same at every evaluation and in every layout; the last batch is filled with empty ones.
    Collective over all ranks.
    """
    config = state.config
    batch_size = config.training.global_batch_size
    samples = spread(loader.num_samples, most=config.evaluation.samples)
    samples = np.append(samples, np.full(-len(samples) % batch_size, -1))
    losses = torch.zeros(len(loader.datasets), len(Source), 2, dtype=torch.float64)
    settle_parameters(state)
    for model in state.models:
        model.eval()
    with torch.no_grad():
        for batch in samples.reshape(-1, batch_size):
            losses += run_micro_batches(state, loader.micro_batches(batch), forward_only=True).losses
    return losses


def spread(num_samples: int, *, most: int) -> np.ndarray:
    """Return all samples, or `most` of them at even distances: datasets, end to end, are drawn from by their size."""
    count = min(most, num_samples)
    return np.arange(count) * num_samples // max(1, count)


def evaluate_checkpoint(config: Config, mesh: Mesh, path: Path) -> dict[str, float]:
    """Return the held-out losses of the checkpoint `path` on data.validation, in the layout of `config`, by name.

    Nothing is written and no optimizer is built. Collective over all ranks. Raises ConfigError if there are no held-out
    shards, they speak of other ids, or the checkpoint is another model's; DataError if it is damaged.
    """
    select(config.training.kernels, device.current())
    loader = together(lambda: _held_out(config, mesh, path))
    chunks = build_chunks(config, mesh)
    load_weights(chunks, config=config, mesh=mesh, path=path)
    losses = evaluate(ModelState(config, mesh, chunks, in_precision(chunks)), loader)
    return by_name(losses, datasets=loader.datasets)


def _held_out(config: Config, mesh: Mesh, path: Path) -> Loader:
    if not config.data.validation:
        raise ConfigError("data.validation is empty: there is nothing to evaluate on. Name held-out shards there.")
    if not (path / MANIFEST).exists():
        raise ConfigError(
            f"{path} is no checkpoint: it has no {MANIFEST}. Name a folder step_N of a run_dir's "
            "checkpoints, or one that tools/convert_checkpoint.py from-hf has written."
        )
    loader = Loader(config.data.validation, config=config, mesh=mesh, report_apart=True)
    check_stored_tokenizer(path, loader.shards[0], what="data.validation", is_rank_0=mesh.is_rank_0)
    return loader
