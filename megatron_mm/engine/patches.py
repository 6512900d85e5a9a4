"""Every name of torch and megatron-core that is replaced, in one table; nothing else in the package assigns to one.

`install` replaces at start-up what PATCHES says is needed there. What a rehearsal, a save or the loading of a
checkpoint needs is replaced by the function of that name below. The order of calls does not matter, and importing this
module replaces nothing. docs/patches.md shows the table.
"""

import contextlib
import logging
import pickle
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._device import _device_constructors

from megatron_mm.engine.gradient_fusion import FusedWeightGradient
from megatron_mm.errors import DataError
from megatron_mm.retry import retrying

log = logging.getLogger(__name__)

MEGATRON_CORE, TORCH = "megatron-core 0.19.2", "torch 2.14.1"
"""The versions that the patches were traced against."""
CPU = torch.device("cpu")
NOT_REPORTED = "not reported"
EXCHANGES = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list")
"""By what megatron-core and torch exchange objects while they plan a save."""
BUCKET_GROUP = "megatron.core.distributed.param_and_grad_buffer._ParamAndGradBucketGroup"


class When(StrEnum):
    """When a patch is in place."""

    ALWAYS = "always"
    CPU = "where a CPU stands in for CUDA"
    NO_CURRENT_GPU = "where a CPU stands in for CUDA, and where models are built on the meta device"
    NO_APEX = "where apex is not installed"
    REHEARSAL = "during a rehearsal"
    SAVING = "while a save is planned"
    LOADING = "while a checkpoint is loaded"


@dataclass(frozen=True)
class Patch:
    """Names that are replaced for one reason."""

    replaces: Mapping[str, Callable[..., Any]]
    """By dotted name, what makes its replacement of the original (and of the arguments of the function that asks)."""
    reason: str
    when: When
    traced: str
    """The version whose need of it was traced."""
    upstream: str
    """The report of it, or that there is none."""

    @property
    def name(self) -> str:
        """The first of the names."""
        return next(iter(self.replaces))


class _Stream:
    """A CUDA stream's interface on a device that runs everything in order."""

    device = CPU

    def wait_stream(self, stream: "_Stream") -> None: ...

    def synchronize(self) -> None: ...


class _Generators:
    """`torch.cuda.default_generators`: every index is the one CPU generator."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _always(value: Any) -> Callable[..., Any]:
    """Return what replaces any original by `value`."""
    return lambda original, *arguments: value


def _argument(original: Any, argument: Any) -> Any:
    """Replace a name by the argument of the function that installs it."""
    return argument


def _factory_on_cpu(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # `with torch.device(...)` knows factories by identity, from a set that it makes at its first use: now.
    _device_constructors()

    def factory(*args, **kwargs):
        device = kwargs.get("device")
        if isinstance(device, str) and device.startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    return factory


def _type_of_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    def cuda_type(self, dtype=None, *args, **kwargs):
        result = original(self, dtype, *args, **kwargs)
        # Only megatron-core's checks compare with 'torch.cuda.FloatTensor'; others keep the true name.
        if dtype is None and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron.core"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return cuda_type


def _gradient_sync(original: Callable[..., None]) -> Callable[..., None]:
    def start_grad_sync(group: Any, force_all_reduce: bool = False) -> None:
        look = getattr(group, "look_before_reduction", None)
        if look is not None:
            look()
        if not getattr(group, "exchanges_nothing", False):
            original(group, force_all_reduce=force_all_reduce)

    return start_grad_sync


def _parameter_sync(original: Callable[..., None]) -> Callable[..., None]:
    def start_param_sync(group: Any, force_sync: bool = False) -> None:
        if not getattr(group, "exchanges_nothing", False):
            original(group, force_sync=force_sync)

    return start_param_sync


def _draw_nothing(*args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
    """Stand for a fork of the random state: nothing in the model draws."""
    return contextlib.nullcontext()


def _apply_to_fake(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what `module.to` and its kin do, tensor by tensor."""
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        tensor.data = function(tensor.data)
    return module


def _everyone_says_the_same(everywhere: list, own: object, group: dist.ProcessGroup | None = None) -> None:
    """Answer for ranks that do not exist: they hold what this one holds, of sharded tensors their own replica."""
    from megatron.core.dist_checkpointing import ShardedTensor

    is_sharded = isinstance(own, list) and all(isinstance(part, ShardedTensor) for part in own)
    for rank in range(len(everywhere)):
        # The last number of a replica's id is that among dp_cp.
        everywhere[rank] = (
            [replace(part, replica_id=(*part.replica_id[:-1], rank)) for part in own] if is_sharded else own
        )


def _agreed_first(original: Callable[..., Any], agree: Callable[[], None]) -> Callable[..., Any]:
    def exchange(*args: Any, **kwargs: Any) -> Any:
        agree()
        return original(*args, **kwargs)

    return exchange


def _norm_of_fakes(chunk: int, flag: Tensor, lists: list[list[Tensor]], *args: bool) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors without looking at a value."""
    return torch.stack([torch.norm(tensor) for tensor in lists[0]]).norm().unsqueeze(0), torch.zeros(1)


def _restricted_pickle(original: Any, path: Path, unpickler: type[pickle.Unpickler]) -> SimpleNamespace:
    return SimpleNamespace(load=lambda file: unpickler(file).load())


def _plain_load_bytes(original: Any, path: Path, unpickler: type[pickle.Unpickler]) -> Callable[..., None]:
    from torch.distributed.checkpoint._nested_dict import set_element

    def load_bytes(planner: Any, item: Any, value: BytesIO) -> None:
        name = item.dest_index.fqn
        try:
            loaded = torch.load(value, weights_only=True)
        except Exception as error:  # a damaged pickle may raise anything
            raise DataError(f"{path}: {name} is not plain data, so it is not opened: {error}") from error
        if planner.flatten_state_dict:
            set_element(planner.original_state_dict, planner.mappings[name], loaded)
        else:
            planner.state_dict[name] = loaded

    return load_bytes


def _read_again(original: Callable[..., Any], path: Path, unpickler: type[pickle.Unpickler]) -> Callable[..., Any]:
    def read_data(reader: Any, plan: Any, planner: Any) -> Any:
        return retrying(lambda: original(reader, plan, planner), what=path, ours=True)

    return read_data


PATCHES: tuple[Patch, ...] = (
    Patch(
        {"torch.cuda.current_device": _argument},
        "megatron-core makes its tensors on the current CUDA device, whatever device the model is on",
        When.NO_CURRENT_GPU,
        MEGATRON_CORE,
        "https://github.com/NVIDIA/Megatron-LM/pull/6270 (of some of the places)",
    ),
    Patch(
        {"torch.cuda.current_stream": _always(lambda device=None: _Stream())},
        "data parallelism asks for the stream that computes gradients before it reduces them",
        When.CPU,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {"torch.cuda.synchronize": _always(lambda device=None: None)},
        "communication between pipeline stages waits for the GPU",
        When.CPU,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {
            "torch.cuda.get_rng_state": _always(lambda device="cuda": torch.get_rng_state()),
            "torch.cuda.random.get_rng_state": _always(lambda device="cuda": torch.get_rng_state()),
            "torch.cuda.set_rng_state": _always(lambda state, device="cuda": torch.set_rng_state(state)),
            "torch.cuda.random.set_rng_state": _always(lambda state, device="cuda": torch.set_rng_state(state)),
            "torch.cuda.default_generators": _always(_Generators()),
        },
        "the tensor-parallel random states and recomputation keep and set CUDA's random state",
        When.CPU,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {"torch.cuda.manual_seed": _always(lambda seed: torch.default_generator.manual_seed(seed))},
        "each tensor-parallel random state starts from a seed of CUDA's generator",
        When.CPU,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {
            "torch.cuda._lazy_call": _always(lambda callback, **kwargs: callback()),
            "megatron.core.tensor_parallel.random._lazy_call": _always(lambda callback, **kwargs: callback()),
        },
        "what sets a random state waits in a queue until CUDA is initialized, which it never is",
        When.CPU,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {"torch.tensor": _factory_on_cpu, "torch.zeros": _factory_on_cpu, "torch.ones": _factory_on_cpu},
        "schedules, gradient norms and loss scales are made on device 'cuda', by that name, or in pinned memory",
        When.CPU,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {"torch.Tensor.type": _type_of_cuda},
        "optimizers take parameters of type 'torch.cuda.FloatTensor' and its kin, and refuse others",
        When.CPU,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {
            "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda": _always(FusedWeightGradient),
            "megatron.core.tensor_parallel.layers._grad_accum_fusion_available": _always(True),
        },
        "linear layers add weight gradients to the FP32 buffer in place through a CUDA module of apex alone",
        When.NO_APEX,
        MEGATRON_CORE,
        "https://github.com/NVIDIA/Megatron-LM/issues/1885",
    ),
    Patch(
        {f"{BUCKET_GROUP}.start_grad_sync": _gradient_sync, f"{BUCKET_GROUP}.start_param_sync": _parameter_sync},
        "a group of one rank copies its gradients and parameters to itself, and nothing can look at a rank's own "
        "gradients before they are reduced",
        When.ALWAYS,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {"megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue": _always("unused")},
        "planning a save starts an interpreter that holds a queue, which no save here uses",
        When.SAVING,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {"megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork": _always(_draw_nothing)},
        "a fork copies and compares random states, which would be counted as work of the step",
        When.REHEARSAL,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {"torch.nn.Module._apply": _always(_apply_to_fake)},
        "conversions of a module swap its tensors, which fake ones refuse",
        When.REHEARSAL,
        TORCH,
        "https://github.com/pytorch/pytorch/pull/184976",
    ),
    Patch(
        {"torch.distributed.all_gather_object": _always(_everyone_says_the_same)},
        "the fake backend leaves what other ranks would say unset, and megatron-core plans a save with it",
        When.REHEARSAL,
        TORCH,
        NOT_REPORTED,
    ),
    Patch(
        {f"torch.distributed.{name}": _agreed_first for name in EXCHANGES},
        "a rank on which planning a save fails leaves the others waiting in the next exchange",
        When.SAVING,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {"megatron.core.optimizer.clip_grads.l2_norm_impl": _always(_norm_of_fakes)},
        "the gradient norm is made of a list of numbers, which fake tensors have not",
        When.REHEARSAL,
        MEGATRON_CORE,
        NOT_REPORTED,
    ),
    Patch(
        {"torch.distributed.checkpoint.filesystem.pickle": _restricted_pickle},
        "reading the index of a checkpoint runs whatever code it names",
        When.LOADING,
        TORCH,
        "https://github.com/pytorch/pytorch/issues/189308",
    ),
    Patch(
        {"torch.distributed.checkpoint.DefaultLoadPlanner.load_bytes": _plain_load_bytes},
        "loading an object beside the tensors runs whatever code it names",
        When.LOADING,
        TORCH,
        "https://github.com/pytorch/pytorch/pull/195600 (checkpoints are trusted, by design)",
    ),
    Patch(
        {"torch.distributed.checkpoint.filesystem.FileSystemReader.read_data": _read_again},
        "a read that storage refuses for now ends the loading",
        When.LOADING,
        TORCH,
        NOT_REPORTED,
    ),
)

_installed: set[str] = set()
"""The names that are replaced for the life of this process."""


def install(current_device: Callable[[], torch.device], *, gpu: bool, meta: bool = False) -> None:
    """Replace what is needed in a process with or without a `gpu`, and where models are built on the meta device.

    What is replaced already stays. Raises RuntimeError if megatron-core is another version than the one traced.
    """
    if f"megatron-core {version('megatron-core')}" != MEGATRON_CORE:
        raise RuntimeError(
            f"megatron-core {version('megatron-core')} is installed; what is replaced in it was traced in "
            f"{MEGATRON_CORE}. Install that version."
        )
    from megatron.core.tensor_parallel import layers

    needed = {
        When.ALWAYS: True,
        When.CPU: not gpu,
        When.NO_CURRENT_GPU: meta or not gpu,
        When.NO_APEX: not layers._grad_accum_fusion_available,
    }
    for patch in PATCHES:
        if needed.get(patch.when, False):
            _replace(patch, *([current_device] if patch.when is When.NO_CURRENT_GPU else []))
    log.debug("%d names of torch and megatron-core are replaced", len(_installed))


def exchange_nothing(group: Any) -> None:
    """Keep a bucket group of megatron-core's from reducing gradients and gathering parameters."""
    _require_gradient_sync()
    group.exchanges_nothing = True


def look_before_reduction(group: Any, look: Callable[[], None]) -> None:
    """Let a bucket group of megatron-core's call `look` before it starts to reduce its gradients."""
    _require_gradient_sync()
    group.look_before_reduction = look


def _require_gradient_sync() -> None:
    assert f"{BUCKET_GROUP}.start_grad_sync" in _installed, "device.prepare() was not called"


def for_rehearsal() -> contextlib.AbstractContextManager[None]:
    """Stand aside, while this is open, where fake tensors and fake groups cannot go."""
    return _replaced_for(When.REHEARSAL)


def for_save(agree: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Keep megatron-core, while this is open, from starting what a save here does not use.

    Each exchange of objects between ranks calls `agree` first, which may raise.
    """
    return _replaced_for(When.SAVING, agree)


def only_plain_data(path: Path, unpickler: type[pickle.Unpickler]) -> contextlib.AbstractContextManager[None]:
    """Let nothing but plain data be unpickled from the checkpoint at `path` while this is open.

    Its index is read by `unpickler`. Raises DataError if an object beside the tensors is something else.
    """
    return _replaced_for(When.LOADING, path, unpickler)


@contextlib.contextmanager
def _replaced_for(when: When, *arguments: Any) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for patch in PATCHES:
            if patch.when is when:
                for name, make in patch.replaces.items():
                    owner, attribute = _place(name)
                    original = getattr(owner, attribute)
                    setattr(owner, attribute, make(original, *arguments))
                    stack.callback(setattr, owner, attribute, original)
        yield


def _replace(patch: Patch, *arguments: Any) -> None:
    for name, make in patch.replaces.items():
        if name not in _installed:
            owner, attribute = _place(name)
            setattr(owner, attribute, make(getattr(owner, attribute, None), *arguments))
            _installed.add(name)


def _place(name: str) -> tuple[Any, str]:
    """Return the module or class that holds a dotted name, and the name in it."""
    owner, _, attribute = name.rpartition(".")
    return pkgutil.resolve_name(owner), attribute
