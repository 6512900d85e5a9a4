"""The choice of a form at start-up, and a check of the native kernels before they train anything.

What a driver, a compiler or a GPU does wrong is then an error at start-up, not a loss curve.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_mm.errors import ConfigError
from megatron_mm.kernels import cross_entropy, embedding, native, rms_norm, rope, swiglu
from megatron_mm.kernels.forms import Example, Form, running, use

OPERATORS = (embedding, rms_norm, rope, swiglu, cross_entropy)
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
"""The largest error, as a part of the element plus the tensor's root mean square: faults are far greater."""


def select(choice: str, device: torch.device) -> Form:
    """Decide which form of the kernels runs from now on and return its name.

    `choice` is training.kernels; 'auto' is 'native' where that can be had and 'fused' elsewhere. Raises ConfigError if
    'native' is asked for and cannot be had, or computes something else than its definition here.
    """
    form = choice
    if choice == "native" and (missing := _missing(device)):
        raise ConfigError(f"training.kernels=native, but {missing}. Use training.kernels=auto.")
    if choice == "auto":
        form = "native" if device.type == "cuda" and not _missing(device) else "fused"
    if form == "native" and (wrong := disagreements(device)):
        raise ConfigError(
            "these native kernels do not compute on this rank's GPU what they should: " + "; ".join(wrong) + ". Use "
            "training.kernels=fused, and report this."
        )
    use(form)
    return form


def _missing(device: torch.device) -> str | None:
    """Return why native kernels cannot run on `device`, None if they can."""
    if native.library() is None:
        return "the CUDA extension is not built (nvcc was not found when the package was installed)"
    return None if device.type == "cuda" else f"native kernels run on a GPU and this rank is on {device.type}"


def disagreements(device: torch.device) -> list[str]:
    """Return the kernels, with their types, that differ on `device` from their definitions, and how: in what they
    compute or in its gradients."""
    found = []
    for dtype in BOUND:
        for name, example in examples(dtype, device):
            try:
                error = _error(_results(example, "native"), _results(example, "reference"))
            except (RuntimeError, ValueError) as failure:
                found.append(f"{name} ({dtype}): {failure}")
                continue
            if not error <= BOUND[dtype]:  # nan as well
                found.append(f"{name} ({dtype}): off by {error:.1e}")
    return found


def examples(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Example]]:
    """Yield the examples of every operator, with its name."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    for operator in OPERATORS:
        for example in operator.examples(draw):
            yield operator.__name__.rpartition(".")[2], example


def _results(example: Example, form: Form) -> list[Tensor]:
    """Return the outputs of an example, and its gradients."""
    call, tensors = example
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    with running(form):
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [torch.linspace(-1, 1, output.numel()).view_as(output).to(output) for output in outputs]
        return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def _error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    worst = 0.0
    for found, expected in zip(ours, theirs, strict=True):
        if expected.numel():
            expected = expected.float()
            scale = expected.abs() + expected.square().mean().sqrt()
            worst = max(worst, ((found.float() - expected).abs() / scale.clamp(min=1e-30)).max().item())
    return worst
