"""AdamW over megatron-core's distributed optimizer, and which parameters it treats how."""

from collections.abc import Iterable
from typing import Any

import megatron.core.optimizer as mcore_optimizer
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.optim.adamw import adamw

from megatron_mm.config import Config

UNDECAYED = ("cls_token", "position_embeddings", "parametrizations.weight.original0")
"""Encoder parameters that are no matrices, whatever their shape: tokens, positions, weight-norm magnitudes."""


class AdamW(torch.optim.Optimizer):
    """torch's fused AdamW behind the interface of TransformerEngine's FusedAdam: one step count for a whole group.

    megatron-core 0.19.2 restores torch.optim.AdamW wrongly from a checkpoint, once in silence (all parameters share
    one step tensor, which every one of them advances); with this interface it takes the path that it takes on GPUs.
    """

    def __init__(
        self,
        params: list[dict],
        lr: float,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert adam_w_mode and not capturable
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.gradient_divisor = 1.0
        """What the next step divides every gradient by as it reads it: clipping without a pass of its own."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; the others keep their moments, which are zero at first."""
        divisor, self.gradient_divisor = self.gradient_divisor, 1.0
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:  # a checkpoint holds the moments of those that no step has changed too
                if not self.state[param]:
                    self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
            beta1, beta2 = group["betas"]
            adamw(
                params,
                [param.grad for param in params],
                [self.state[param]["exp_avg"] for param in params],
                [self.state[param]["exp_avg_sq"] for param in params],
                [],
                [torch.tensor(group["step"] - 1.0, device=param.device) for param in params],  # adamw adds the one
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                grad_scale=None if divisor == 1.0 else torch.tensor(divisor, device=group["params"][0].device),
            )


def clip_gradients(optimizer: MegatronOptimizer, coefficient: float) -> None:
    """Multiply the gradients that the next step applies by `coefficient`, within that step where it is ours.

    What megatron-core 0.19.2 does without TransformerEngine and apex makes a copy of every gradient.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, AdamW):
            part.optimizer.gradient_divisor = 1.0 / coefficient
        elif gradients := [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]:
            torch._foreach_mul_(gradients, coefficient)


def leave_out(optimizer: MegatronOptimizer, parameters: Iterable[Tensor]) -> None:
    """Take the gradients of model `parameters` from the next step, which then changes neither them nor their moments.

    AdamW here and the fused ones of TransformerEngine and apex pass over a tensor without gradient; their step count is
    that of a whole group and goes on.
    """
    (distributed,) = optimizer.chained_optimizers
    assert isinstance(distributed, distrib_optimizer.DistributedOptimizer)
    for parameter in parameters:
        if parameter in distributed.model_param_group_index_map:  # this data-parallel rank has a share of it
            group, place = distributed.model_param_group_index_map[parameter]
            distributed.optimizer.param_groups[group]["params"][place].grad = None


def is_decayed(parameter: Tensor, name: str, *, decay_embeddings: bool) -> bool:
    """Tell whether weight decay applies: to matrices and convolutions, not to vectors, tokens and positions."""
    if parameter.dim() <= 1 or any(part in name for part in UNDECAYED):
        return False
    return decay_embeddings or "word_embeddings" not in name


def build_optimizer(config: Config, models: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Return the optimizer of this rank's model chunks. Collective over all ranks."""
    if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        # Neither TransformerEngine nor apex is installed.
        mcore_optimizer.Adam = distrib_optimizer.Adam = AdamW
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    settings = config.optimizer
    decay_embeddings = settings.decay_embeddings
    overrides = {
        _where("undecayed", lambda p, name: not is_decayed(p, name, decay_embeddings=decay_embeddings)): {
            "wd_mult": 0.0
        },
        _where("encoders", lambda p, name: ".encoder." in name): {
            "max_lr": settings.lr * settings.encoder_lr_scale,
            "min_lr": settings.min_lr * settings.encoder_lr_scale,
        },
    }
    bf16 = config.training.precision != "fp32"
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=config.parallel.overlap_param_gather,
        ),
        models,
        config_overrides=overrides,
        use_gloo_process_groups=dist.get_backend() != "fake",
    )


def load_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    """Bring moments and step count to those of a checkpoint; every other setting stays as it is now.

    megatron-core 0.19.2 brings learning rates and weight decay back with the state, and finds no parameter group where
    one of them has changed.
    """
    (distributed,) = getattr(optimizer, "chained_optimizers", [optimizer])
    steps = {group["step"] for group in saved["optimizer"]["param_groups"] if "step" in group}
    assert len(steps) <= 1, f"parameter groups of one checkpoint have done {steps} steps"
    counted = dict.fromkeys(("step",), *steps) if steps else {}
    groups = [{**group, **counted} for group in distributed.optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict({**saved, "optimizer": {**saved["optimizer"], "param_groups": groups}})


def _where(name: str, predicate) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=predicate))


def build_scheduler(config: Config, optimizer: MegatronOptimizer, *, step: int) -> OptimizerParamScheduler:
    """Return the learning-rate schedule as it stands after `step` steps: a function of the configuration alone."""
    settings = config.optimizer
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=config.schedule.warmup_steps,
        lr_decay_steps=config.decay_steps,
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(step)
    return scheduler
