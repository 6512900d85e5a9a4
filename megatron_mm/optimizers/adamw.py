"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveFloat

from megatron_mm.optimizers import OptimizerConfig, Rule, Share

if TYPE_CHECKING:
    from torch.optim import Optimizer


class AdamW(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019). Norms, biases and other vectors are never decayed."""

    name: Literal["adamw"] = "adamw"
    """Optimizer: a file of megatron_mm/optimizers."""
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the first moment."""
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""

    def rules(self) -> tuple[Rule, ...]:
        """Return the one rule that all parameters follow."""
        return (Rule(("exp_avg", "exp_avg_sq"), self._update, divides=True, fused=self._fused),)

    def _update(self, share: Share) -> None:
        """Change a share by one step of torch's fused AdamW."""
        import torch
        from torch.optim.adamw import adamw

        device, divisor = share.parameters[0].device, share.divisor
        adamw(
            share.parameters,
            share.gradients,
            share.state["exp_avg"],
            share.state["exp_avg_sq"],
            [],
            [torch.tensor(share.step - 1.0, device=device) for _ in share.parameters],  # adamw adds the one
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=share.lr,
            weight_decay=share.weight_decay,
            eps=self.epsilon,
            maximize=False,
            grad_scale=None if divisor == 1.0 else torch.tensor(divisor, device=device),
        )

    def _fused(self, groups: list[dict[str, Any]]) -> "Optimizer | None":
        """Return TransformerEngine's or apex's AdamW where megatron-core has found one of them."""
        from megatron.core.optimizer import Adam

        if Adam.__module__.partition(".")[0] not in ("transformer_engine", "apex"):
            return None
        own = {"lr": self.lr, "weight_decay": self.weight_decay, "betas": (self.beta1, self.beta2), "eps": self.epsilon}
        return Adam(groups, **own, adam_w_mode=True)


OPTIMIZER = AdamW
