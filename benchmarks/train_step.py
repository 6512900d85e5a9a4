"""Time and memory of one training step on one CPU process, FP32, text only: ours beside its peers.

    python benchmarks/train_step.py

The same Llama-shaped model, batch, clipping and AdamW three times, each in a process of its own: ours, megatron-core's
GPTModel over the same CPU device layer with its local layer spec, and transformers' Llama (scaled dot-product
attention, fused AdamW). Steps are interleaved; times are medians, memory is the growth of the peak of each process.
"""

import importlib
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from verdict import finish

from megatron_mm.engine import device

ROUNDS = 31
WARM_UP = 5
BAR = 1.0
LR = 1e-4


class Workload(NamedTuple):
    """What every contestant trains."""

    batch: int
    seq_len: int
    vocab: int
    settings: tuple[str, ...]
    """Overrides of the preset tiny: the shape of the decoder, and how it is trained."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """All overrides."""
        return (
            *(f"model.vocab_size={self.vocab}", f"data.seq_len={self.seq_len}", "parallel.loss_slot=false"),
            *(f"training.global_batch_size={self.batch}", f"training.micro_batch_size={self.batch}"),
            *(f"optimizer.lr={LR}", f"optimizer.min_lr={LR}", "schedule.warmup_steps=0"),
            *("image.trainable=false", "audio.trainable=false", "image.pretrained=null", "audio.pretrained=null"),
            *("parallel.embedding_slot=false", *self.settings),
        )

    def tokens_and_labels(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the batch: two tensors (batch, seq_len) on the rank's device."""
        shape = (self.batch, self.seq_len + 1)
        text = torch.randint(self.vocab, shape, generator=torch.Generator().manual_seed(0)).to(device.current())
        return text[:, :-1].contiguous(), text[:, 1:].contiguous()


ON_CPU = Workload(
    batch=4,
    seq_len=512,
    vocab=4096,
    settings=(
        *("model.num_layers=6", "model.hidden_size=384", "model.ffn_hidden_size=1024", "model.num_attention_heads=6"),
        *("model.num_query_groups=1", "model.head_dim=64"),
    ),
)


def start_megatron(work: Workload) -> tuple:
    """Return (config, mesh) of one rank."""
    from megatron_mm import config as configs
    from megatron_mm.engine import mesh as meshes
    from megatron_mm.kernels.select import select

    config = configs.load("tiny", work.overrides)
    mesh = meshes.initialize(config)
    select(config.training.kernels, device.current())
    return config, mesh


def ours(work: Workload) -> Callable[[], float]:
    """Return a function that trains our model one step and returns its loss."""
    from megatron_mm.batch import MediaUnits, MicroBatch, TokenCounts, attention_spans
    from megatron_mm.modalities import BY_NAME
    from megatron_mm.model.loss import by_name
    from megatron_mm.training.state import build_state
    from megatron_mm.training.step import train_step

    state = build_state(*start_megatron(work))
    tokens, labels = (part.flatten() for part in work.tokens_and_labels())
    nothing = torch.empty(0, dtype=torch.int64)
    micro_batch = MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones(tokens.numel()),
        origins=torch.zeros_like(tokens),
        positions=torch.arange(work.seq_len).repeat(work.batch),
        spans=attention_spans([work.seq_len] * work.batch, cp_rank=0, cp_size=1),
        media=dict.fromkeys(BY_NAME, MediaUnits((), 0, 0, nothing, nothing)),
        counts=TokenCounts(text=tokens.numel(), loss=tokens.numel()),
    ).to(device.current())
    return lambda: by_name(train_step(state, [micro_batch]).losses)["loss"]


def gpt_model(work: Workload) -> Callable[[], float]:
    """Return a function that trains megatron-core's GPTModel one step and returns its loss.

    Its layers are TransformerEngine's where those of `work` are, which need no mask.
    """
    config, _ = start_megatron(work)
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.module import Float16Module

    from megatron_mm.model.decoder import transformer_config
    from megatron_mm.training.optimizer import build_optimizer

    transformer = transformer_config(config)
    transformer.perform_initialization = True
    transformer.calculate_per_token_loss = False
    transformer.use_te_activation_func = False
    if config.training.backend == "transformer_engine":
        spec, mask = get_gpt_layer_with_transformer_engine_spec(), None
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        mask = torch.ones(1, 1, work.seq_len, work.seq_len, dtype=torch.bool, device=device.current()).triu(1)
    rope = {"position_embedding_type": "rope", "rotary_base": 500_000}
    model = GPTModel(transformer, spec, work.vocab, work.seq_len, **rope).to(device.current())
    if transformer.bf16:
        model = Float16Module(transformer, model)
    wrapped = DistributedDataParallel(transformer, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer = build_optimizer(config, [wrapped])
    for group in optimizer.param_groups:
        group["lr"] = LR
    transformer.finalize_model_grads_func = finalize_model_grads
    tokens, labels = work.tokens_and_labels()
    positions = torch.arange(work.seq_len, device=device.current()).expand(work.batch, -1)

    def forward_step(_: object, model: torch.nn.Module) -> tuple:
        losses = model(tokens, positions, mask, labels=labels)
        return losses, lambda losses: (losses.mean(), {"loss": losses.detach().mean()})

    def step() -> float:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        (report,) = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=wrapped,
            num_microbatches=1,
            seq_length=work.seq_len,
            micro_batch_size=work.batch,
            forward_only=False,
        )
        optimizer.step()
        return report["loss"].item()

    return step


def llama(work: Workload) -> Callable[[], float]:
    """Return a function that trains transformers' Llama one step and returns its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_mm import config as configs

    model = configs.load("tiny", work.overrides).model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=work.vocab,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=1,
            head_dim=model.head_dim,
            attn_implementation="sdpa",
        )
    ).train()
    optimizer = torch.optim.AdamW(llama.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, labels = work.tokens_and_labels()

    def step() -> float:
        optimizer.zero_grad()
        loss = llama(tokens, shift_labels=labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


CONTESTANTS = {
    "ours": (ours, ON_CPU),
    "megatron-core GPTModel": (gpt_model, ON_CPU),
    "transformers Llama": (llama, ON_CPU),
}
Contestant = tuple[Callable[[Workload], Callable[[], float]], Workload]


def contest(build: Callable[[Workload], Callable[[], float]], work: Workload, pipe: Connection) -> None:
    """Build one contestant, then train a step whenever asked to; answer (seconds, loss, peak MiB)."""
    from megatron_mm.noise import silence

    silence()
    device.keep_out_accelerators()  # before megatron-core is imported
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for module in (
        "megatron.core.models.gpt",
        "transformers.models.llama.modeling_llama",
        "megatron_mm.training.state",
    ):
        importlib.import_module(module)  # so that imports count for no one

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = build(work)
    pipe.send("ready")
    while pipe.recv():
        started = time.perf_counter()
        loss = step()  # waits for the device: it returns a number
        seconds = time.perf_counter() - started
        if device.current().type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        pipe.send((seconds, loss, peak))


def race(contestants: dict[str, Contestant], *, rounds: int, warm_up: int) -> tuple[dict[str, float], dict[str, float]]:
    """Interleave the steps of all contestants, print a table, and return the median seconds and peak MiB of each.

    Ratios are of the first one to each.
    """
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, (build, work) in contestants.items():
        pipes[name], theirs = context.Pipe()
        context.Process(target=contest, args=(build, work, theirs), daemon=True).start()
        theirs.close()
    names = list(contestants)
    for name in names:
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    losses, memory = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for number in range(rounds + warm_up):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            pipes[name].send(True)
            taken, losses[name], memory[name] = pipes[name].recv()
            if number >= warm_up:
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(False)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'':30}{'seconds':>9}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'loss':>8}")
    for name in names:
        ratios = times[names[0]] / times[name], memory[names[0]] / memory[name]
        print(f"{name:30}{times[name]:9.3f}{ratios[0]:8.3f}{memory[name]:10.0f}{ratios[1]:8.3f}{losses[name]:8.3f}")
    return times, memory


def main() -> None:
    """Exit 0 only if ours is the fastest and the smallest."""
    times, memory = race(CONTESTANTS, rounds=ROUNDS, warm_up=WARM_UP)
    peer = min(times[name] for name in times if name != "ours")
    smaller = memory["ours"] <= min(memory.values())
    finish("train_step", ours=times["ours"], peer=peer, bar=BAR, holds=smaller)


if __name__ == "__main__":
    main()
