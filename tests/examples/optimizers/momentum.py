"""Stochastic gradient descent with momentum (Polyak 1964)."""

from typing import Literal

from pydantic import Field

from megatron_mm.optimizers import OptimizerConfig, Rule, Share


class Momentum(OptimizerConfig):
    """Gradient descent with momentum (Polyak 1964), and AdamW's decoupled weight decay."""

    name: Literal["momentum"] = "momentum"
    """Optimizer: a file of megatron_mm/optimizers."""
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    """What is left of the velocity after a step."""

    def rules(self) -> tuple[Rule, ...]:
        """Return the one rule that all parameters follow."""
        return (Rule(("velocity",), self._update),)

    def _update(self, share: Share) -> None:
        """Add the gradient to the velocity, and take a step along it."""
        for parameter, gradient, velocity in zip(share.parameters, share.gradients, share.state["velocity"]):
            velocity.mul_(self.momentum).add_(gradient)
            parameter.mul_(1.0 - share.lr * share.weight_decay).sub_(velocity, alpha=share.lr)


OPTIMIZER = Momentum
