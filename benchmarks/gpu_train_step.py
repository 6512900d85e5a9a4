"""Time and memory of one training step on one GPU, BF16, text only: ours beside megatron-core's GPTModel.

    python benchmarks/gpu_train_step.py        (needs 90 GB of GPU memory)

Layers of 4096 with one key/value head and the width of the 88B's MLP, at 8,192 tokens. GPTModel and two of ours run on
TransformerEngine's layers (needed); ours also on the local backend, with the kernels of csrc. All are processes of
their own whose steps are interleaved; times are medians. The bar: the fastest of ours in BF16 is no slower than it.
"""

import sys
from importlib.util import find_spec

from train_step import Workload, gpt_model, ours, race
from verdict import finish

ROUNDS, WARM_UP, BAR = 12, 3, 1.0
SHAPE = (
    *("model.num_layers=4", "model.hidden_size=4096", "model.ffn_hidden_size=13312", "model.num_attention_heads=32"),
    *("model.num_query_groups=1", "model.head_dim=128"),
)


def work(*settings: str) -> Workload:
    """Return one step of 8,192 tokens."""
    return Workload(batch=1, seq_len=8192, vocab=16384, settings=(*SHAPE, *settings))


def main() -> None:
    """Print a table and the verdict."""
    engine, bf16 = "training.backend=transformer_engine", "training.precision=bf16"
    contestants = {"ours, local layers": (ours, work(bf16, "training.backend=local"))}
    if find_spec("transformer_engine"):
        contestants |= {
            "ours, TransformerEngine": (ours, work(bf16, engine)),
            "ours, TransformerEngine, FP8": (ours, work("training.precision=fp8", engine)),
            "megatron-core GPTModel": (gpt_model, work(bf16, engine)),
        }
    times, _ = race(contestants, rounds=ROUNDS, warm_up=WARM_UP)
    if "megatron-core GPTModel" not in times:
        sys.exit("TransformerEngine is not installed: there is no peer at this length, and so no verdict.")
    fastest = min(times["ours, local layers"], times["ours, TransformerEngine"])
    finish("gpu_train_step", ours=fastest, peer=times["megatron-core GPTModel"], bar=BAR)


if __name__ == "__main__":
    main()
