"""The device that a run is on: CUDA, or a CPU that stands in for it.

megatron-core 0.19.2 speaks to `torch.cuda` by name. `install` replaces what it touches, and only where there is no GPU,
so that it runs unmodified over gloo: the same code path on a laptop as on a cluster. `REPLACED` lists all of it. This
is the one place that may ask whether there is a GPU.
"""

import logging
import os
import resource
import sys
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch.utils._device import _device_constructors

log = logging.getLogger(__name__)

MEGATRON_CORE = "0.19.2"
"""The version whose use of `torch.cuda` the stand-ins were traced against."""

CPU, META = torch.device("cpu"), torch.device("meta")
ACCELERATORS = ("transformer_engine", "apex", "flash_attn", "flash_attn_interface")
"""Optional packages whose kernels run on CUDA only."""
REPLACED = {
    "torch.cuda.current_device": "device= arguments",
    "torch.cuda.current_stream": "DistributedDataParallel's gradient buffers",
    "torch.cuda.synchronize": "pipeline communication, asynchronous checkpoints",
    "torch.cuda.get_rng_state": "the tensor-parallel RNG tracker and recomputation",
    "torch.cuda.random.get_rng_state": "the same, by its other name",
    "torch.cuda.set_rng_state": "the same",
    "torch.cuda.random.set_rng_state": "the same, by its other name",
    "torch.cuda.manual_seed": "the RNG tracker's seeds",
    "torch.cuda._lazy_call": "the RNG tracker",
    "torch.cuda.default_generators": "the RNG tracker",
    "torch.tensor": "device='cuda' literals",
    "torch.zeros": "device='cuda' literals, pinned buffers",
    "torch.ones": "device='cuda' literals",
    "torch.Tensor.type": "'torch.cuda.*Tensor' dtype checks of the optimizer",
    "torch.Tensor.cuda": "the distributed optimizer, rotary embedding",
}
"""What `install` replaces, and who in megatron-core needs it."""
_on_meta = False


class _Stream:
    """A CUDA stream's interface on a device that runs everything in order."""

    device = CPU

    def wait_stream(self, stream: "_Stream") -> None: ...

    def synchronize(self) -> None: ...


class _Generators:
    """`torch.cuda.default_generators`: every index is the one CPU generator."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


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
    """Make this process ready to train and return its device: pick the rank's GPU, or install the CPU stand-ins."""
    # Kernels then start in the order of their calls, which lets megatron-core overlap tensor-parallel communication.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_gpu():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    else:
        install()
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
    if not has_gpu():
        install(keep_out=())
    torch.cuda.current_device = lambda: META


def keep_out_accelerators() -> None:
    """Where there is no GPU, let imports of the accelerators fail from now on.

    megatron-core looks for them as it is imported, and would call their kernels on CPU tensors. One that has been
    imported is left alone.
    """
    if any(find_spec(name) for name in ACCELERATORS if name not in sys.modules) and not has_gpu():
        for name in ACCELERATORS:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def install(keep_out: tuple[str, ...] = ACCELERATORS) -> None:
    """Let megatron-core run on this CPU; a second call changes nothing.

    Imports of the packages `keep_out` fail from now on: megatron-core would call their kernels on CPU tensors. Raises
    RuntimeError where a GPU is present, where megatron-core is another version than the one traced, or where one of
    them has been imported already.
    """
    if isinstance(torch.cuda.default_generators, _Generators):
        return
    if has_gpu():
        raise RuntimeError(
            "a GPU is present: the CPU stand-ins would hide it. Set CUDA_VISIBLE_DEVICES= to use the CPU."
        )
    if version("megatron-core") != MEGATRON_CORE:
        raise RuntimeError(
            f"megatron-core {version('megatron-core')} is installed; the CPU stand-ins were made for {MEGATRON_CORE}. "
            "Install that version."
        )
    for name in keep_out:
        if sys.modules.get(name) is not None:
            raise RuntimeError(
                f"{name} was imported, and there is no GPU: import megatron_mm.engine before megatron-core."
            )
        sys.modules[name] = None  # type: ignore[assignment]
    _replace_cuda()
    _replace_factories()
    _replace_tensor_methods()
    # megatron-core binds this name when it is imported, which may have happened before.
    random = sys.modules.get("megatron.core.tensor_parallel.random")
    if random is not None:
        random._lazy_call = torch.cuda._lazy_call
    log.debug("no GPU: megatron-core runs on the CPU (%d names of torch replaced)", len(REPLACED))


def _replace_cuda() -> None:
    cuda = torch.cuda
    stream = _Stream()
    cuda.current_device = lambda: CPU
    cuda.current_stream = lambda device=None: stream
    cuda.synchronize = lambda device=None: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda._lazy_call = lambda callback, **kwargs: callback()
    cuda.default_generators = _Generators()


def _is_cuda(device: object) -> bool:
    return isinstance(device, str) and device.startswith("cuda")


def _replace_factories() -> None:
    # `with torch.device(...)` knows factories by identity, from a set that it makes at its first use: now.
    _device_constructors()
    for name in ("tensor", "zeros", "ones"):
        original = getattr(torch, name)

        def factory(*args, _original=original, **kwargs):
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return _original(*args, **kwargs)

        setattr(torch, name, factory)


def _replace_tensor_methods() -> None:
    original_type = torch.Tensor.type

    def cuda_type(self, dtype=None, *args, **kwargs):
        result = original_type(self, dtype, *args, **kwargs)
        # Only megatron-core's checks compare with 'torch.cuda.FloatTensor'; others keep the true name.
        if dtype is None and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = cuda_type
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
