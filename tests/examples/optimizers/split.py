"""Matrices by gradient descent with momentum, everything else by AdamW: two optimizers in a chain."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_mm.optimizers import Rule, Share
from megatron_mm.optimizers.adamw import AdamW

if TYPE_CHECKING:
    from torch import Tensor


class Split(AdamW):
    """Matrices of the decoder by gradient descent with momentum, everything else by AdamW."""

    name: Literal["split"] = "split"
    """Optimizer: a file of megatron_mm/optimizers."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """What is left of the velocity after a step."""

    def rules(self) -> tuple[Rule, ...]:
        """Return the rule of the matrices, and AdamW's for the rest."""
        return (Rule(("velocity",), self._descend, name="matrices", takes=is_matrix), *super().rules())

    def _descend(self, share: Share) -> None:
        for parameter, gradient, velocity in zip(share.parameters, share.gradients, share.state["velocity"]):
            velocity.mul_(self.momentum).add_(gradient)
            parameter.mul_(1.0 - share.lr * share.weight_decay).sub_(velocity, alpha=share.lr)


def is_matrix(name: str, parameter: "Tensor") -> bool:
    """Tell whether a parameter is a matrix of a decoder layer."""
    return "decoder.layers." in name and parameter.dim() == 2


OPTIMIZER = Split
