"""Time of each CUDA kernel, forward and backward, beside torch's own operators on the same GPU.

    python benchmarks/gpu_kernels.py

The shapes are those of the 88B at tp=8 with 8,192 tokens. Rounds of both are interleaved; times are medians, with the
bytes that docs/kernels.md counts over the time. The bar: all kernels together take at most half of torch's time.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from verdict import finish

from megatron_mm.kernels import cross_entropy, ops, reference

ROUNDS, WARM_UP, BAR = 20, 3, 0.5
TOKENS, HIDDEN, FFN, HEADS, HEAD_DIM, VOCAB, TP = 8192, 8192, 3328, 8, 128, 6400, 8

Form = Callable[..., Tensor]


def draw(*shape: int) -> Tensor:
    """Return BF16 numbers on the GPU that need a gradient."""
    return torch.randn(*shape, device="cuda").bfloat16().requires_grad_()


def cases() -> dict[str, tuple[float, list[Tensor], Form, Form]]:
    """Return (MB moved forward and backward, inputs, ours, torch's) of each kernel."""
    rows = TOKENS // TP
    weight, positions = draw(HIDDEN), torch.randperm(rows, device="cuda")[: rows // 4]
    cos, sin = torch.rand(2, TOKENS, HEAD_DIM // 2, device="cuda")
    ids, labels = torch.randint(VOCAB * TP, (2, TOKENS), device="cuda")
    norm = {"weight": weight, "epsilon": 1e-5}
    angles = {"cos": cos, "sin": sin}

    def rope(module: object) -> Form:
        return lambda query, key_value: torch.cat(
            [part.flatten() for part in module.mqa_rope(query, key_value=key_value, **angles)]
        )

    def joined(module: object) -> Form:
        return lambda hidden, residual: torch.cat(module.add_rms_norm(hidden, residual=residual, **norm))

    def loss(logits: Tensor) -> Tensor:
        return cross_entropy.vocab_parallel_cross_entropy(
            logits * 1.0, labels=labels % VOCAB, mask=None, z_loss=1e-4, group=None
        )

    def torch_loss(logits: Tensor) -> Tensor:
        return reference.cross_entropy(logits.float() * 1.0, labels=labels % VOCAB, mask=None, z_loss=1e-4)

    return {
        "swiglu": (437, [draw(TOKENS, 2 * FFN)], ops.swiglu, reference.swiglu),
        "rms_norm": (151, [draw(rows, HIDDEN), draw(rows, HIDDEN)], joined(ops), joined(reference)),
        "mqa_rope": (
            *(92, [draw(TOKENS, HEADS, HEAD_DIM), draw(TOKENS, 1, 2, HEAD_DIM)]),
            *(rope(ops), rope(reference)),
        ),
        "assemble": (
            *(84, [draw(rows, HIDDEN), weight, draw(len(positions), HIDDEN)]),
            *(
                lambda tokens, text_type, features, module=module: module.assemble_embeddings(
                    tokens, text_type=text_type, features=features, positions=positions
                )
                for module in (ops, reference)
            ),
        ),
        "token_rows": (
            *(281, [draw(VOCAB, HIDDEN)]),
            *(
                lambda table, module=module: module.token_rows(table, ids=ids, first_id=0)
                for module in (ops, reference)
            ),
        ),
        "cross_entropy": (315, [draw(TOKENS, VOCAB)], loss, torch_loss),
    }


def microseconds(form: Form, inputs: list[Tensor]) -> float:
    """Return the time of one forward and backward pass."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    output = form(*inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))
    stop.record()
    stop.synchronize()
    return 1000 * start.elapsed_time(stop)


def main() -> None:
    """Print a table and the verdict."""
    ops.select("native", torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()} | {'kernel':14} {'ours us':>9} {'torch us':>9} {'GB/s':>7}")
    totals = [0.0, 0.0]
    for name, (megabytes, inputs, *forms) in cases().items():
        times: tuple[list[float], list[float]] = ([], [])
        for round_number in range(WARM_UP + ROUNDS):
            for form, found in zip(forms, times):
                found += [microseconds(form, inputs)] if round_number >= WARM_UP else []
        ours, theirs = (statistics.median(found) for found in times)
        print(f"{name:14} {ours:9.0f} {theirs:9.0f} {1000 * megabytes / ours:7.0f}")
        totals = [totals[0] + ours, totals[1] + theirs]
    finish("gpu_kernels", ours=totals[0], peer=totals[1], bar=BAR)


if __name__ == "__main__":
    main()
