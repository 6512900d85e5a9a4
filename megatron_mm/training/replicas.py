"""Whether ranks that should hold the same parameters do, to the bit.

A flipped bit, a missed reduction or a rank that left its group's order shows here long before it shows in the loss.
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mm.errors import RunStopped
from megatron_mm.model.initialize import name_in_whole_model
from megatron_mm.training.state import TrainState, settle_parameters

ELEMENTS_AT_ONCE = 1 << 22
MULTIPLIER = 0x2545F4914F6CDD1D


class ReplicasDiffer(RunStopped):
    """Ranks that hold the same parameter hold different bits: the run must go on from a checkpoint."""


def check_replicas(state: TrainState) -> None:
    """Pass if every parameter has the same bits wherever it is replicated; raise ReplicasDiffer on every rank if not.

    Compares hashes over dp_cp, and over tp as well for parameters that tensor parallelism does not shard. Collective
    over all ranks.
    """
    settle_parameters(state)
    mesh = state.mesh
    named = [
        (name_in_whole_model(chunk, name), parameter)
        for chunk in state.chunks
        for name, parameter in chunk.named_parameters()
    ]
    sharded = [(name, p) for name, p in named if getattr(p, "tensor_model_parallel", False)]
    whole = [(name, p) for name, p in named if not getattr(p, "tensor_model_parallel", False)]
    found = _odd_ones(sharded, mesh.dp_cp_group) | _odd_ones(whole, mesh.tp_dp_cp_group)
    everywhere: list[set[str]] = [set()] * mesh.world_size
    dist.all_gather_object(everywhere, found)
    problems = sorted(set().union(*everywhere))
    if problems:
        raise ReplicasDiffer(
            f"after step {state.step} these parameters differ from their replicas:\n  "
            + "\n  ".join(problems)
            + "\n  Resume from the last checkpoint, without the machine of a rank that shows up again."
        )


def _odd_ones(named: list[tuple[str, Tensor]], group: dist.ProcessGroup) -> set[str]:
    """Return 'rank R: NAME' of each parameter whose bits are not those of most ranks; of all, where there is no most.

    Collective over `group`.
    """
    if group.size() == 1 or not named:
        return set()
    hashes = torch.stack([bit_hash(parameter) for _, parameter in named])
    gathered = hashes.new_empty(group.size(), hashes.numel())
    dist.all_gather(list(gathered.unbind(0)), hashes, group=group)
    found = set()
    for (name, _), column in zip(named, gathered.t().tolist()):
        usual, count = Counter(column).most_common(1)[0]
        if 2 * count <= len(column):
            usual = None
        found |= {
            f"rank {dist.get_global_rank(group, place)}: {name}" for place, own in enumerate(column) if own != usual
        }
    return found


@torch.no_grad()
def bit_hash(tensor: Tensor) -> Tensor:
    """Return a 64-bit hash of the bits of `tensor` and of their places, a scalar int64. No communication.

    An integer sum, so that the order of its terms does not matter.
    """
    bits = tensor.detach().reshape(-1)
    bits = bits.view(torch.int32 if bits.element_size() == 4 else torch.int16)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, bits.numel(), ELEMENTS_AT_ONCE):
        part = bits[start : start + ELEMENTS_AT_ONCE].long()
        place = torch.arange(start, start + part.numel(), device=tensor.device)
        term = (part ^ (place << 32)) * MULTIPLIER  # wraps
        total += ((term ^ (term >> 29)) * MULTIPLIER).sum()
    return total
