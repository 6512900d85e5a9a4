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


class Channel(NamedTuple):
    """Between whom messages go: all ranks of a group, or from one rank to another. The order of its messages counts."""

    group: str
    ranks: tuple[int, ...]
    directed: bool


class Message(NamedTuple):
    """One message as a rank sees it."""

    name: str
    num_bytes: int
    place: str
    """Pass and module, such as 'in forward micro-batch 0 chunk 1, in ...'."""


class Product(NamedTuple):
    """One kind of matrix product or attention, where it stands, and in which pass."""

    module: str
    backward: bool
    name: str
    shape: tuple[int, ...]


class Component(NamedTuple):
    """A module as the ledger knows it."""

    kind: str
    """What counts are kept by: layers of a kind share it; "" takes that of the module around it."""
    path: str
    """Its own name, for messages."""
    chunk: int | None = None
    """Which model chunk it is, if it is a whole one: each of its forward passes is a micro-batch."""


class Sample(NamedTuple):
    """What was held at one moment."""

    operators: int
    """How many operators had run since counting began."""
    phase: str
    """Such as 'forward micro-batch 3 chunk 1'; micro-batches and chunks count from 0."""
    held: dict[str, int]
    """Bytes by category."""


class _Mark(NamedTuple):
    """Where the forward pass stood when a module was entered or left."""

    kind: str
    path: str
    micro_batch: str


@dataclass
class Ledger(TorchDispatchMode):
    """Counts everything between `with` and its end.

    Modules are those of `parts`; an operator outside any module belongs to "". Memory is the bytes of storages
    that live, as an allocator without fragments would hold them.
    """

    parts: dict[int, Component] = field(default_factory=dict)
    """The component of each module, by the module's id."""
    held: Counter[str] = field(default_factory=Counter)
    """Bytes by category, now."""
    peak: Counter[str] = field(default_factory=Counter)
    """Bytes by category, when they were most in all."""
    history: list[Sample] = field(default_factory=list)
    """One wherever the total has moved by a two-hundredth of the peak."""
    flops: Counter[Product] = field(default_factory=Counter)
    calls: Counter[Product] = field(default_factory=Counter)
    moved: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Bytes read and written by operators that are no matrix products, by (module, backward)."""
    launches: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """Operators that do work, by (module, backward)."""
    collectives: Counter[Collective] = field(default_factory=Counter)

    messages: dict[Channel, list[Message]] = field(default_factory=dict)
    """All messages in order, by channel."""

    def __post_init__(self) -> None:
        super().__init__()
        self._stack: list[Component] = []
        self._live: dict[int, tuple[weakref.ref, int, str]] = {}
        self._numbers, self._marks = [0], [_Mark("", "", "")]
        self._mark_index, self._backward = 0, False
        self._phase, self._micro_batch, self._begun = "", "", Counter[int]()
        self._failed: tuple[BaseException | None, str] = None, ""
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
        for counter in (self.flops, self.calls, self.moved, self.launches, self.collectives, self.messages):
            counter.clear()
        self._operators = 0
        self._begun.clear()
        self._peak_sample = self._sample()
        self.peak, self.history, self._drawn = Counter(self.held), [self._peak_sample], self.held.total()

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

    def begin_phase(self, name: str) -> None:
        """Say what goes on until a model chunk runs, or until the next such call."""
        self._phase, self._micro_batch, self._backward = name, "", False

    def where(self) -> tuple[str, bool]:
        """Return (kind of module that is at work, whether this is a backward pass)."""
        node = torch._C._current_autograd_node()
        if node is None or self._stack:  # a module in a backward pass is recomputed there
            self._mark_index, self._backward = len(self._marks) - 1, node is not None
        elif node._sequence_nr() <= torch.autograd._get_sequence_nr():  # parameters' own nodes have no number
            # autograd numbers its nodes in the order of the forward pass
            self._mark_index, self._backward = bisect_right(self._numbers, node._sequence_nr()) - 1, True
        return self._marks[self._mark_index].kind, self._backward

    def phase(self) -> str:
        """Return what goes on now: a pass of a micro-batch, or what `begin_phase` said."""
        micro_batch = self._marks[self._mark_index].micro_batch if self._backward else self._micro_batch
        if not micro_batch or (self._phase and not self._backward):
            return self._phase
        return f"{'backward' if self._backward else 'forward'} {micro_batch}"

    def describe_failure(self, error: BaseException) -> str:
        """Return 'in PHASE, in MODULE' for an error that was raised under this ledger.

        An error that no operator has raised, outside any module, comes 'after' the last operator.
        """
        failed, place = self._failed
        if failed is error:
            return place
        if self._stack:
            return self._describe("in", self._stack[-1].path)
        return self._describe("after", self._marks[self._mark_index].path)

    def _describe(self, word: str, path: str) -> str:
        return f"{word} {self.phase()}" + (f", {word} {path}" if path else "")

    def samples(self, most: int = 400) -> list[Sample]:
        """Return at most about `most` samples of what was held over time, the peak among them."""
        by_time = sorted({sample.operators: sample for sample in (*self.history, self._peak_sample)}.values())
        share = -(-len(by_time) // most)
        groups = [by_time[first : first + 2 * share] for first in range(0, len(by_time), 2 * share)]
        extremes = [(min(group, key=_total), max(group, key=_total)) for group in groups] if share > 1 else []
        kept = {sample.operators: sample for pair in extremes for sample in pair} or {s.operators: s for s in by_time}
        return sorted(kept.values())

    def _sample(self) -> Sample:
        return Sample(self._operators, self.phase(), {name: size for name, size in self.held.items() if size})

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return self._host_value(args[0])
        place = self.where()
        if func.namespace == "c10d" and "coalesced" in func._schema.name and isinstance(_first(args), FakeTensor):
            result = FakeWork().boxed()  # torch 2.14's fake mode knows the plain forms only
        else:
            try:
                result = func(*args, **kwargs)
            except Exception as error:
                self._failed = error, self._describe("in", self._marks[self._mark_index].path)
                raise
        self._operators += 1
        if func is torch.ops.aten.all.default and isinstance(result, FakeTensor):
            self._holds[id(result)] = result
        if func.namespace == "c10d":
            self._count_collective(func, args)
            return result
        category = "activations" if place[0] and not place[1] else "temporary"
        made = [self._hold(tensor.untyped_storage(), category) for tensor in _tensors((result,))]
        # torch 2.14 counts all pairs of tokens in varlen attention; here it is causal.
        formula = None if func.namespace == "torch_attn" else flop_registry.get(func._overloadpacket)
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
        ranks, is_sent = tuple(dist.get_process_group_ranks(group)), name.startswith("send")
        if is_direct := is_sent or name.startswith("recv"):
            peer = ranks[next(value for value in args if isinstance(value, int))]
            ranks = (dist.get_rank(), peer) if is_sent else (peer, dist.get_rank())
        message = Message(name, max(sides), self._describe("in", self._marks[self._mark_index].path))
        self.messages.setdefault(Channel(group.group_desc, ranks, is_direct), []).append(message)
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
            self.peak, self._peak_sample = Counter(self.held), self._sample()
        if abs(total - self._drawn) * 200 > self.peak.total():
            self._drawn = total
            self.history.append(self._sample())
        return True

    def _enter(self, module: nn.Module, args: Any) -> None:
        part = self.parts.get(id(module))
        if part is None:
            return
        micro_batch = self._passing()
        if part.chunk is not None:
            number = self._begun[part.chunk]
            self._begun[part.chunk] += 1
            micro_batch = self._micro_batch = f"micro-batch {number} chunk {part.chunk}"
            self._phase = ""
        self._stack.append(part if part.kind else part._replace(kind=self._stack[-1].kind if self._stack else ""))
        self._mark(micro_batch)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in self.parts:
            micro_batch = self._passing()
            self._stack.pop()
            self._mark(micro_batch)

    def _passing(self) -> str:
        """Return whose pass this is; a recomputed module belongs to the micro-batch of the backward pass."""
        self.where()
        return self._marks[self._mark_index].micro_batch if self._backward else self._micro_batch

    def _mark(self, micro_batch: str) -> None:
        kind, path, _ = self._stack[-1] if self._stack else ("", "", None)
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._marks.append(_Mark(kind, path, micro_batch))


def _total(sample: Sample) -> int:
    return sum(sample.held.values())


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
