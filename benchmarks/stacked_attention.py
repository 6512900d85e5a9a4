"""Attention of heads that share their keys, on a CPU in FP32: ours beside torch's scaled_dot_product_attention.

    python benchmarks/stacked_attention.py

Forward and backward pass of documents of one length, of 2,048 positions in all, in every shape below that
`kernels.attention.stacking_pays` takes. Calls are interleaved; times are medians. The bar: the median
of the shapes' ratios at most 0.9, and none above 1.05, which is this measurement's noise.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from verdict import finish

from megatron_mm.kernels.attention import stacked_attention, stacking_pays
from megatron_mm.model.core_attention import torch_sdpa

NUM_TOKENS = 2048
HEADS = ((6, 64), (8, 64), (16, 64), (8, 128), (32, 128), (64, 128))
"""heads, head_dim; one key head."""
LENGTHS = (32, 64, 128, 256, 384, 512)
ROUNDS = 9
BAR = 0.9
WORST = 1.05


def work(attend: Callable[..., Tensor], *, heads: int, head_dim: int, length: int) -> Callable[[], None]:
    """Return a function that attends in every document and takes the gradients."""
    generator = torch.Generator().manual_seed(0)
    positions = NUM_TOKENS // length * length
    shapes = [(positions, count, head_dim) for count in (heads, 1, 1)]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    gradient = torch.randn(shapes[0], generator=generator)

    def run() -> None:
        context = torch.cat([attend(*document) for document in zip(*(leaf.split(length) for leaf in leaves))])
        torch.autograd.grad(context, leaves, gradient)

    return run


def main() -> None:
    """Exit 0 only if ours is the faster one."""
    print(f"{'heads':>6}{'head_dim':>10}{'length':>8}{'ours ms':>10}{'torch ms':>10}{'ratio':>8}")
    rows = []
    for heads, head_dim in HEADS:
        for length in LENGTHS:
            if not stacking_pays(torch.empty(length, heads, head_dim), torch.empty(length, 1, head_dim)):
                continue
            forms = [
                work(form, heads=heads, head_dim=head_dim, length=length) for form in (stacked_attention, torch_sdpa)
            ]
            seconds: list[list[float]] = [[], []]
            for number in range(ROUNDS + 1):
                for place in (0, 1) if number % 2 else (1, 0):
                    started = time.perf_counter()
                    forms[place]()
                    if number:
                        seconds[place].append(time.perf_counter() - started)
            ours, peer = (statistics.median(times) * 1e3 for times in seconds)
            rows.append((ours / peer, ours, peer))
            print(f"{heads:6}{head_dim:10}{length:8}{ours:10.1f}{peer:10.1f}{ours / peer:8.2f}")
    rows.sort()
    print(f"ratios from {rows[0][0]:.2f} to {rows[-1][0]:.2f}; the verdict is of the median shape")
    _, ours, peer = rows[len(rows) // 2]
    finish("stacked_attention", ours=ours, peer=peer, bar=BAR, holds=rows[-1][0] <= WORST)


if __name__ == "__main__":
    main()
