"""The library of CUDA kernels (csrc/kernels): loaded when a kernel is first asked for, and handed addresses.

Nothing here waits for the GPU.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor

BLOCKS = 256
"""Blocks that share the rows of a backward pass and leave a partial sum each: about two a multiprocessor."""
UNSUPPORTED = -1


@functools.cache
def library() -> ModuleType | None:
    """Return the extension that setup.py builds where nvcc is, None where it is not built."""
    try:
        from megatron_mm.kernels import _cuda
    except ImportError:
        return None
    return _cuda


def launch(name: str, *arguments: Tensor | float | int | None) -> int:
    """Call the launcher `name` on the current stream and return its result; None is a null pointer."""
    stream = torch.cuda.current_stream().cuda_stream
    addresses = [_address(argument) if not isinstance(argument, int | float) else argument for argument in arguments]
    return library().launch(name, *addresses, stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def run(name: str, *arguments: Tensor | float | int | None) -> None:
    """Launch a kernel over contiguous tensors. Raises ValueError for rows or heads that it cannot hold."""
    for argument in arguments:
        assert not isinstance(argument, Tensor) or argument.is_contiguous(), name
    error = launch(name, *arguments)
    if error == UNSUPPORTED:
        raise ValueError(f"{name}: a row or a head is wider than the kernel holds; use training.kernels=fused")
    if error:
        raise RuntimeError(f"{name} could not be launched: cudaError {error}")


def is_bf16(tensor: Tensor) -> bool:
    """Return which of the two types the launchers know: BF16, or else FP32."""
    assert tensor.dtype in (torch.float32, torch.bfloat16), tensor.dtype
    return tensor.dtype == torch.bfloat16


def empty_fp32(*shape: int, like: Tensor) -> Tensor:
    """Return a new FP32 tensor on the same device."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)
