"""Every layout of a job on so many GPUs: which fit, how long each takes, and what the whole run costs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mm.config import Config
from megatron_mm.planning.cost import Efficiency, Gpu, Layout, Shape, StepTime, step_time

RATES = {"a100-80": Efficiency(0.86, 0.2), "h100-80": Efficiency(0.62, 0.7, 0.52)}
"""As benchmarks/planner_accuracy.py fits them."""
USABLE = 0.92
"""Of a GPU's memory; the rest is for the CUDA context, NCCL and fragments."""
GPU_MTBF_HOURS = 50_000.0
"""Mean time between failures of one GPU: Llama 3 had 419 interruptions of 16,384 GPUs in 54 days (arXiv:2407.21783)."""


@dataclass(frozen=True)
class Planned:
    """One layout and what it amounts to."""

    layout: Layout
    time: StepTime
    memory: dict[str, float]
    """Bytes on the first stage, the fullest, by category."""

    @property
    def memory_bytes(self) -> float:
        """Bytes of the fullest rank."""
        return sum(self.memory.values())

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
    """By convention: 6N alone, 6N with full attention (Megatron's), 6N with causal attention."""
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


def layouts(config: Config, *, gpus: int, precision: str) -> Iterator[Layout]:
    """Yield the layouts that divide the model, the batch and the GPUs; tensor parallelism stays in a node of eight."""
    model, batch = config.model, config.training.global_batch_size
    slots = model.num_layers + config.parallel.embedding_slot + config.parallel.loss_slot
    for tp in (1, 2, 4, 8):
        if model.num_attention_heads % tp or model.ffn_hidden_size % tp:
            continue
        for pp in [pp for pp in range(1, 33) if slots % pp == 0 and gpus % (tp * pp) == 0]:
            for vpp in [1] if pp == 1 else [v for v in range(1, slots // pp + 1) if slots % (pp * v) == 0]:
                for cp in (1, 2):
                    dp, rest = divmod(gpus, tp * pp * cp)
                    for size in (1, 2, 4):
                        if rest or not dp or batch % (dp * size) or (vpp > 1 and batch // (dp * size) % pp):
                            continue
                        for recompute in ("none", "mlp", "full"):
                            yield Layout(tp, pp, vpp, cp, dp, size, batch, precision, recompute)


def memory(shape: Shape, layout: Layout, *, extra_parameters: int) -> dict[str, float]:
    """Return the bytes of the first stage's ranks by category.

    `extra_parameters` are those of encoders and projectors, whole on every tensor rank. The formula agrees with the
    rehearsal of mm_88b: see docs/planning.md.
    """
    own = shape.num_layers * shape.layer_weights / (layout.tp * layout.pp) + shape.vocab * shape.hidden / layout.tp
    tokens = layout.micro_batch_size * shape.seq_len / layout.cp
    width = 4 * shape.hidden + 2 * shape.hidden + 3 * shape.ffn
    if layout.recompute == "mlp":
        width -= 3 * shape.ffn
    a_layer = 2 * tokens * (width / layout.tp + 2 * shape.hidden / shape.heads * max(1, shape.groups // layout.tp))
    if layout.recompute == "full":
        a_layer = 2 * tokens * shape.hidden / layout.tp
    chunk = shape.num_layers / (layout.pp * layout.vpp)
    warm_up = 2 * (layout.pp - 1) + (layout.vpp - 1) * layout.pp if layout.vpp > 1 else layout.pp - 1
    in_flight = min(warm_up + 1, layout.num_micro_batches * layout.vpp)
    return {
        "weights": (4.0 if layout.precision == "fp8" else 2.0) * own + 2.0 * extra_parameters,
        "gradients": 4.0 * own,
        "optimizer": 12.0 * own / (layout.dp * layout.cp),
        "activations": in_flight * chunk * a_layer + (4 * 2 * tokens * shape.ffn / layout.tp),
    }


def plan(config: Config, *, gpus: int, gpu: Gpu, precision: str, extra_parameters: int) -> tuple[list[Planned], int]:
    """Return the layouts that fit, the fastest first, and how many do not fit."""
    shape, rate = shape_of(config), RATES[gpu.name]
    planned, too_big = [], 0
    for layout in layouts(config, gpus=gpus, precision=precision):
        held = memory(shape, layout, extra_parameters=extra_parameters)
        if sum(held.values()) > USABLE * gpu.memory_bytes:
            too_big += 1
            continue
        planned.append(Planned(layout, step_time(shape, layout, gpu, rate), held))
    return sorted(planned, key=lambda one: (one.time.total, one.memory_bytes)), too_big


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
        checkpoint_bytes=14.0 * parameters,
        checkpoint_seconds_apart=apart,
        hours_between_failures=between / 3600,
    )
