"""Which rank had a gradient that is not finite, and of which parameter: looked at before ranks add theirs up.

The sum over the data-parallel ranks is not finite on all of them if it is on one.
"""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_mm.model.initialize import name_in_whole_model
from megatron_mm.parallel.mesh import Mesh


class OwnGradients:
    """Notes the largest element of each gradient of this rank before it is reduced: one more pass over them a step."""

    def __init__(self, chunks: list[nn.Module], models: list[DistributedDataParallel]) -> None:
        self._names: list[list[str]] = []
        self._largest: list[Tensor | None] = []
        for chunk, model in zip(chunks, models):
            names = {id(value): name_in_whole_model(chunk, name) for name, value in chunk.named_parameters()}
            for group in model.bucket_groups + model.expert_parallel_bucket_groups:
                parameters = [parameter for bucket in group.buckets for parameter in bucket.params_list]
                self._look_before(group, parameters)
                self._names.append([names[id(parameter)] for parameter in parameters])

    def _look_before(self, group, parameters: list[Tensor]) -> None:
        """Let a bucket group look at its gradients before it starts to reduce them; the host does not wait."""
        place, reduce = len(self._largest), group.start_grad_sync
        self._largest.append(None)

        def look(*args, **kwargs):
            norms = torch._foreach_norm([parameter.main_grad for parameter in parameters], float("inf"))
            self._largest[place] = torch.stack(norms)  # (num_parameters,)
            return reduce(*args, **kwargs)

        group.start_grad_sync = look

    def not_finite(self, mesh: Mesh) -> list[str]:
        """Return 'rank R: NAME' of each gradient of the last step that was not finite before the sum over ranks.

        Collective over all ranks.
        """
        own = [
            f"rank {mesh.rank}: {name}"
            for names, largest in zip(self._names, self._largest)
            if largest is not None
            for name, finite in zip(names, largest.isfinite().tolist())
            if not finite
        ]
        everywhere: list[list[str]] = [[]] * mesh.world_size
        dist.all_gather_object(everywhere, own)
        return [line for lines in everywhere for line in lines]
