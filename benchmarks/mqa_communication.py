"""Bytes that a decoder layer with one key/value head sends over tensor-parallel ranks, and its time: ours beside stock.

    python benchmarks/mqa_communication.py

Bytes are those of the collectives as they are called, as a ring sends them, per rank: on gloo ranks here (TP 2 and 4,
sequence parallelism on), and at the 88B's real shape (TP 8, 8192 tokens, BF16) on meta tensors over torch's fake
process group. Stock is megatron-core's SelfAttention with its fused QKV weight. Times are medians of interleaved runs.
"""

import copy
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from collectives import count
from torch import Tensor
from verdict import finish

from megatron_mm import config as configs
from megatron_mm.engine import device

BARS = {"attention forward": 0.68, "attention both": 0.725, "layer forward": 0.81, "layer both": 0.84}
"""Ring bytes, ours / stock, at the 88B's shape."""
TIME_BAR = 1.0
ROUNDS = 25
SHAPE_HERE = (
    *("model.num_layers=1", "model.hidden_size=1024", "model.ffn_hidden_size=3328", "model.num_attention_heads=8"),
    *("model.head_dim=128", "data.seq_len=1024", "training.micro_batch_size=1", "parallel.embedding_slot=false"),
    *("parallel.loss_slot=false",),
)
SHAPE_88B = (
    *("model.num_layers=1", "parallel.pp=1", "parallel.vpp=1", "parallel.embedding_slot=false"),
    *("parallel.loss_slot=false", "parallel.tp_comm_overlap=false"),
)


def layers(preset: str, overrides: tuple[str, ...], tp: int) -> dict[str, tuple[Callable, Callable]]:
    """Return {'ours' and 'stock': (attention sublayer, whole layer)}, each a function without arguments."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.spec_utils import build_module

    from megatron_mm.batch import attention_spans
    from megatron_mm.engine import mesh as meshes
    from megatron_mm.model.backend import local
    from megatron_mm.model.decoder import block_submodules, transformer_config
    from megatron_mm.model.layer import PackedDocuments, RMSNorm

    config = configs.load(preset, [*overrides, f"parallel.tp={tp}"])
    meshes.cut(config)
    transformer = transformer_config(config)
    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    # megatron-core's norm without accelerators refuses sequence parallelism.
    stock.submodules.input_layernorm = stock.submodules.pre_mlp_layernorm = RMSNorm
    specs = {"ours": block_submodules(transformer, backend=local(), chunk=0, pp_rank=0).layer_specs[0], "stock": stock}
    num_tokens = config.data.seq_len
    angles = {"ours": torch.randn(2, num_tokens, config.model.head_dim // 2)}
    angles["stock"] = torch.randn(num_tokens, 1, 1, config.model.head_dim)
    mask = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).triu(1)
    documents = PackedDocuments(spans=attention_spans([num_tokens], cp_rank=0, cp_size=1))
    extra = {"ours": {"packed_seq_params": documents, "attention_mask": None}, "stock": {"attention_mask": mask}}
    hidden = torch.randn(num_tokens // tp, 1, config.model.hidden_size, dtype=transformer.params_dtype)
    hidden.requires_grad_()
    as_stock = copy.copy(transformer)
    as_stock.use_te_activation_func = False  # its own gate
    runs = {}
    for name, spec in specs.items():
        settings = transformer if name == "ours" else as_stock
        layer = build_module(spec, config=settings, layer_number=1).to(transformer.params_dtype)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        runs[name] = (
            lambda layer=layer, name=name: layer.self_attention(hidden, rotary_pos_emb=angles[name], **extra[name])[0],
            lambda layer=layer, name=name: layer(hidden, rotary_pos_emb=angles[name], **extra[name])[0],
        )
    return runs


def bytes_of(runs: dict[str, tuple[Callable, Callable]], tp: int) -> dict[str, dict[str, float]]:
    """Return {'ours' and 'stock': {'attention forward': ring bytes, ...}}."""
    found = {}
    for name, (attention, layer) in runs.items():
        found[name] = {}
        for part, run in (("attention", attention), ("layer", layer)):
            ahead, back = count(tp, run)
            found[name] |= {f"{part} forward": ahead, f"{part} both": ahead + back}
    return found


def on_meta(results: multiprocessing.Queue) -> None:
    """Count at the 88B's shape, as rank 0 of 8."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device.use_meta()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with torch.device("meta"):
        results.put(bytes_of(layers("mm_88b", SHAPE_88B, 8), 8))


def on_gloo(rank: int, tp: int, store: str, results: multiprocessing.Queue) -> None:
    """Count and time on real ranks."""
    torch.set_num_threads(1)
    device.prepare(rank, tp)
    dist.init_process_group("gloo", store=dist.FileStore(store, tp), rank=rank, world_size=tp)
    runs = layers("tiny", SHAPE_HERE, tp)
    counted = bytes_of(runs, tp)
    seconds: dict[str, list[float]] = {"ours": [], "stock": []}
    for number in range(ROUNDS + 2):
        for name in sorted(runs, reverse=bool(number % 2)):
            taken = timed(runs[name][1])
            if number >= 2:  # the first ones warm up
                seconds[name].append(taken)
    if rank == 0:
        results.put((counted, {name: statistics.median(values) for name, values in seconds.items()}))
    dist.barrier()
    dist.destroy_process_group()


def timed(run: Callable[[], Tensor]) -> float:
    """Return the seconds of one forward and backward pass, from when all ranks start to when all have ended."""
    dist.barrier()
    started = time.perf_counter()
    output = run()
    output.backward(torch.ones_like(output))
    dist.barrier()
    return time.perf_counter() - started


def start(target: Callable, arguments_of_ranks: list[tuple]) -> object:
    """Run `target` in a process for each tuple of arguments and return what one of them puts into the queue."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(*arguments, results)) for arguments in arguments_of_ranks]
    for process in processes:
        process.start()
    while results.empty() and all(process.exitcode in (None, 0) for process in processes):
        time.sleep(0.1)
    if results.empty():
        raise SystemExit("a rank failed; its error is above")
    found = results.get()
    for process in processes:
        process.join()
    return found


def print_bytes(title: str, counted: dict[str, dict[str, float]], bars: dict[str, float]) -> bool:
    """Print a table of ring bytes and return whether every ratio is within its bar."""
    print(f"\n{title}: ring MB a rank sends for one layer\n{'':20}{'ours':>10}{'stock':>10}{'ratio':>8}{'bar':>8}")
    holds = True
    for part, own in counted["ours"].items():
        ratio = own / counted["stock"][part]
        holds &= ratio <= bars.get(part, 1.0)
        bar = f"{bars.get(part, 1.0):.3f}"
        print(f"{part:20}{own / 1e6:10.2f}{counted['stock'][part] / 1e6:10.2f}{ratio:8.3f}{bar:>8}")
    return holds


def main() -> None:
    """Count, time, print, and exit 0 only if every bar holds."""
    at_scale = start(on_meta, [()])
    holds = print_bytes("88B layer, TP 8, 8192 tokens, BF16", at_scale, BARS)
    for tp in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            counted, seconds = start(on_gloo, [(rank, tp, f"{folder}/store") for rank in range(tp)])
        holds &= print_bytes(f"layer of 1024, TP {tp} over gloo, 1024 tokens, FP32", counted, {})
        ratio = seconds["ours"] / seconds["stock"]
        holds &= ratio <= TIME_BAR
        print(
            f"{'milliseconds':20}{seconds['ours'] * 1e3:10.1f}{seconds['stock'] * 1e3:10.1f}{ratio:8.3f}{TIME_BAR:8.3f}"
        )
    part = "attention both"
    finish("mqa_communication", ours=at_scale["ours"][part], peer=at_scale["stock"][part], bar=BARS[part], holds=holds)


if __name__ == "__main__":
    main()
