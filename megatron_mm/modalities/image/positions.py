"""Position embeddings of images of another size."""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mm.errors import DataError

log = logging.getLogger(__name__)


def resize_positions(positions: Tensor, *, num_tokens: int, class_token: bool = True) -> Tensor:
    """Return position embeddings for another number of patches: bicubic with antialiasing, as timm does.

    Shapes: positions (1, old_tokens, width), the class token first if there is one; returns (1, num_tokens, width).
    Raises DataError if the patches are no square.
    """
    if positions.shape[1] == num_tokens:
        return positions
    first = int(class_token)
    old, new = (round((count - first) ** 0.5) for count in (positions.shape[1], num_tokens))
    if old * old + first != positions.shape[1]:
        expected = "a class token and a square of patches" if class_token else "a square of patches"
        raise DataError(
            f"{positions.shape[1]} position embeddings are not {expected}, as image.class_token={class_token} has it."
        )
    grid = positions[:, first:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, width, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    log.info("position embeddings resized from %d x %d to %d x %d patches", old, old, new, new)
    resized = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).to(positions.dtype)
    return torch.cat([positions[:, :first], resized], dim=1)
