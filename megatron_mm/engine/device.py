"""The device that a run is on: CUDA, or a CPU that stands in for it.

megatron-core 0.19.2 speaks to `torch.cuda` by name. Where there is no GPU, `prepare` replaces what it touches, so that
it runs unmodified over gloo: the same code path on a laptop as on a cluster. `patches.PATCHES` lists all of it. This is
the one place that may ask whether there is a GPU.
"""

import os
import resource
import sys

import torch

from megatron_mm.engine import patches

CPU, META = torch.device("cpu"), torch.device("meta")
ACCELERATORS = ("transformer_engine", "apex", "flash_attn", "flash_attn_interface")
"""Optional packages whose kernels run on CUDA only."""
_on_meta = False


def has_gpu() -> bool:
    """Return whether this process sees a CUDA device."""
    return torch.cuda.is_available()


def current() -> torch.device:
    """Return the device that tensors of this rank live on; the meta device after `use_meta`."""
    if _on_meta:
        return META
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else CPU


def backend() -> str:
    """Return the communication backend of the device."""
    return "nccl" if has_gpu() else "gloo"


def prepare(local_rank: int = 0, local_world_size: int = 1) -> torch.device:
    """Make this process ready to train and return its device: pick the rank's GPU, or let the CPU stand in for one.

    Raises RuntimeError where there is no GPU and an accelerator was imported.
    """
    # Kernels then start in the order of their calls, which lets megatron-core overlap tensor-parallel communication.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_gpu():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
        patches.install(current, gpu=True)
    else:
        keep_out_accelerators()
        patches.install(current, gpu=False)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // local_world_size))
    return current()


def name() -> str:
    """Return what kind of device this rank computes on."""
    return torch.cuda.get_device_name() if has_gpu() else "cpu"


def memory_gib() -> float:
    """Return the peak device memory in GiB since start: allocated on a GPU, resident on a CPU."""
    if has_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts kibibytes


def use_meta() -> None:
    """Let this process build models on the meta device, with or without a GPU: nothing holds memory, nothing runs.

    Accelerators may be imported, for their modules exist without a GPU.
    """
    global _on_meta
    _on_meta = True
    patches.install(current, gpu=has_gpu(), meta=True)


def keep_out_accelerators() -> None:
    """Where there is no GPU, let imports of the accelerators fail from now on in this process.

    megatron-core looks for them as it is imported, and would call their kernels on CPU tensors. So commands call this
    before they import it; a process that only imports this package keeps what it has. Raises RuntimeError if one of
    them has been imported already.
    """
    if has_gpu():
        return
    for name in ACCELERATORS:
        if sys.modules.get(name) is not None:
            raise RuntimeError(
                f"{name} was imported, and there is no GPU: megatron-core would call its kernels on CPU tensors. Call "
                "megatron_mm.engine.device.keep_out_accelerators() before megatron-core is imported, in a process that "
                f"does not import {name} itself."
            )
    for name in ACCELERATORS:
        sys.modules[name] = None  # type: ignore[assignment]
