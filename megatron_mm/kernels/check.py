"""A check of the native kernels before they train anything: each against its plain form, where it will run.

What a driver, a compiler or a GPU does wrong is then an error at start-up, not a loss curve.
"""

from types import ModuleType

import torch
from torch import Tensor

from megatron_mm.kernels import native, plain

TOKENS, HEADS, HEAD_DIM, COLUMNS, VOCAB = 24, 4, 16, 64, 40
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
"""Of the error, as a part of the element plus the tensor's root mean square: wide, since a fault is far greater."""
EPSILON = 1e-5


def disagreements(device: torch.device) -> list[str]:
    """Return the kernels, with their types, whose results on `device` are not those of `plain`, and how."""
    found = []
    for dtype in BOUND:
        for name, case in _cases(dtype).items():
            placed = [part.to(device) if isinstance(part, Tensor) else part for part in case]
            try:
                error = _error(_results(native, name, placed), _results(plain, name, placed))
            except (RuntimeError, ValueError) as failure:
                found.append(f"{name} ({dtype}): {failure}")
                continue
            if not error <= BOUND[dtype]:  # nan as well
                found.append(f"{name} ({dtype}): off by {error:.1e}")
    return found


def _results(kernels: ModuleType, name: str, arguments: list) -> list[Tensor]:
    """Return what the kernel returns, or what it writes over its first argument."""
    first, *others = arguments
    first = first.clone()
    result = getattr(kernels, name)(first, *others)
    result = first if result is None else result
    return list(result) if isinstance(result, tuple) else [result]


def _error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    worst = 0.0
    for found, expected in zip(ours, theirs, strict=True):
        if expected.numel():
            expected = expected.float()
            scale = expected.abs() + expected.square().mean().sqrt()
            worst = max(worst, ((found.float() - expected).abs() / scale.clamp(min=1e-30)).max().item())
    return worst


def _cases(dtype: torch.dtype) -> dict[str, tuple]:
    """Return arguments of every kernel, forward and backward."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    rows, weight = draw(TOKENS, COLUMNS), draw(COLUMNS)
    media_row = torch.full((TOKENS,), -1, dtype=torch.int32)
    media_row[3:9] = torch.tensor([4, 0, 5, 1, 3, 2], dtype=torch.int32)
    ids = torch.randint(2 * VOCAB, (TOKENS,), generator=generator)
    mask = (torch.arange(TOKENS) % 5 != 1).float()
    query, key, value = draw(TOKENS, HEADS, HEAD_DIM), draw(TOKENS, 1, HEAD_DIM), draw(TOKENS, 1, HEAD_DIM)
    key_value, norms = torch.stack([key, value], dim=2), (draw(HEAD_DIM), draw(HEAD_DIM), EPSILON)
    angles = torch.outer(torch.arange(TOKENS), torch.linspace(1, 0.1, HEAD_DIM // 2))
    turn = angles.cos(), angles.sin()
    logits, log_z = draw(TOKENS, VOCAB), 5.0 + draw(TOKENS, dtype=torch.float32).abs()
    losses_gradient = draw(2, TOKENS, dtype=torch.float32)
    return {
        "assemble_forward": (rows, weight, draw(6, COLUMNS), media_row),
        "assemble_backward": (rows, media_row, 6),
        "token_rows": (draw(VOCAB, COLUMNS), ids, VOCAB),
        "token_rows_backward": (rows, ids, VOCAB, VOCAB),
        "swiglu": (rows,),
        "swiglu_backward": (draw(TOKENS, COLUMNS // 2), rows),
        "rms_norm": (rows, draw(TOKENS, COLUMNS), weight, EPSILON),
        "rms_norm_backward": (draw(TOKENS, COLUMNS), rows, rows, weight, draw(TOKENS, dtype=torch.float32).abs()),
        "mqa_rope": (query, key_value, *turn, *norms),
        "mqa_rope_backward": (query, key, value, query, key_value, *turn, *norms),
        "cross_entropy_statistics": (logits, ids, mask, VOCAB),
        "cross_entropy_combine": (draw(2, 3, TOKENS, dtype=torch.float32).abs(), mask, 1e-2),
        "cross_entropy_backward": (logits, losses_gradient, ids, mask, log_z, VOCAB, 1e-2),
    }
