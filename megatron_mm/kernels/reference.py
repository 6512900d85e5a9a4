"""What each kernel means, in a few lines of torch: the definition that every faster form is tested against."""

from torch import Tensor


def assemble_embeddings(tokens: Tensor, *, text_type: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Return decoder inputs: text rows plus their modality-type embedding, media features over their placeholders.

    Shapes: tokens (num_tokens, hidden), the token embedding of every position; text_type (hidden,); features
    (num_media_tokens, hidden), projected and carrying their own type embedding; positions (num_media_tokens,) int64,
    distinct rows of `tokens`; returns a new (num_tokens, hidden). No communication: a rank assembles the rows it owns.
    """
    return (tokens + text_type).index_copy(0, positions, features)
