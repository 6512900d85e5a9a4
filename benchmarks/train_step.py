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

import torch
from verdict import finish

ROUNDS = 15
WARM_UP = 2
BAR = 1.0
BATCH, SEQ_LEN, VOCAB = 4, 512, 4096
SETTINGS = (
    *("model.num_layers=6", "model.hidden_size=384", "model.ffn_hidden_size=1024", "model.num_attention_heads=6"),
    *("model.num_query_groups=1", "model.head_dim=64", f"model.vocab_size={VOCAB}", f"data.seq_len={SEQ_LEN}"),
    *(f"training.global_batch_size={BATCH}", f"training.micro_batch_size={BATCH}", "parallel.loss_slot=false"),
    *("parallel.embedding_slot=false", "vision.trainable=false", "audio.trainable=false"),
)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, labels), each (BATCH, SEQ_LEN)."""
    text = torch.randint(VOCAB, (BATCH, SEQ_LEN + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def start_megatron() -> tuple:
    """Return (config, mesh) of one CPU rank."""
    from megatron_mm import config as configs
    from megatron_mm.parallel import mesh as meshes

    config = configs.load("tiny", SETTINGS)
    return config, meshes.initialize(config)


def ours() -> Callable[[], float]:
    """Return a function that trains our model one step and returns its loss."""
    from megatron_mm.batch import MediaUnits, MicroBatch, attention_spans
    from megatron_mm.model.loss import by_name
    from megatron_mm.training.state import build_state
    from megatron_mm.training.step import train_step

    state = build_state(*start_megatron())
    tokens, labels = (part.flatten() for part in batch())
    nothing = torch.empty(0, dtype=torch.int64)
    micro_batch = MicroBatch(
        tokens=tokens,
        labels=labels,
        loss_mask=torch.ones(tokens.numel()),
        sources=torch.zeros_like(tokens),
        positions=torch.arange(SEQ_LEN).repeat(BATCH),
        spans=attention_spans([SEQ_LEN] * BATCH, cp_rank=0, cp_size=1),
        images=MediaUnits((), 0, nothing, nothing),
        audio=MediaUnits((), 0, nothing, nothing),
    )
    return lambda: by_name(train_step(state, [micro_batch]).losses)["loss"]


def gpt_model() -> Callable[[], float]:
    """Return a function that trains megatron-core's GPTModel one step and returns its loss."""
    config, _ = start_megatron()
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_mm.model.decoder import transformer_config
    from megatron_mm.training.optimizer import build_optimizer

    transformer = transformer_config(config)
    transformer.perform_initialization = True
    transformer.calculate_per_token_loss = False
    transformer.use_te_activation_func = False
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(transformer, spec, VOCAB, SEQ_LEN, position_embedding_type="rope", rotary_base=500_000)
    wrapped = DistributedDataParallel(transformer, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    optimizer = build_optimizer(config, [wrapped])
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    transformer.finalize_model_grads_func = finalize_model_grads
    tokens, labels = batch()
    positions = torch.arange(SEQ_LEN).expand(BATCH, -1)
    mask = torch.ones(1, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)

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
            seq_length=SEQ_LEN,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        optimizer.step()
        return report["loss"].item()

    return step


def llama() -> Callable[[], float]:
    """Return a function that trains transformers' Llama one step and returns its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_mm import config as configs

    model = configs.load("tiny", SETTINGS).model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=1,
            head_dim=model.head_dim,
            attn_implementation="sdpa",
        )
    ).train()
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens, labels = batch()

    def step() -> float:
        optimizer.zero_grad()
        loss = llama(tokens, shift_labels=labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


CONTESTANTS = {"ours": ours, "megatron-core GPTModel": gpt_model, "transformers Llama": llama}


def contest(name: str, pipe: Connection) -> None:
    """Build one contestant, then train a step whenever asked to; answer (seconds, loss, peak MiB since before)."""
    from megatron_mm.noise import silence

    silence()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for module in (
        "megatron.core.models.gpt",
        "transformers.models.llama.modeling_llama",
        "megatron_mm.training.state",
    ):
        importlib.import_module(module)  # so that imports count for no one

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = CONTESTANTS[name]()
    pipe.send("ready")
    while pipe.recv():
        started = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - started
        pipe.send((seconds, loss, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def main() -> None:
    """Interleave the steps of all contestants and exit 0 only if ours is the fastest and the smallest."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in CONTESTANTS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=contest, args=(name, theirs), daemon=True).start()
        theirs.close()
        pipes[name].recv()
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    losses, memory = dict.fromkeys(CONTESTANTS, 0.0), dict.fromkeys(CONTESTANTS, 0.0)
    names = list(CONTESTANTS)
    for number in range(ROUNDS + WARM_UP):
        for name in names[number % 3 :] + names[: number % 3]:
            pipes[name].send(True)
            taken, losses[name], memory[name] = pipes[name].recv()
            if number >= WARM_UP:
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(False)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'':26}{'seconds':>9}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'loss':>8}")
    for name in names:
        ratios = times["ours"] / times[name], memory["ours"] / memory[name]
        print(f"{name:26}{times[name]:9.3f}{ratios[0]:8.3f}{memory[name]:10.0f}{ratios[1]:8.3f}{losses[name]:8.3f}")
    peer = min(times[name] for name in names[1:])
    smaller = memory["ours"] <= min(memory[name] for name in names[1:])
    finish("train_step", ours=times["ours"], peer=peer, bar=BAR, holds=smaller)


if __name__ == "__main__":
    main()
