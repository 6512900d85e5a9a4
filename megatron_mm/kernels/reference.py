"""What each kernel means, in a few lines of torch: the definition that every faster form is tested against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def assemble_embeddings(tokens: Tensor, *, text_type: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Return decoder inputs: text rows plus their modality-type embedding, media features over their placeholders.

    Shapes: tokens (num_tokens, hidden), the token embedding of every position; text_type (hidden,); features
    (num_media_tokens, hidden), projected and carrying their own type embedding; positions (num_media_tokens,) int64,
    distinct rows of `tokens`; returns a new (num_tokens, hidden). No communication: a rank assembles the rows it owns.
    """
    return (tokens + text_type).index_copy(0, positions, features)


def rotate(heads: Tensor, *, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `heads` turned by the angle of each position: rotary embedding, non-interleaved (Su et al. 2021; Llama).

    Shapes: heads (num_tokens, num_heads, head_dim); cos, sin (num_tokens, 1, head_dim/2); returns the shape of heads.
    """
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def swiglu(gate_and_up: Tensor) -> Tensor:
    """Return silu(gate) * up (Shazeer 2020).

    Shapes: gate_and_up (..., 2 ffn_hidden), the gate first; returns (..., ffn_hidden).
    """
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.silu(gate) * up
