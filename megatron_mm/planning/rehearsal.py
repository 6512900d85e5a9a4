"""One training step of any rank of any job, without its GPUs: the real code under fake tensors and fake groups.

Model, data shapes, schedule, optimizer and checkpoint plan are those of a run. What cannot run without a GPU stands
aside, and `STANDS_FOR` says what is counted in its place.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_mm import endings
from megatron_mm.batch import MediaUnits, MicroBatch, TokenCounts, attention_spans, context_spans
from megatron_mm.config import Config, check_world
from megatron_mm.data.loader import Unit, media_units
from megatron_mm.engine import device, patches
from megatron_mm.engine import mesh as meshes
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import ConfigError
from megatron_mm.kernels import forms
from megatron_mm.modalities import BY_NAME, MODALITIES
from megatron_mm.model.backend import local
from megatron_mm.model.layer import Backend
from megatron_mm.planning.ledger import Channel, Collective, Component, Ledger, Message, Product, Sample
from megatron_mm.training import checkpoints
from megatron_mm.training.state import TrainState, build_state
from megatron_mm.training.step import train_step, update

STANDS_FOR = {
    "training.backend": "megatron-core's linear layers stand for TransformerEngine's, whose parameters are the same. "
    "They hold each weight's BF16 gradient until it is added to the FP32 buffer; TransformerEngine adds in place: the "
    "real peak is lower by at most one weight's gradient.",
    "training.attention": "torch's varlen operator stands for cuDNN's and flash-attn's: each keeps query, key, value, "
    "output and one FP32 number a head and token.",
    "parallel.tp_comm_overlap": "user buffers are not rehearsed: `overlap_buffers` counts them, one whole and one "
    "sharded activation of the widest layer a micro-batch.",
    "training.precision": "fp8 is rehearsed as bf16: `fp8_copies` counts the FP8 weights and their transposes, 2 bytes "
    "a parameter of the FP8 layers; saved inputs of matrix products shrink to half, which is not taken off.",
}
"""What the rehearsal of a GPU job replaces, and how memory differs."""
NAMED = ("input_layernorm", "self_attention", "core_attention", "pre_mlp_layernorm", "mlp", "output_layer")
NAMED_IN_EMBEDDING = ("word_embeddings", *(f"{name}.{part}" for name in BY_NAME for part in ("encoder", "projector")))


class RehearsalFailed(ConfigError):
    """The real job would fail; the message names the rank and the module."""


@dataclass(frozen=True)
class RankReport:
    """What one rank of a job holds, computes and sends in one step."""

    rank: int
    place: str
    parameters: int
    num_layers: int
    num_micro_batches: int
    peak: dict[str, int]
    """Bytes by category when they are most in all."""
    steady: dict[str, int]
    """Bytes by category between two steps."""
    peak_phase: str
    """When that is, such as 'backward micro-batch 0 chunk 3'."""
    history: list[Sample]
    """A few hundred moments of the step in order, the peak among them."""
    flops: dict[Product, int]
    calls: dict[Product, int]
    moved: dict[tuple[str, bool], int]
    launches: dict[tuple[str, bool], int]
    collectives: dict[Collective, int]
    messages: dict[Channel, list[Message]]
    """The same one by one, in order."""
    checkpoint_bytes: int
    """Bytes of the parameters and optimizer state that this rank's checkpoint plan holds."""
    seconds: float
    """How long the rehearsal took."""
    additions: dict[str, int] = field(default_factory=dict)
    """Bytes that the GPU job holds beyond what was rehearsed, by what they are for; see `STANDS_FOR`."""

    @property
    def peak_bytes(self) -> int:
        """What the rank holds at most, additions included."""
        return sum(self.peak.values()) + sum(self.additions.values())

    def flops_by_module(self) -> dict[str, int]:
        """Return FLOPs of matrix products and attention, forward and backward, by kind of module."""
        result: Counter[str] = Counter()
        for product, flops in self.flops.items():
            result[product.module or "other"] += flops
        return dict(result)


def distinct_ranks(config: Config, world_size: int) -> list[int]:
    """Return one rank of each kind: the first of every stage, and the last tensor rank of the last stage.

    Of the last stage the first tensor rank alone reports the loss; elsewhere tensor ranks differ in nothing. Context
    and data ranks have tensors of the same shapes: context parallelism balances keys by construction, and the
    distributed optimizer cuts its buffers evenly.
    """
    parallel = config.parallel
    check_world(config, world_size)
    stage = world_size // parallel.pp
    return sorted({*range(0, world_size, stage), world_size - stage + parallel.tp - 1})


def stage_ranks(config: Config, world_size: int) -> list[int]:
    """Return the first rank of every pipeline stage."""
    check_world(config, world_size)
    return list(range(0, world_size, world_size // config.parallel.pp))


def rehearse(config: Config, *, rank: int, world_size: int, on: str = "gpu", media: int = 1) -> RankReport:
    """Run the step of `rank` and return what it took. This process must be in no process group.

    `on` is 'gpu', where native kernels and flash attention run, or 'cpu', what the same configuration runs over gloo.
    Each sample holds one document and, per tensor and context rank, `media` units of each modality.
    Raises RehearsalFailed where the real job would fail, ConfigError for a layout that does not fit the ranks.
    """
    started = time.perf_counter()
    check_world(config, world_size)
    own = _rehearsable(config) if on == "gpu" else config
    with _fake_world(rank, world_size), patches.for_rehearsal():
        mesh = meshes.cut(own)
        ledger = Ledger()
        try:
            backend = local(_attention(own, on=on))
            with FakeTensorMode(allow_non_fake_inputs=True), forms.running(_kernels(own, on=on)), ledger:
                state = prepare(own, mesh, ledger, backend=backend)
                count = own.num_micro_batches(mesh.dp_size)
                take_step(state, [micro_batch(own, mesh, media=media) for _ in range(count)], ledger)
                ledger.begin_phase("the checkpoint plan")
                saved = checkpoints.planned_bytes(state)
        except Exception as error:
            raise RehearsalFailed(
                f"rank {rank} of {world_size} ({_place(mesh)}) fails {ledger.describe_failure(error)}: "
                f"{type(error).__name__}: {error}"
            ) from error
    additions = _additions(config, state) if on == "gpu" else {}
    report = report_of(state, ledger, seconds=time.perf_counter() - started)
    return RankReport(**{**vars(report), "checkpoint_bytes": saved, "additions": additions})


def _kernels(config: Config, *, on: str) -> forms.Form:
    """Return the form of the kernels that `config` runs there."""
    choice = config.training.kernels
    return ("native" if on == "gpu" else "fused") if choice == "auto" else choice


def _attention(config: Config, *, on: str) -> str:
    """Return the form of attention whose operands and results stand for those of `config` there."""
    training = config.training
    if training.attention in ("reference", "sdpa"):
        return training.attention
    if training.attention == "auto" and training.kernels == "reference":
        return "reference"
    return "varlen" if on == "gpu" and training.precision != "fp32" else "sdpa"


def check_messages(reports: Sequence[RankReport]) -> None:
    """Pass if rehearsed ranks that speak to one another send and expect the same, in the same order.

    Raises RehearsalFailed with the first message that differs: the real job would hang there, or read something else.
    """
    for channel in dict.fromkeys(channel for report in reports for channel in report.messages):
        sides = [(report.rank, report.messages.get(channel, [])) for report in reports if report.rank in channel.ranks]
        for (rank, own), (other_rank, others) in pairwise(sides):
            for number, (one, other) in enumerate(zip_longest(own, others)):
                same = one and other and one.num_bytes == other.num_bytes
                if not same or (one.name != other.name and not channel.directed):
                    raise RehearsalFailed(
                        f"message {number} over {channel.group} of ranks {_some(channel.ranks)} differs: "
                        f"rank {rank} has {_tell(one)} and rank {other_rank} has {_tell(other)}"
                    )


def _tell(message: Message | None) -> str:
    if message is None:
        return "none"
    return f"{message.name.strip('_')} of {message.num_bytes:,} bytes {message.place}"


def _some(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"


def rehearse_apart(config: Config, *, rank: int, world_size: int, on: str = "gpu", media: int = 1) -> RankReport:
    """Rehearse a rank in a process of its own, as it has in the job; see `rehearse`."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=device.keep_out_accelerators) as pool:
        with endings.out_of_reach_of_ctrl_c():
            report = pool.submit(rehearse, config, rank=rank, world_size=world_size, on=on, media=media)
        return report.result()


def prepare(config: Config, mesh: Mesh, ledger: Ledger, *, backend: Backend | None = None) -> TrainState:
    """Build the state of this rank with its optimizer state, and enter all of it into the books.

    Collective over all ranks.
    """
    ledger.begin_phase("the building of the model")
    state = build_state(config, mesh, backend=backend)
    ledger.parts = dict(_parts(state))
    ledger.begin_phase("the first optimizer step")
    update(state)  # of no gradient: makes the moments, which the peak of every later step includes
    state.optimizer.zero_grad()
    ledger.hold_rest("optimizer")
    for model in state.models:
        ledger.hold((parameter.data for parameter in model.parameters()), "weights")
        for buffer in model.buffers + model.expert_parallel_buffers:
            ledger.hold([buffer.grad_data], "gradients")
            ledger.hold([buffer.param_data] if buffer.param_data is not None else [], "weights")
    state.transformer.finalize_model_grads_func = _in_phases(ledger, state.transformer.finalize_model_grads_func)
    return state


def _in_phases(ledger: Ledger, finalize: Callable[..., None]) -> Callable[..., None]:
    """Return `finalize`, which ends the last backward pass, as a phase of its own before that of the optimizer."""

    def reduce(*args: Any, **kwargs: Any) -> None:
        ledger.begin_phase("the reduction of gradients")
        finalize(*args, **kwargs)
        ledger.begin_phase("the optimizer step")

    return reduce


def take_step(state: TrainState, micro_batches: list[MicroBatch], ledger: Ledger) -> None:
    """Take one training step and count it. Collective over all ranks."""
    ledger.begin_phase("the start of the step")
    ledger.forget_counts()
    train_step(state, micro_batches)


def report_of(state: TrainState, ledger: Ledger, *, seconds: float) -> RankReport:
    """Return what the ledger holds as a report."""
    mesh, history = state.mesh, ledger.samples()
    return RankReport(
        rank=mesh.rank,
        place=_place(mesh),
        parameters=sum(parameter.numel() for chunk in state.chunks for parameter in chunk.parameters()),
        num_layers=sum(len(chunk.decoder.layers) for chunk in state.chunks),
        num_micro_batches=state.config.num_micro_batches(mesh.dp_size),
        peak={name: size for name, size in ledger.peak.items() if size},
        steady={name: size for name, size in ledger.held.items() if size},
        peak_phase=max(history, key=lambda sample: sum(sample.held.values())).phase,
        history=history,
        flops=dict(ledger.flops),
        calls=dict(ledger.calls),
        moved=dict(ledger.moved),
        launches=dict(ledger.launches),
        collectives=dict(ledger.collectives),
        messages=dict(ledger.messages),
        checkpoint_bytes=0,
        seconds=seconds,
    )


def _place(mesh: Mesh) -> str:
    return f"pp {mesh.pp_rank}, dp {mesh.dp_rank}, cp {mesh.cp_rank}, tp {mesh.tp_rank}"


def _parts(state: TrainState) -> Iterator[tuple[int, Component]]:
    """Yield (id, part) of every module; decoder layers are counted from 1, over all stages."""
    for number, chunk in enumerate(state.chunks):
        for name, module in chunk.named_modules():
            path, names = name, name.split(".")
            if names[:2] == ["decoder", "layers"] and len(names) > 2:
                number_of_layer = chunk.decoder.layers[int(names[2])].layer_number
                inside = ".".join(names[3:])
                path = f"{inside}{inside and ' of '}decoder layer {number_of_layer} of {state.config.model.num_layers}"
            yield id(module), Component(_kind(name), path)
        yield id(chunk), Component("loss", "the loss", number) if chunk.post_process else Component("chunk", "", number)


def _kind(name: str) -> str:
    """Return what the counts of a module are kept by: layers of a kind share it."""
    last, inside = name.split(".")[-1], name.removeprefix("embedding.")
    if inside in NAMED_IN_EMBEDDING:
        return inside
    if last in NAMED and not inside.startswith(NAMED_IN_EMBEDDING):
        return last
    return last if name in ("decoder.final_layernorm", "embedding", "decoder") else ""


def micro_batch(config: Config, mesh: Mesh, *, media: int) -> MicroBatch:
    """Return a micro-batch of whole documents with `media` units of each modality on each encoding rank."""
    num_tokens, seq_len = config.tokens_per_micro_batch, config.data.seq_len
    local_tokens = num_tokens // mesh.cp_size
    parts = context_spans(num_tokens, cp_rank=mesh.cp_rank, cp_size=mesh.cp_size)
    positions = torch.from_numpy(np.concatenate([np.asarray(part) for part in parts]) % seq_len)
    return MicroBatch(
        tokens=torch.zeros(local_tokens, dtype=torch.int64),
        labels=torch.zeros(local_tokens, dtype=torch.int64),
        loss_mask=torch.ones(local_tokens),
        origins=torch.zeros(local_tokens, dtype=torch.int64),
        positions=positions,
        spans=attention_spans([seq_len] * config.training.micro_batch_size, cp_rank=mesh.cp_rank, cp_size=mesh.cp_size),
        media=_media(config, mesh, parts, per_rank=media),
        # On every stage, for the last one reports them: with media, the step updates the encoders too.
        counts=TokenCounts(text=local_tokens, media=dict.fromkeys(BY_NAME, media), loss=local_tokens),
    )


def _media(config: Config, mesh: Mesh, parts: list[range], *, per_rank: int) -> dict[str, MediaUnits]:
    position, result = 0, {}
    for modality in MODALITIES:
        section = getattr(config, modality.name)
        tokens = modality.unit_tokens(section)
        unit = modality.part("encoder").Encoder.example_unit(section)
        wanted = per_rank * mesh.tp_size * mesh.cp_size if mesh.is_first_chunk(0) else 0
        fitting = min(wanted, (config.tokens_per_micro_batch - position) // (len(MODALITIES) * tokens))
        units = [Unit(0, np.empty(0), 0, position + number * tokens, tokens) for number in range(fitting)]
        position += fitting * tokens

        def decode(dealt: list[Unit], unit=unit) -> list[Tensor]:
            return [torch.zeros_like(unit) for _ in dealt]

        result[modality.name] = media_units(units, parts, mesh=mesh, decode=decode)
    return result


@contextlib.contextmanager
def _fake_world(rank: int, world_size: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device.prepare()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        meshes.leave()


def _rehearsable(config: Config) -> Config:
    """Return `config` with local layers in BF16: see `STANDS_FOR`."""
    training = {"backend": "local"}
    if config.training.precision == "fp8":
        training["precision"] = "bf16"
    return config.model_copy(
        update={
            "training": config.training.model_copy(update=training),
            "parallel": config.parallel.model_copy(update={"tp_comm_overlap": False}),
            "checkpoint": config.checkpoint.model_copy(update={"interval": 0}),
            "run_dir": str(Path(config.run_dir)),
        }
    )


def _additions(config: Config, state: TrainState) -> dict[str, int]:
    result = {}
    if config.parallel.tp_comm_overlap:
        model, tokens = config.model, config.tokens_per_micro_batch // config.parallel.cp
        widest = max(2 * model.ffn_hidden_size // config.parallel.tp, model.hidden_size)
        result["overlap_buffers"] = 2 * tokens * (widest + widest // config.parallel.tp)
    if config.training.precision == "fp8":
        ends, last = config.training.bf16_end_layers, config.model.num_layers
        layers = [layer for chunk in state.chunks for layer in chunk.decoder.layers]
        inner = [layer for layer in layers if ends < layer.layer_number <= last - ends]
        result["fp8_copies"] = 2 * sum(p.numel() for layer in inner for p in layer.parameters() if p.dim() == 2)
    return result
