"""What a run holds between two steps."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mm.config import Config
from megatron_mm.config.resume import shifts_loss
from megatron_mm.data.consumption import Consumption
from megatron_mm.engine import device, patches
from megatron_mm.engine.mesh import Mesh
from megatron_mm.model.layer import Backend
from megatron_mm.model.multimodal import MultimodalModel, build_chunks
from megatron_mm.training.gradients import OwnGradients
from megatron_mm.training.inputs import Inputs
from megatron_mm.training.optimizer import build_optimizer, build_scheduler


@dataclass
class ModelState:
    """The model of one rank, to be run forward."""

    config: Config
    mesh: Mesh
    chunks: list[MultimodalModel]
    """This rank's model chunks, bare."""
    models: list[nn.Module]
    """The same, wrapped for their precision, and for data parallelism where they are trained: what schedules run."""


@dataclass
class TrainState(ModelState):
    """The model of one rank, its optimizer, and how far the run has come."""

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    own_gradients: OwnGradients
    """What this rank's gradients were before they were summed over ranks."""
    consumption: Consumption
    """Which samples each step takes, as batch sizes and batches that were left out have it."""
    step: int = 0
    """Optimizer steps done."""
    run: str = ""
    """Names this run among all that ever had its run_dir: what files of another one say is not about this one."""
    lives: list[str] = field(default_factory=list)
    """The jobs that have written the run, this one last: what others wrote under its name is no part of it."""
    inputs: Inputs | None = None
    """What the run is trained on, by content; None where nobody recorded it."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """{"step": S, "settings": {key: line}} for each time that the run went on, after step S, with other settings."""

    def last_shift(self) -> int:
        """Return the step, counted from 0, at which a planned change has last moved the loss: 0 if none has.

        Other weights of the datasets, another batch size, or settings that were changed on a resume.
        """
        planned = [
            *(change.from_step for change in self.config.data.changes),
            *(step for step, _ in self.consumption.batch_sizes),
            *(change["step"] for change in self.changes if shifts_loss(change["settings"])),
        ]
        return max(step for step in planned if step <= max(0, self.step - 1))

    @property
    def transformer(self) -> TransformerConfig:
        """megatron-core's configuration, shared by all chunks."""
        return self.chunks[0].config


def build_state(config: Config, mesh: Mesh, *, backend: Backend | None = None) -> TrainState:
    """Build the state at step 0, of layers of `backend` or of those that suit the device. Collective over all ranks."""
    chunks = build_chunks(config, mesh, backend=backend)
    transformer = chunks[0].config
    parallel = config.parallel
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    models = [DistributedDataParallel(transformer, ddp, module) for module in in_precision(chunks)]
    if mesh.dp_cp_group.size() == 1 and not (parallel.overlap_grad_reduce or parallel.overlap_param_gather):
        _exchange_nothing(models)
    optimizer = build_optimizer(config, models)
    transformer.finalize_model_grads_func = finalize_model_grads
    transformer.grad_scale_func = optimizer.scale_loss
    if parallel.overlap_grad_reduce:  # megatron-core would reduce after each micro-batch without this
        holds = [model.no_sync for model in models]
        transformer.no_sync_func = holds if len(holds) > 1 else holds[0]
    scheduler = build_scheduler(config, optimizer, step=0)
    consumption = Consumption(((0, config.training.global_batch_size),))
    return TrainState(config, mesh, chunks, models, optimizer, scheduler, OwnGradients(chunks, models), consumption)


def in_precision(chunks: list[MultimodalModel]) -> list[nn.Module]:
    """Return model chunks wrapped so that they run in the precision of their settings."""
    transformer = chunks[0].config
    return [Float16Module(transformer, chunk) for chunk in chunks] if transformer.bf16 else list(chunks)


def _exchange_nothing(models: list[DistributedDataParallel]) -> None:
    """Keep megatron-core from reducing gradients and gathering parameters in a group of one rank: gloo copies them."""
    for model in models:
        for group in model.bucket_groups + model.expert_parallel_bucket_groups:
            assert all(bucket.gradient_scaling_factor == 1.0 for bucket in group.buckets)
            patches.exchange_nothing(group)


def settle_parameters(state: ModelState) -> None:
    """Wait until every parameter is what the last step made it. Collective over dp_cp.

    With parallel.overlap_param_gather each forward pass gathers them as it goes; who reads them otherwise calls this.
    """
    if isinstance(state, TrainState) and state.config.parallel.overlap_param_gather:
        for model in state.models:
            model.disable_forward_pre_hook(param_sync=True)
            model.enable_forward_pre_hook()


def total_parameters(state: TrainState) -> int:
    """Return the parameters of the whole model, each counted once. Collective over all ranks."""
    mesh = state.mesh
    parameters = [parameter for chunk in state.chunks for parameter in chunk.parameters()]
    sharded = [getattr(parameter, "tensor_model_parallel", False) for parameter in parameters]
    counted = mesh.dp_rank == 0 and mesh.cp_rank == 0
    own = sum(p.numel() for p, is_shard in zip(parameters, sharded) if counted and (is_shard or mesh.tp_rank == 0))
    total = torch.tensor(own, device=device.current())
    dist.all_reduce(total)
    return int(total)
