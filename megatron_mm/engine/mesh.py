"""The ranks of a run and the groups that they speak in: the only reader of megatron-core's `parallel_state`."""

import json
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from megatron_mm.config import Config, check_world, flat
from megatron_mm.engine import device, rendezvous
from megatron_mm.engine.agreement import check_alike
from megatron_mm.environment import read_number
from megatron_mm.errors import ConfigError

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for a rank that is late, before it fails."""


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands: its place and size along each axis, and the group of each.

    Ranks count tp fastest, then cp, dp and pp (megatron-core's order), so that a tensor-parallel group is one node.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int
    cp_rank: int
    cp_size: int
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    tp_cp_group: dist.ProcessGroup
    """The ranks that share the sequences of one replica: they split the encoders' work. tp counts fastest."""
    dp_cp_group: dist.ProcessGroup
    """The ranks that hold the same parameters: gradients are summed, and optimizer state is sharded, over them."""
    tp_dp_cp_group: dist.ProcessGroup
    """The ranks of one pipeline stage: all that hold a parameter which tensor parallelism does not shard."""

    @property
    def is_rank_0(self) -> bool:
        """Whether this rank is the one that logs and writes what all ranks agree on."""
        return self.rank == 0

    @property
    def computes_loss(self) -> bool:
        """Whether this rank holds the last model chunk and counts once among tensor ranks."""
        return self.pp_rank == self.pp_size - 1 and self.tp_rank == 0

    def is_first_chunk(self, chunk: int) -> bool:
        """Whether model chunk `chunk` of this rank holds the embedding and the encoders."""
        return self.pp_rank == 0 and chunk == 0

    def is_last_chunk(self, chunk: int) -> bool:
        """Whether model chunk `chunk` of this rank holds the head and the loss."""
        return self.pp_rank == self.pp_size - 1 and chunk == self.vpp_size - 1

    def describe(self) -> str:
        """Return the layout in the field's words."""
        vpp = f" VPP{self.vpp_size}" if self.vpp_size > 1 else ""
        cp = f" CP{self.cp_size}" if self.cp_size > 1 else ""
        return f"TP{self.tp_size} PP{self.pp_size}{vpp}{cp} DP{self.dp_size}"


MAX_DIGITS = 9
"""Of the number of ranks: more are no number of machines, and thousands are none that Python reads."""


def world_size() -> int:
    """Return the number of ranks that torchrun (or srun) started; 1 without it. Raises ConfigError if it is none."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or len(size) > MAX_DIGITS or not int(size):
        raise ConfigError(
            f"WORLD_SIZE={size} is no number of ranks. Start the ranks with torchrun or srun, or unset it."
        )
    return int(size)


def initialize(config: Config) -> Mesh:
    """Join the ranks of this run and cut them into groups. Collective over all ranks.

    Without a launcher the run has one rank. Raises ConfigError if the layout does not fit the number of ranks or a rank
    has other settings than most; RanksMissing if some do not come.
    """
    size = world_size()
    check_world(config, size)
    device.prepare(read_number("LOCAL_RANK", 0), read_number("LOCAL_WORLD_SIZE", 1, least=1))
    if not dist.is_initialized():
        if size > 1:
            store = rendezvous.meet(size, timeout=TIMEOUT)
            rank = read_number("RANK", 0)
            dist.init_process_group(device.backend(), store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        else:
            dist.init_process_group(device.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    check_alike(settings_by_key(config), what="settings")  # before groups are cut as they say
    return cut(config)


def settings_by_key(config: Config) -> dict[str, str]:
    """Return every setting as text by its key, to be compared between ranks."""
    return {key: json.dumps(value) for key, value in flat(config).items()}


def cut(config: Config) -> Mesh:
    """Cut the ranks of the initialized process group into the groups of `config`. Collective over all ranks."""
    parallel = config.parallel
    fake = dist.get_backend() == "fake"
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        create_gloo_process_groups=not fake,
    )
    # Nothing here draws random numbers, but megatron-core's blocks fork this tracker under sequence parallelism.
    get_cuda_rng_tracker().reset()
    model_parallel_cuda_manual_seed(config.training.seed)
    torch.manual_seed(config.training.seed)
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pp,
        vpp_size=parallel.vpp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.cp,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        tp_cp_group=parallel_state.get_tensor_and_context_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        tp_dp_cp_group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
    )


def alone(config: Config) -> Mesh:
    """Return a mesh of one rank on the meta device that never communicates: for looking at a model without running it.

    Raises RuntimeError if this process has joined a run already.
    """
    if dist.is_initialized():
        raise RuntimeError("this process is a rank of a run: mesh.alone() would take its groups away.")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device.use_meta()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    layout = config.parallel.model_copy(update={"tp": 1, "pp": 1, "vpp": 1, "cp": 1})
    return cut(config.model_copy(update={"parallel": layout}))


def leave() -> None:
    """Leave the run: free every group. Collective over all ranks."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
