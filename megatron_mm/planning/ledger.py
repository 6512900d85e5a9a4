"""What a rank holds, computes and sends, counted operator by operator as it runs.

The same ledger counts a real run and a rehearsal under fake tensors: whatever differs between them differs in the code
that ran, not in how it was counted.
"""

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "communication", "temporary")
"""What memory is held for. Activations are made in a forward pass, temporary tensors elsewhere."""
WRITES_FIRST = ("_allgather_base_", "allgather_", "_reduce_scatter_base_", "reduce_scatter_")
"""Collectives whose first operand is their output, and not their input as well."""
HOST_VALUE = 2
"""What the host reads from a fake tensor, where no number stands: finite, and a gradient norm that is clipped."""


class Collective(NamedTuple):
    """One kind of message: the operator, megatron-core's name of the group, its ranks, the bytes of its larger side."""

    name: str
    group: str
    size: int
    num_bytes: int


class Product(NamedTuple):
    """One kind of matrix product or attention, where it stands, and in which pass."""

    module: str
    backward: bool
    name: str
    shape: tuple[int, ...]


@dataclass
class Ledger(TorchDispatchMode):
    """Counts everything between `with` and its end.

    Module names are those of `names`; an operator outside any module belongs to "". Memory is the bytes of storages
    that live, as an allocator without fragments would hold them.
    """

    names: dict[int, str] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)
    """Bytes by category, now."""
    peak: Counter[str] = field(default_factory=Counter)
    """Bytes by category, when they were most in all."""
    history: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    """(operators so far, bytes by category) wherever the total has moved by a two-hundredth of the peak."""
    flops: Counter[Product] = field(default_factory=Counter)
    calls: Counter[Product] = field(default_factory=Counter)
    moved: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Bytes read and written by operators that are no matrix products, by (module, backward)."""
    launches: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Operators that do work, by (module, backward)."""
    collectives: Counter[Collective] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.failed: tuple[Exception, str] | None = None
        """What the last operator that failed has raised, and where it stands."""
        self._layer: int | None = None
        self._live: dict[int, tuple[weakref.ref, int, str]] = {}
        self._marks: tuple[list[int], list[str], list[int | None]] = ([0], [""], [None])
        self._operators = self._drawn = 0
        self._holds: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "Ledger":
        self._hooks = [register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave)]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def forget_counts(self) -> None:
        """Start counting anew; what is held stays held."""
        for counter in (self.flops, self.calls, self.moved, self.launches, self.collectives):
            counter.clear()
        self.peak, self.history = Counter(self.held), [(self._operators, dict(self.held))]

    def hold(self, tensors: Iterable[Tensor], category: str) -> None:
        """Say what tensors are held for; those that were made before the ledger are counted from now on."""
        for tensor in tensors:
            self._hold(tensor.untyped_storage(), category, known=True)

    def hold_rest(self, category: str) -> None:
        """Say what all that is held as activations or temporary is held for."""
        for key, (reference, size, before) in list(self._live.items()):
            if before in ("activations", "temporary", "communication"):
                self._live[key] = reference, size, category
                self.held[before] -= size
                self.held[category] += size

    def where(self) -> tuple[str, bool]:
        """Return (module that is at work, whether this is a backward pass)."""
        node = torch._C._current_autograd_node()
        if node is None:
            return (self.stack[-1] if self.stack else ""), False
        numbers, names, _ = self._marks  # autograd numbers its nodes in the order of the forward pass
        return names[bisect_right(numbers, node._sequence_nr()) - 1], True

    def describe_place(self) -> str:
        """Return where this is for people: module, layer of the whole model, and pass."""
        node = torch._C._current_autograd_node()
        name, backward = self.where()
        numbers, _, layers = self._marks
        layer = self._layer if node is None else layers[bisect_right(numbers, node._sequence_nr()) - 1]
        number = "" if layer is None else f" of layer {layer}"
        return (name or "no module") + number + (", backward" if backward else "")

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._host_value(args[0])
        if func.namespace == "c10d" and "coalesced" in func._schema.name and isinstance(_first(args), FakeTensor):
            result = FakeWork().boxed()  # torch 2.14's fake mode knows the plain forms only
        else:
            try:
                result = func(*args, **kwargs)
            except Exception as error:
                self.failed = error, self.describe_place()
                raise
        self._operators += 1
        if func is torch.ops.aten.all.default and isinstance(result, FakeTensor):
            self._holds[id(result)] = result
        place = self.where()
        if func.namespace == "c10d":
            self._count_collective(func, args)
            return result
        category = "activations" if place[0] and not place[1] else "temporary"
        made = [self._hold(tensor.untyped_storage(), category) for tensor in _tensors((result,))]
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None or func.namespace == "torch_attn":
            self._count_product(func, place, formula, args, kwargs, result)
        elif any(made) or func._schema.is_mutable:
            tensors = list(_tensors((*args, *kwargs.values(), result)))
            self.moved[place] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.launches[place] += 1
        return result

    def _host_value(self, tensor: Tensor) -> bool | int | float:
        """Return what the host reads from a fake tensor, where no number stands."""
        if tensor.dtype == torch.bool:
            # All is finite; no random number is below a drop rate, and none falls outside its bounds.
            return self._holds.pop(id(tensor), None) is not None
        return float(HOST_VALUE) if tensor.dtype.is_floating_point else HOST_VALUE

    def _count_product(self, func: Any, place: tuple, formula: Any, args: tuple, kwargs: dict, result: Any) -> None:
        name = func._overloadpacket.__name__
        if formula is None:
            query, longest = _varlen_operands(args, backward="backward" in name)
            shape = (*query.shape, *longest)
            pairs = query.shape[0] * (longest[1] - longest[0] / 2)  # causal, aligned at the end
            flops = round((10 if "backward" in name else 4) * query.shape[1] * query.shape[2] * pairs)
        else:
            shape = tuple(size for tensor in _tensors(args) for size in tensor.shape)
            flops = formula(*args, **kwargs, out_val=result)
        product = Product(*place, name, shape)
        self.flops[product] += flops
        self.calls[product] += 1

    def _count_collective(self, func: Any, args: tuple) -> None:
        name = func._overloadpacket.__name__
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        sides = [sum(t.numel() * t.element_size() for t in _tensors((side,))) for side in args[:2]]
        self.collectives[Collective(name, group.group_desc, group.size(), max(sides))] += 1
        if name.startswith(WRITES_FIRST):
            for tensor in _tensors(args[:1]):
                self._retag(tensor, "communication")
        elif name.startswith("recv"):
            for tensor in _tensors(args[:1]):
                self._retag(tensor, "activations")

    def _retag(self, tensor: Tensor, category: str) -> None:
        key = tensor.untyped_storage()._cdata
        reference, size, before = self._live.get(key, (None, 0, category))
        if reference is not None and before in ("activations", "temporary"):
            self._live[key] = reference, size, category
            self.held[before] -= size
            self.held[category] += size

    def _hold(self, storage: torch.UntypedStorage, category: str, known: bool = False) -> bool:
        """Enter a storage into the books; return whether it is new."""
        key = storage._cdata
        entry = self._live.get(key)
        if entry is not None and entry[0]() is storage:
            if known:
                self.held[entry[2]] -= entry[1]
                self.held[category] += entry[1]
                self._live[key] = entry[0], entry[1], category
            return False
        size = storage.nbytes()

        def freed(reference: weakref.ref) -> None:
            own = self._live.get(key)
            if own is not None and own[0] is reference:
                del self._live[key]
                self.held[own[2]] -= own[1]

        self._live[key] = weakref.ref(storage, freed), size, category
        self.held[category] += size
        total = self.held.total()
        if total > self.peak.total():
            self.peak = Counter(self.held)
        if abs(total - self._drawn) * 200 > self.peak.total():
            self._drawn = total
            self.history.append((self._operators, dict(self.held)))
        return True

    def _enter(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, TransformerLayer):
            self._layer = module.layer_number  # counted from 1 over all stages
        name = self.names.get(id(module))
        if name is not None:
            self.stack.append(name)
            self._mark()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self.names:
            self.stack.pop()
            self._mark()
        if isinstance(module, TransformerLayer):
            self._layer = None

    def _mark(self) -> None:
        numbers, names, layers = self._marks
        numbers.append(torch.autograd._get_sequence_nr())
        names.append(self.stack[-1] if self.stack else "")
        layers.append(self._layer)


def _first(args: tuple) -> Tensor | None:
    return next(_tensors(args), None)


def _is_group(value: torch.ScriptObject) -> bool:
    return value._type().qualified_name().endswith("c10d.ProcessGroup")


def _varlen_operands(args: tuple, *, backward: bool) -> tuple[Tensor, tuple[int, int]]:
    """Return (query, longest query and key of a document) of torch's varlen attention."""
    longest = tuple(value for value in args if isinstance(value, int) and not isinstance(value, bool))[:2]
    return args[1 if backward else 0], longest


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
