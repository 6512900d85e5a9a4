"""Which rank had a gradient that is not finite, and of which parameter: looked at before ranks add theirs up.

The sum over the data-parallel ranks is not finite on all of them if it is on one. A rank that is alone looks only when
it is asked.
"""

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from megatron_mm.engine import patches
from megatron_mm.engine.mesh import Mesh
from megatron_mm.model.initialize import name_in_whole_model


class OwnGradients:
    """Notes the largest element of each gradient of this rank before it is reduced: one more pass over them a step.

    Of one rank nothing is reduced, and nothing noted.
    """

    def __init__(self, chunks: list[nn.Module], models: list[DistributedDataParallel]) -> None:
        self._names: list[list[str]] = []
        self._parameters: list[list[Tensor]] = []
        self._largest: dict[int, Tensor] = {}
        alone = dist.get_world_size() == 1
        for chunk, model in zip(chunks, models):
            names = {id(value): name_in_whole_model(chunk, name) for name, value in chunk.named_parameters()}
            for group in model.bucket_groups + model.expert_parallel_bucket_groups:
                parameters = [parameter for bucket in group.buckets for parameter in bucket.params_list]
                self._names.append([names[id(parameter)] for parameter in parameters])
                self._parameters.append(parameters)
                if not alone:
                    self._look_before(group, place=len(self._parameters) - 1)

    def _look_before(self, group, *, place: int) -> None:
        """Let a bucket group look at its gradients before it starts to reduce them; the host does not wait."""

        def look() -> None:
            self._largest[place] = self._look(place)

        patches.look_before_reduction(group, look)

    def _look(self, place: int) -> Tensor:
        """Return the largest element of each gradient of a bucket group: (num_parameters,)."""
        gradients = [parameter.main_grad for parameter in self._parameters[place]]
        return torch.stack(torch._foreach_norm(gradients, float("inf")))

    def not_finite(self, mesh: Mesh) -> list[str]:
        """Return 'rank R: NAME' of each gradient of the last step that was not finite before the sum over ranks.

        Collective over all ranks.
        """
        own = [
            f"rank {mesh.rank}: {name}"
            for place, names in enumerate(self._names)
            for name, finite in zip(names, self._largest_of(place).isfinite().tolist())
            if not finite
        ]
        everywhere: list[list[str]] = [[]] * mesh.world_size
        dist.all_gather_object(everywhere, own)
        return [line for lines in everywhere for line in lines]

    def _largest_of(self, place: int) -> Tensor:
        return self._largest[place] if place in self._largest else self._look(place)
