"""Every layout of a job on so many GPUs: which fit, how long each takes, and what the whole run costs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_mm.config import Config
from megatron_mm.config.rules import failures, world_failures
from megatron_mm.errors import ConfigError
from megatron_mm.optimizers import MAIN_BYTES
from megatron_mm.planning.cost import Efficiency, Gpu, Layout, Shape, StepTime, step_time
from megatron_mm.planning.timeline import Pass, durations_of, schedule
from megatron_mm.settings import divisors

RATES = {"a100-80": Efficiency(0.86, 0.2), "h100-80": Efficiency(0.62, 0.7, 0.52)}
"""As benchmarks/planner_accuracy.py fits them."""
USABLE = 0.92
"""The part of a GPU's memory that a layout may use; the rest is for the CUDA context, NCCL and fragments."""
GPU_MTBF_HOURS = 50_000.0
"""Mean time between failures of one GPU: Llama 3 had 419 interruptions of 16,384 GPUs in 54 days (arXiv:2407.21783)."""


@dataclass(frozen=True)
class Planned:
    """One layout and what it amounts to."""

    layout: Layout
    time: StepTime
    memory: list[dict[str, float]]
    """Bytes by category, of a rank of each stage."""

    @property
    def memory_bytes(self) -> float:
        """Bytes of the fullest rank."""
        return max(sum(held.values()) for held in self.memory)

    def describe(self) -> str:
        """Return the layout in the field's words."""
        own = self.layout
        parts = f"TP{own.tp} PP{own.pp} VPP{own.vpp} CP{own.cp} DP{own.dp}"
        return f"{parts}, micro-batch {own.micro_batch_size}, recompute {own.recompute}, {own.precision}"


@dataclass(frozen=True)
class Forecast:
    """What a run takes, with and without failures."""

    tokens_per_second: float
    mfu: dict[str, float]
    """FLOPs a token by convention: 6N alone, 6N with full attention (Megatron's), 6N with causal attention."""
    days: float
    days_with_failures: float
    gpu_hours: float
    checkpoint_bytes: float
    checkpoint_seconds_apart: float
    hours_between_failures: float


def shape_of(config: Config) -> Shape:
    """Return the decoder of `config` as the cost model takes it."""
    model = config.model
    sizes = (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size, model.vocab_size)
    return Shape(model.num_layers, model.hidden_size, *sizes, seq_len=config.data.seq_len, gated=True)


def with_layout(config: Config, layout: Layout) -> Config:
    """Return `config` cut as `layout` says; what cannot be overlapped there is not."""
    cut = {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "stage_layers": None}
    overlap = config.parallel.tp_comm_overlap and layout.tp > 1
    work = {"micro_batch_size": layout.micro_batch_size, "recompute": layout.recompute, "precision": layout.precision}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={**cut, "tp_comm_overlap": overlap}),
            "training": config.training.model_copy(update=work),
        }
    )


def overrides(config: Config, layout: Layout) -> list[str]:
    """Return the section.key=value that turn `config` into that of `layout`: what a user appends to the command."""
    before, after = (one.model_dump(mode="json") for one in (config, with_layout(config, layout)))
    return [
        f"{section}.{key}={'null' if value is None else str(value).lower()}"
        for section in ("parallel", "training")
        for key, value in after[section].items()
        if value != before[section][key]
    ]


def layouts(config: Config, *, gpus: int) -> Iterator[Layout]:
    """Yield the layouts of `config` on so many GPUs that break none of the rules of `config.rules`.

    Tensor parallelism stays within a node of eight, and pipelines have at most 32 stages.
    """
    batch, precision = config.training.global_batch_size, config.training.precision
    slots = config.model.num_layers + config.parallel.embedding_slot + config.parallel.loss_slot
    cuts = product((1, 2, 4, 8), [pp for pp in divisors(slots) if pp <= 32], divisors(slots), (1, 2), (1, 2, 4))
    for tp, pp, vpp, cp, size in cuts:
        dp, rest = divmod(gpus, tp * pp * cp)
        if rest or not dp:
            continue
        layout = Layout(tp, pp, vpp, cp, dp, size, batch, precision)
        candidate = with_layout(config, layout)
        if not (failures(candidate) or world_failures(candidate, gpus)):
            yield from (replace(layout, recompute=recompute) for recompute in ("none", "mlp", "full"))


def memory(
    shape: Shape,
    layout: Layout,
    *,
    extra_parameters: int,
    extra_trained: int = 0,
    state_bytes: int,
    stage: int = 0,
) -> dict[str, float]:
    """Return the bytes of a rank of `stage` by category.

    `extra_parameters` are those of encoders and projectors, whole on every tensor rank of the first stage;
    `extra_trained` of them are trained. The optimizer keeps `state_bytes` a parameter. What encoders keep of images and
    sound is left out: docs/planning.md has how much that is, and how near the formula is to the rehearsal of mm_88b.
    """
    first, last = stage == 0, stage == layout.pp - 1
    table = shape.vocab * shape.hidden / layout.tp  # the embedding, and the head
    own = shape.num_layers * shape.layer_weights / (layout.tp * layout.pp) + (first + last) * table
    extra, trained = (extra_parameters, own + extra_trained) if first else (0, own)
    tokens = layout.micro_batch_size * shape.seq_len / layout.cp
    chunk = shape.num_layers / (layout.pp * layout.vpp)
    logits = 2 * tokens * shape.vocab / layout.tp if last else 0.0
    return {
        "weights": (4.0 if layout.precision == "fp8" else 2.0) * own + 2.0 * extra,
        "gradients": 4.0 * trained,
        "optimizer": float(MAIN_BYTES + state_bytes) * trained / (layout.dp * layout.cp),
        "activations": chunks_in_flight(layout, stage) * chunk * kept_by_layer(shape, layout)
        + max(4 * 2 * tokens * shape.ffn / layout.tp, logits),
    }


def chunks_in_flight(layout: Layout, stage: int = 0) -> int:
    """Return how many forward passes of a chunk a rank of `stage` holds at most, by 1F1B's order of passes."""
    behind = layout.pp - stage - 1
    warm_up = 2 * behind + (layout.vpp - 1) * layout.pp if layout.vpp > 1 else behind
    return min(warm_up + 1, layout.num_micro_batches * layout.vpp)


def kept_by_layer(shape: Shape, layout: Layout) -> float:
    """Return the bytes that a layer keeps of one micro-batch for its backward pass, on one rank.

    With flash attention, of this package's layers; without, of the layers with dropout of Korthikanti et al.
    (arXiv:2205.05198, table 2).
    """
    tokens, tp, hidden = layout.micro_batch_size * shape.seq_len / layout.cp, layout.tp, shape.hidden
    spread = tp if layout.sequence_parallel else 1
    if layout.recompute == "full":
        return 2 * tokens * hidden / spread
    if layout.flash:
        width = 6 * hidden + (0 if layout.recompute == "mlp" else 3 * shape.ffn)
        return 2 * tokens * (width / tp + 2 * hidden / shape.heads * max(1, shape.groups // tp))
    scores = 0 if layout.recompute == "selective" else 5 * shape.heads * shape.seq_len
    return tokens * (10 * hidden / spread + (8 * hidden + 4 * shape.ffn + scores) / tp)


def plan(
    config: Config, *, gpus: int, gpu: Gpu, extra_parameters: int, extra_trained: int
) -> tuple[list[Planned], int]:
    """Return the layouts that fit, the fastest first, and how many do not fit; see `memory` for the extra parameters.

    Raises ConfigError if `config` cannot be cut for so many GPUs at all, or runs in a precision without figures.
    """
    _refuse(config, gpus=gpus, gpu=gpu)
    shape, rate = shape_of(config), RATES[gpu.name]
    state_bytes = config.optimizer.state_bytes
    extra = {"extra_parameters": extra_parameters, "extra_trained": extra_trained, "state_bytes": state_bytes}
    planned, too_big = [], 0
    for layout in layouts(config, gpus=gpus):
        held = [memory(shape, layout, **extra, stage=stage) for stage in range(layout.pp)]
        one = Planned(layout, step_time(shape, layout, gpu, rate, state_bytes=state_bytes), held)
        if one.memory_bytes > USABLE * gpu.memory_bytes:
            too_big += 1
        else:
            planned.append(one)
    if not planned and not too_big:
        raise ConfigError(
            f"{config.preset} cannot be cut for {gpus} GPUs: they must be a multiple of parallel.tp x pp x cp, and "
            f"training.global_batch_size={config.training.global_batch_size} one of the replicas times their "
            f"micro-batches. Try {_fitting(config, gpus)} GPUs."
        )
    if not planned:
        raise ConfigError(f"none of {too_big} layouts of {config.preset} fits {gpus} {gpu.name}. Use more GPUs.")
    return sorted(planned, key=lambda one: (one.time.total, one.memory_bytes)), too_big


def _refuse(config: Config, *, gpus: int, gpu: Gpu) -> None:
    precision = config.training.precision
    if gpus < 1:
        raise ConfigError(f"{gpus} GPUs are none. Plan for 1 or more.")
    if precision == "fp32":
        raise ConfigError(
            "training.precision=fp32 has no published runs to take its speed from. Plan with training.precision=bf16."
        )
    if precision == "fp8" and gpu.fp8_flops == gpu.bf16_flops:
        raise ConfigError(f"training.precision=fp8, but {gpu.name} has no FP8. Use bf16, or h100-80.")


def _fitting(config: Config, gpus: int) -> int:
    """Return the number of GPUs nearest to `gpus` that some layout has."""
    for away in range(1, gpus + config.parallel.ranks_per_replica + 1):
        for near in (gpus - away, gpus + away):
            if near > 0 and next(layouts(config, gpus=near), None) is not None:
                return near
    return config.parallel.ranks_per_replica


def passes(config: Config, planned: Planned, gpu: Gpu) -> list[Pass]:
    """Return the passes of a step of a planned layout, with their predicted times."""
    slots = {"embedding_slot": config.parallel.embedding_slot, "loss_slot": config.parallel.loss_slot}
    durations = durations_of(shape_of(config), planned.layout, gpu, RATES[gpu.name], **slots)
    return schedule(durations, num_micro_batches=planned.layout.num_micro_batches)


def forecast(config: Config, best: Planned, *, gpus: int, gpu: Gpu, parameters: int) -> Forecast:
    """Return what the whole run takes in the layout `best`; `parameters` are all of the model's.

    A checkpoint stops training for a minute at worst; the interval is Young's and Daly's sqrt(2 save MTBF), and a
    failure costs half an interval and ten minutes of restart.
    """
    shape, seconds = shape_of(config), best.time.total
    tokens, peak = config.tokens_per_step, gpus * (gpu.fp8_flops if best.layout.precision == "fp8" else gpu.bf16_flops)
    products = 6.0 * (shape.parameters - shape.vocab * shape.hidden) * tokens
    attention = shape.model_flops(config.training.global_batch_size) - products
    days = seconds * config.training.steps / 86400
    between = GPU_MTBF_HOURS / gpus * 3600
    save, restart = 60.0, 600.0
    apart = math.sqrt(2 * save * between)
    waste = save / apart + (apart / 2 + restart) / between
    return Forecast(
        tokens_per_second=tokens / seconds,
        mfu={
            "6N": products / seconds / peak,
            "6N + full attention": (products + attention) / seconds / peak,
            "6N + causal attention": (products + attention / 2) / seconds / peak,
        },
        days=days,
        days_with_failures=days / (1 - waste),
        gpu_hours=days * 24 * gpus,
        checkpoint_bytes=(2.0 + MAIN_BYTES + config.optimizer.state_bytes) * parameters,
        checkpoint_seconds_apart=apart,
        hours_between_failures=between / 3600,
    )
