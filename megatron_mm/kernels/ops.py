"""Kernels as torch operators: the reference everywhere, the native form on a GPU where it is built.

Which one runs is decided once, by `select`, and can be forced with training.kernels.
"""

import logging

import torch
from torch import Tensor

from megatron_mm.errors import ConfigError
from megatron_mm.kernels import reference

try:
    from megatron_mm.kernels import _cuda
except ImportError:  # built by setup.py where nvcc is
    _cuda = None

log = logging.getLogger(__name__)
_use_native = False


def select(choice: str, device: torch.device) -> str:
    """Decide which kernels run from now on and return their name: 'native' or 'reference'.

    `choice` is training.kernels. Raises ConfigError if 'native' is asked for and cannot be had.
    """
    global _use_native
    missing = None
    if _cuda is None:
        missing = "the CUDA extension is not built (nvcc was not found when the package was installed)"
    elif device.type != "cuda":
        missing = f"native kernels run on a GPU and this rank is on {device.type}"
    if choice == "native" and missing:
        raise ConfigError(f"training.kernels=native, but {missing}. Use training.kernels=auto.")
    _use_native = choice != "reference" and missing is None
    return "native" if _use_native else "reference"


def assemble_embeddings(tokens: Tensor, *, text_type: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Assemble decoder inputs; see `reference.assemble_embeddings` for shapes and meaning."""
    if _use_native:
        return native_assemble_embeddings(tokens, text_type, features, positions)[0]
    return reference.assemble_embeddings(tokens, text_type=text_type, features=features, positions=positions)


@torch.library.custom_op("megatron_mm::assemble_embeddings", mutates_args=())
def native_assemble_embeddings(
    tokens: Tensor, text_type: Tensor, features: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (decoder inputs, media_row): media_row (num_tokens,) int32 is the feature of each row, -1 for text."""
    assembled = reference.assemble_embeddings(tokens, text_type=text_type, features=features, positions=positions)
    return assembled, _media_rows(tokens, positions)


@torch.library.custom_op("megatron_mm::assemble_embeddings_backward", mutates_args=())
def native_assemble_backward(gradient: Tensor, media_row: Tensor, num_media: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of (token rows, features) from that of the decoder inputs."""
    is_media = media_row >= 0
    features = gradient.new_zeros(num_media, gradient.shape[1])
    features[media_row[is_media].long()] = gradient[is_media]
    return gradient.masked_fill(is_media[:, None], 0.0), features


def _media_rows(tokens: Tensor, positions: Tensor) -> Tensor:
    rows = torch.full((tokens.shape[0],), -1, dtype=torch.int32, device=tokens.device)
    return rows.index_copy(0, positions, torch.arange(positions.numel(), dtype=torch.int32, device=tokens.device))


@native_assemble_embeddings.register_kernel("cuda")
def _(tokens: Tensor, text_type: Tensor, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    tokens, text_type, features = (_packed(tensor, tokens.dtype) for tensor in (tokens, text_type, features))
    media_row = _media_rows(tokens, positions)
    out = torch.empty_like(tokens)
    operands = [tensor.data_ptr() for tensor in (tokens, text_type, features, media_row, out)]
    _check(_cuda.assemble_forward(tokens.dtype == torch.bfloat16, *tokens.shape, *operands, _stream(tokens)))
    return out, media_row


@native_assemble_backward.register_kernel("cuda")
def _(gradient: Tensor, media_row: Tensor, num_media: int) -> tuple[Tensor, Tensor]:
    gradient = _packed(gradient, gradient.dtype)
    tokens, features = torch.empty_like(gradient), gradient.new_empty(num_media, gradient.shape[1])
    operands = [tensor.data_ptr() for tensor in (gradient, media_row, tokens, features)]
    _check(_cuda.assemble_backward(gradient.dtype == torch.bfloat16, *gradient.shape, *operands, _stream(gradient)))
    return tokens, features


@native_assemble_embeddings.register_fake
def _(tokens: Tensor, text_type: Tensor, features: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(tokens), torch.empty(tokens.shape[0], dtype=torch.int32, device=tokens.device)


@native_assemble_backward.register_fake
def _(gradient: Tensor, media_row: Tensor, num_media: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gradient), gradient.new_empty(num_media, gradient.shape[1])


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.num_media = inputs[2].shape[0]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, gradient: Tensor, _media_row_gradient: Tensor) -> tuple:
    tokens, features = native_assemble_backward(gradient, ctx.saved_tensors[0], ctx.num_media)
    return tokens, tokens.float().sum(0).to(gradient.dtype), features, None


native_assemble_embeddings.register_autograd(_backward, setup_context=_save_for_backward)


def _packed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    assert tensor.dtype == dtype and dtype in (torch.float32, torch.bfloat16), (tensor.dtype, dtype)
    return tensor.contiguous()


def _stream(tensor: Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"a CUDA kernel could not be launched: cudaError {error}")
