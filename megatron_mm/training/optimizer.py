"""The chosen optimizer over megatron-core's distributed one, and which parameters it treats how."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    _get_param_groups,
)
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mm.config import Config
from megatron_mm.optimizers import Rule, Share

UNDECAYED = ("cls_token", "position_embeddings", "parametrizations.weight.original0")
"""Encoder parameters that are no matrices, whatever their shape: tokens, positions, weight-norm magnitudes."""
DECAYS = {"inverse_sqrt": "inverse-square-root"}
"""Values of schedule.style that megatron-core calls otherwise."""


class RuleOptimizer(torch.optim.Optimizer):
    """A rule over parameter groups, behind the interface of TransformerEngine's FusedAdam: a step count a group.

    megatron-core 0.19.2 restores torch's own optimizers wrongly from a checkpoint, once in silence (all parameters
    share one step tensor, which every one of them advances).
    """

    def __init__(self, groups: list[dict], rule: Rule, *, lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.rule = rule
        self.gradient_divisor = 1.0
        """What the next step divides every gradient by as it reads it, if the rule does."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient; the others keep their state, which is zero at first."""
        divisor, self.gradient_divisor = self.gradient_divisor, 1.0
        complete_state(self, self.rule)  # a checkpoint holds the state of those that no step has changed too
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if not params:
                continue
            self.rule.update(
                Share(
                    parameters=params,
                    gradients=[param.grad for param in params],
                    state={name: [self.state[param][name] for param in params] for name in self.rule.state},
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    step=group["step"],
                    divisor=divisor,
                )
            )


def complete_state(optimizer: torch.optim.Optimizer, rule: Rule) -> None:
    """Give state of zero to what no step has changed yet: the fused optimizers make it when they first need it.

    The first batches may bear no loss, or hold nothing of a modality, whose parameters are then left as they are.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not optimizer.state[param]:
                optimizer.state[param] = {name: torch.zeros_like(param) for name in rule.state}


class PartOptimizer(DistributedOptimizer):
    """megatron-core's distributed optimizer over the parameters of its buffers that follow one rule."""

    def __init__(
        self,
        groups: list[dict],
        rule: Rule,
        config: OptimizerConfig,
        models: list[DistributedDataParallel],
        process_groups: dict[str, Any],
    ) -> None:
        self.rule = rule
        inner = rule.fused(groups) or RuleOptimizer(groups, rule, lr=config.lr, weight_decay=config.weight_decay)
        super().__init__(
            inner,
            config,
            None,
            lambda optimizer, config=None: complete_state(optimizer, rule),
            model_chunks=models,
            per_model_buffers={number: model.buffers for number, model in enumerate(models)},
            data_parallel_group=process_groups["intra_dp_cp_group"],
            data_parallel_group_gloo=process_groups["intra_dp_cp_group_gloo"],
            data_parallel_group_idx=process_groups["mp_group"].rank(),
            distributed_optimizer_instance_id=0,
        )
        self.grad_stats_parallel_group = process_groups["intra_dist_opt_group"]
        self.tp_group = self.expert_tp_group = ProcessGroupCollection.use_mpu_process_groups(["tp"]).tp

    @classmethod
    def _build_optimizer_group_ranges(cls, param_groups: list[dict], gbuf_ranges: list[dict]) -> tuple:
        """Take the parameters of other rules out of this optimizer's ranges: megatron-core 0.19.2 knows only buffers
        all of whose parameters one optimizer updates."""
        own = {param for group in param_groups for param in group["params"]}
        for bucket in (one for of_type in gbuf_ranges for buckets in of_type.values() for one in buckets):
            bucket["param_map"] = {param: found for param, found in bucket["param_map"].items() if param in own}
        return super()._build_optimizer_group_ranges(param_groups, gbuf_ranges)

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """The names of the state, which megatron-core knows of its own optimizers only."""
        return self.rule.state

    def state_dict(self) -> dict[str, Any]:
        """Return what this rank's parameters have in common: settings and step count of each group.

        The fused optimizers count no step in a group that has no parameter on this rank; it has done the same.
        """
        steps = {group["step"] for group in self.optimizer.param_groups if "step" in group and group["params"]}
        assert len(steps) <= 1, f"parameter groups of one optimizer have done {steps} steps"
        counted = dict.fromkeys(("step",), *steps) if steps else {}
        groups = [{**group, **counted} for group in self.optimizer.param_groups]
        return {"optimizer": {"param_groups": [_without(group, "params") for group in groups]}}


def _without(group: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != name}


def clip_gradients(optimizer: ChainedOptimizer, coefficient: float) -> None:
    """Multiply the gradients that the next step applies by `coefficient`, within that step where its rule can.

    What megatron-core 0.19.2 does without TransformerEngine and apex makes a copy of every gradient.
    """
    for part in optimizer.chained_optimizers:
        if part.rule.divides and isinstance(part.optimizer, RuleOptimizer):
            part.optimizer.gradient_divisor = 1.0 / coefficient
        elif gradients := [parameter.grad for parameter in part.get_parameters() if parameter.grad is not None]:
            torch._foreach_mul_(gradients, coefficient)


def leave_out(optimizer: ChainedOptimizer, parameters: Iterable[Tensor]) -> None:
    """Take the gradients of model `parameters` from the next step, which then changes neither them nor their state.

    Rules here and the fused optimizers of TransformerEngine and apex pass over a tensor without gradient; their step
    count is that of a whole group and goes on.
    """
    for parameter in parameters:
        for part in optimizer.chained_optimizers:
            if parameter in part.model_param_group_index_map:  # this data-parallel rank has a share of it
                group, place = part.model_param_group_index_map[parameter]
                part.optimizer.param_groups[group]["params"][place].grad = None


def is_decayed(parameter: Tensor, name: str, *, decay_embeddings: bool) -> bool:
    """Tell whether weight decay applies: to matrices and convolutions, not to vectors, tokens and positions."""
    if parameter.dim() <= 1 or any(part in name for part in UNDECAYED):
        return False
    return decay_embeddings or "word_embeddings" not in name


def build_optimizer(config: Config, models: list[DistributedDataParallel]) -> ChainedOptimizer:
    """Return the optimizer of this rank's model chunks: one a rule, chained. Collective over all ranks."""
    settings = config.optimizer
    bf16 = config.training.precision != "fp32"
    engine = OptimizerConfig(
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    groups = _get_param_groups(models, engine, _overrides(config))  # the same ones, in the same order, on all ranks
    process_groups = ProcessGroupCollection.setup_process_groups_for_optimizer(
        None, models, use_gloo_process_groups=dist.get_backend() != "fake"
    )
    first, parts = settings.rules()[0], []
    for rule in settings.rules():
        own = [group for group in groups if group.get("optimizer", first.name) == rule.name]
        parts += [PartOptimizer(own, rule, engine, models, process_groups)] if own else []
    for part in parts[:-1]:
        part._defer_param_sync = True  # they share buffers: what the last gathers is what all have made of them
    return ChainedOptimizer(parts)


def _overrides(config: Config) -> dict[ParamKey, dict[str, Any]]:
    """Return what is different from the configuration's settings for some of the parameters, by who they are."""
    settings = config.optimizer

    def follows(rule: Rule) -> ParamKey:
        return _where(rule.name, lambda parameter, name: settings.rule_of(name, parameter).name == rule.name)

    decay_embeddings = settings.decay_embeddings
    return {
        _where("undecayed", lambda p, name: not is_decayed(p, name, decay_embeddings=decay_embeddings)): {
            "wd_mult": 0.0
        },
        _where("encoders", lambda p, name: ".encoder." in name): {
            "max_lr": settings.lr * settings.encoder_lr_scale,
            "min_lr": settings.min_lr * settings.encoder_lr_scale,
        },
        **{follows(rule): {"optimizer": rule.name} for rule in settings.rules()[1:]},
    }


def _where(name: str, predicate) -> ParamKey:
    return ParamKey(with_name_predicate=ParamWithNamePredicate(name=name, fn=predicate))


def load_optimizer(optimizer: ChainedOptimizer, saved: dict[str, Any], *, described: dict[str, Any]) -> None:
    """Bring state and step count to those of a checkpoint; every other setting stays as it is now.

    `saved` is what was loaded for `described`, as describe_shards has returned it.
    """
    is_one = len(optimizer.chained_optimizers) == 1
    values, views = ([one] if is_one else list(one.values()) for one in (saved, described))
    steps = {group["step"] for one in values for group in one["optimizer"]["param_groups"] if "step" in group}
    assert len(steps) <= 1, f"parameter groups of one checkpoint have done {steps} steps"
    set_steps_done(optimizer, next(iter(steps), None))
    for value, view in zip(values, views, strict=True):
        for number, shard in view["param_state"].items():
            shard.data.copy_(value["param_state"][number])


def reset_optimizer(optimizer: ChainedOptimizer) -> None:
    """Bring state and step count to those of an optimizer that has done no step."""
    set_steps_done(optimizer, None)
    for part in optimizer.chained_optimizers:
        complete_state(part.optimizer, part.rule)
        for state in part.optimizer.state.values():
            for name in part.rule.state:
                state[name].zero_()


def steps_done(optimizer: ChainedOptimizer) -> int | None:
    """Return how many steps `optimizer` has counted, None if it has counted none."""
    groups = [
        group for part in optimizer.chained_optimizers for group in part.state_dict()["optimizer"]["param_groups"]
    ]
    return next((group["step"] for group in groups if "step" in group), None)


def set_steps_done(optimizer: ChainedOptimizer, steps: int | None) -> None:
    """Let every group of parameters have done this many steps."""
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            group.pop("step", None)
            group.update({} if steps is None else {"step": steps})


def build_scheduler(config: Config, optimizer: MegatronOptimizer, *, step: int) -> OptimizerParamScheduler:
    """Return the learning-rate schedule as it stands after `step` steps: a function of the configuration alone."""
    settings, style = config.optimizer, config.schedule.style
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=0.0 if style == "constant" else settings.min_lr,
        lr_warmup_steps=config.schedule.warmup_steps,
        lr_decay_steps=config.decay_steps,
        lr_decay_style=DECAYS.get(style, style),
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(step)
    return scheduler
