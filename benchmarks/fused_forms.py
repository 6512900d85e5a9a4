"""What each fused form is worth: a training step on one CPU process with it, and with what it stands for in its place.

    python benchmarks/fused_forms.py

The model and batch of train_step.py, in FP32, ours as it is and with one kernel at a time replaced by its definition
under torch's autograd, or by torch's own. Steps are interleaved; times are medians, memory is the growth of the peak of
each process. The bar: every form saves 1% of the step, or of its memory.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch.nn.functional as F
from torch import Tensor
from train_step import ON_CPU, ROUNDS, WARM_UP, Workload, ours, race
from verdict import finish

BAR = 0.99
REPLACED = {
    "swiglu": ("layer", "swiglu"),
    "rms_norm": ("layer", "rms_norm", "add_rms_norm"),
    "mqa_rope": ("layer", "mqa_rope"),
    "cross_entropy": ("multimodal", "vocab_parallel_cross_entropy"),
}
"""The file of the model that calls each kernel, and what it calls."""
SDPA = ON_CPU._replace(settings=(*ON_CPU.settings, "training.attention=sdpa"))


def without(kernel: str, work: Workload) -> Callable[[], float]:
    """Return a function that trains one step with the definition of `kernel` in its place."""
    file, *names = REPLACED[kernel]
    caller = import_module(f"megatron_mm.model.{file}")
    for name in names:
        setattr(caller, name, defined(getattr(caller, name)))
    return ours(work)


def defined(function: Callable) -> Callable:
    """Return the reference form of what the model calls."""
    from megatron_mm.kernels.forms import running

    def run(*tensors: Tensor, **settings: object) -> object:
        with running("reference"):
            return function(*tensors, **settings)

    return run


def with_torch_norm(work: Workload) -> Callable[[], float]:
    """Return a function that trains one step with torch's norm."""
    from megatron_mm.kernels import rms_norm
    from megatron_mm.model import layer

    def norm(hidden: Tensor, *, weight: Tensor, epsilon: float) -> Tensor:
        return F.rms_norm(hidden, weight.shape, weight, epsilon)

    layer.rms_norm = rms_norm.rms_norm = norm
    return ours(work)


CONTESTANTS = {
    "ours": (ours, ON_CPU),
    **{f"{kernel} by its definition": (partial(without, kernel), ON_CPU) for kernel in REPLACED},
    "rms_norm by torch's": (with_torch_norm, ON_CPU),
    "attention by torch's": (ours, SDPA),
}


def main() -> None:
    """Exit 0 only if every form is worth its lines."""
    times, memory = race(CONTESTANTS, rounds=ROUNDS, warm_up=WARM_UP)
    others = [name for name in times if name != "ours"]
    saved = {name: min(times["ours"] / times[name], memory["ours"] / memory[name]) for name in others}
    least = max(saved, key=saved.__getitem__)
    print(f"the form that is worth least stands for {least}: {saved[least]:.3f} of its step or of its memory")
    finish("fused_forms", ours=saved[least], peer=1.0, bar=BAR)


if __name__ == "__main__":
    main()
