"""Time of each CUDA kernel, forward and backward, beside torch's own operators on the same GPU, plain and compiled.

    python benchmarks/gpu_kernels.py

The shapes are those of the 88B at tp=8 with 8,192 tokens, BF16. Each contestant is captured in a CUDA graph, so that
only the GPU's time counts; replays are interleaved and times are medians. GB/s are the bytes that docs/kernels.md
counts over the time. The peer is `torch.compile` of the reference. The bar: all kernels together take no longer.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from verdict import finish

from megatron_mm.kernels import cross_entropy as ce
from megatron_mm.kernels.embedding import (
    assemble_embeddings,
    assemble_embeddings_reference,
    token_rows,
    token_rows_reference,
)
from megatron_mm.kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from megatron_mm.kernels.rope import mqa_rope, mqa_rope_reference
from megatron_mm.kernels.select import select
from megatron_mm.kernels.swiglu import swiglu, swiglu_reference

ROUNDS, WARM_UP, BAR = 30, 5, 1.0
TOKENS, HIDDEN, FFN, HEADS, HEAD_DIM, VOCAB, TP = 8192, 8192, 3328, 8, 128, 6400, 8

Form = Callable[..., "Tensor | tuple[Tensor, ...]"]


class Case(NamedTuple):
    """A kernel, and what torch has for it."""

    megabytes: float
    """Moved by the kernel, forward and backward."""
    inputs: Sequence[Tensor]
    kernel: Form | None
    """Differentiable; None for cross-entropy, which writes its gradient over the logits."""
    plain: Form


def draw(*shape: int) -> Tensor:
    """Return BF16 numbers on the GPU that need a gradient."""
    return torch.randn(*shape, device="cuda").bfloat16().requires_grad_()


def cases() -> dict[str, Case]:
    """Return every kernel."""
    rows = TOKENS // TP
    weight, positions = draw(HIDDEN), torch.randperm(rows, device="cuda")[: rows // 4]
    cos, sin = torch.rand(2, TOKENS, HEAD_DIM // 2, device="cuda")
    ids = torch.randint(VOCAB * TP, (TOKENS,), device="cuda")

    def norm(form: Form) -> Form:
        return lambda hidden, residual: form(hidden, residual=residual, weight=weight, epsilon=1e-5)

    def rope(form: Form) -> Form:
        return lambda query, key_value: form(query, key_value=key_value, cos=cos, sin=sin)

    def assemble(form: Form) -> Form:
        return lambda tokens, text_type, features: form(
            tokens, text_type=text_type, features=features, positions=positions
        )

    def rows_of(form: Form) -> Form:
        return lambda table: form(table, ids=ids, first_id=0)

    def loss(logits: Tensor) -> Tensor:
        return ce.cross_entropy_reference(logits.float(), labels=ids % VOCAB, mask=None, z_loss=1e-4)

    key_value, vectors = draw(TOKENS, 1, 2, HEAD_DIM), [draw(rows, HIDDEN) for _ in range(3)]
    return {
        "swiglu": Case(437, [draw(TOKENS, 2 * FFN)], swiglu, swiglu_reference),
        "add_rms_norm": Case(151, vectors[:2], norm(add_rms_norm), norm(add_rms_norm_reference)),
        "mqa_rope": Case(92, [draw(TOKENS, HEADS, HEAD_DIM), key_value], rope(mqa_rope), rope(mqa_rope_reference)),
        "assemble": Case(
            *(84, [vectors[2], weight, draw(len(positions), HIDDEN)]),
            *(assemble(assemble_embeddings), assemble(assemble_embeddings_reference)),
        ),
        "token_rows": Case(281, [draw(VOCAB, HIDDEN)], rows_of(token_rows), rows_of(token_rows_reference)),
        "cross_entropy": Case(315, [draw(TOKENS, VOCAB)], None, loss),
    }


def trained(form: Form, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """Return a forward and backward pass."""
    outputs = form(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.randn_like(output) for output in outputs]

    def run() -> object:
        found = form(*inputs)
        return torch.autograd.grad(found, inputs, weights if isinstance(found, tuple) else weights[0])

    return run


def cross_entropy(logits: Tensor) -> Callable[[], object]:
    """Return the passes of the kernels of cross-entropy over logits of one rank."""
    labels = torch.randint(VOCAB, (TOKENS,), device="cuda")
    written, gradient = logits.detach().clone(), torch.rand(2, TOKENS, device="cuda")

    def run() -> object:
        statistics_ = ce.cross_entropy_statistics(written, labels, None, 0)
        losses, log_z = ce.cross_entropy_combine(statistics_.unsqueeze(0), None, 1e-4)
        ce.cross_entropy_backward(written, gradient, labels, None, log_z, 0, 1e-4)
        return losses

    return run


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Return `run` as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    """Return the time of one replay."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    stop.record()
    stop.synchronize()
    return 1000 * start.elapsed_time(stop)


def main() -> None:
    """Print a table and the verdict."""
    select("native", torch.device("cuda"))
    print(f"{torch.cuda.get_device_name():20}{'ours us':>9}{'compiled us':>13}{'torch us':>10}{'GB/s of ours':>14}")
    totals = [0.0, 0.0, 0.0]
    for name, case in cases().items():
        forms = (case.kernel, torch.compile(case.plain), case.plain)
        runs = [trained(form, case.inputs) if form else cross_entropy(*case.inputs) for form in forms]
        graphs = [captured(run) for run in runs]
        times: list[list[float]] = [[], [], []]
        for round_number in range(WARM_UP + ROUNDS):
            for graph, found in zip(graphs, times):
                found += [microseconds(graph)] if round_number >= WARM_UP else []
        medians = [statistics.median(found) for found in times]
        print(
            f"{name:20}{medians[0]:9.0f}{medians[1]:13.0f}{medians[2]:10.0f}{1000 * case.megabytes / medians[0]:14.0f}"
        )
        totals = [total + median for total, median in zip(totals, medians)]
    print(f"{'all':20}{totals[0]:9.0f}{totals[1]:13.0f}{totals[2]:10.0f}")
    finish("gpu_kernels", ours=totals[0], peer=totals[1], bar=BAR)


if __name__ == "__main__":
    main()
