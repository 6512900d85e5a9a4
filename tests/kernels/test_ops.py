"""The kernels as torch operators: well formed, compiled, fake, and with right gradients on the CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_mm.errors import ConfigError
from megatron_mm.kernels import ops, reference

EPSILON = 1e-5


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).requires_grad_()


def angles(tokens: int, half: int, dtype: torch.dtype) -> list[Tensor]:
    turned = torch.outer(torch.arange(tokens), torch.linspace(1, 0.1, half))
    return [turned.cos().to(dtype), turned.sin().to(dtype)]


def operands(name: str, dtype: torch.dtype) -> tuple:
    """Return arguments of the operator `name`."""

    def new(*shape: int) -> Tensor:
        return draw(*shape, dtype=dtype)

    media_row = torch.tensor([-1, 1, -1, 0, -1], dtype=torch.int32)
    ids, mask = torch.tensor([2, 0, 7, 2, 5]), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    rope = (new(5, 2, 6), new(5, 1, 2, 6), *angles(5, 3, wide))
    kept = [tensor.detach() for tensor in (new(5, 8), new(5, 8), new(8), new(5, 2, 6), new(5, 1, 6))]
    return {
        "assemble_forward": (new(5, 8), new(8), new(2, 8), media_row),
        "assemble_backward": (kept[0], media_row, 2),
        "token_rows": (new(6, 8), ids, 2),
        "token_rows_backward": (kept[0], ids, 2, 6),
        "swiglu": (new(5, 8),),
        "swiglu_backward": (kept[0][:, :4].contiguous(), kept[1]),
        "rms_norm": (new(5, 8), None, new(8), EPSILON),
        "rms_norm (add)": (new(5, 8), new(5, 8), new(8), EPSILON),
        "rms_norm_backward": (*kept[:2], kept[1], kept[2], torch.rand(5, dtype=wide)),
        "mqa_rope": (*rope, None, None, EPSILON),
        "mqa_rope (norm)": (*rope, new(6), new(6), EPSILON),
        "mqa_rope_backward": (kept[3], kept[4], kept[4], None, None, *rope[2:], None, None, EPSILON),
        "cross_entropy_statistics": (kept[0], ids, mask, 2),
        "cross_entropy_combine": (torch.rand(2, 3, 5, dtype=wide), mask, 0.1),
        "cross_entropy_backward": (kept[0], torch.rand(2, 5, dtype=wide), ids, mask, torch.rand(5, dtype=wide), 2, 0.1),
    }[name]


DIFFERENTIABLE = (
    "assemble_forward",
    "token_rows",
    "swiglu",
    "rms_norm",
    "rms_norm (add)",
    "mqa_rope",
    "mqa_rope (norm)",
)
NAMES = (
    *DIFFERENTIABLE,
    *("assemble_backward", "token_rows_backward", "swiglu_backward", "rms_norm_backward", "mqa_rope_backward"),
    *("cross_entropy_statistics", "cross_entropy_combine", "cross_entropy_backward"),
)


def operator(name: str) -> Callable:
    return getattr(torch.ops.megatron_mm, name.split()[0]).default


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_is_well_formed(name: str) -> None:
    torch.library.opcheck(operator(name), operands(name, torch.bfloat16))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_its_gradient_is_that_of_finite_differences(name: str) -> None:
    arguments = operands(name, torch.float64)
    leaves = [
        place for place, argument in enumerate(arguments) if isinstance(argument, Tensor) and argument.requires_grad
    ]

    def of_leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(arguments)
        for place, tensor in zip(leaves, tensors):
            filled[place] = tensor
        outputs = operator(name)(*filled)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(output for output in outputs if output.requires_grad)

    assert torch.autograd.gradcheck(of_leaves, [arguments[place] for place in leaves])


def block(hidden: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """Two operators, one after another."""
    total, normed, _ = torch.ops.megatron_mm.rms_norm(hidden, residual, weight, EPSILON)
    return torch.ops.megatron_mm.swiglu(normed) + total[:, :4]


def test_operators_compile_into_one_graph() -> None:
    arguments = (draw(5, 8), draw(5, 8), draw(8))
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(block(*arguments).square().sum(), arguments)
    found = torch.autograd.grad(compiled(*arguments).square().sum(), arguments)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    arguments = [
        argument.detach() if isinstance(argument, Tensor) else argument for argument in operands(name, torch.bfloat16)
    ]
    real = operator(name)(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(name)(
            *(mode.from_tensor(argument) if isinstance(argument, Tensor) else argument for argument in arguments)
        )
    for ours, theirs in zip(*(out if isinstance(out, tuple) else (out,) for out in (fake, real))):
        if theirs is not None:
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def test_the_choice_of_kernels_is_explicit() -> None:
    cpu = torch.device("cpu")
    try:
        assert [ops.select(choice, cpu) for choice in ("auto", "fused", "reference")] == ["fused", "fused", "reference"]
    finally:
        ops.select("auto", cpu)
    with pytest.raises(ConfigError, match=r"training\.kernels=native, but"):
        ops.select("native", cpu)


@pytest.mark.parametrize("form", ["reference", "fused", "native"])
def test_what_the_model_calls_is_the_reference(form: str) -> None:
    tokens, residual, features, weight, head = draw(5, 8), draw(5, 8), draw(2, 8), draw(8), draw(6)
    positions = torch.tensor([3, 1])
    cos, sin = angles(5, 3, torch.float32)
    rope = {"key_value": draw(5, 1, 2, 6), "cos": cos, "sin": sin, "query_weight": head, "key_weight": head}
    norm = {"weight": weight, "epsilon": EPSILON}
    assembly = {"text_type": weight, "features": features, "positions": positions}
    rows = {"ids": torch.tensor([0, 3, 9]), "first_id": 2}
    for function, arguments, settings in (
        ("assemble_embeddings", (tokens,), assembly),
        ("token_rows", (tokens,), rows),
        ("swiglu", (tokens,), {}),
        ("rms_norm", (tokens,), norm),
        ("add_rms_norm", (tokens,), {"residual": residual, **norm}),
        ("mqa_rope", (draw(5, 2, 6),), rope),
        ("mqa_rope", (draw(5, 2, 6),), {**rope, "query_weight": None, "key_weight": None}),
    ):
        with ops.running(form):  # on the CPU an operator runs the plain form
            found = getattr(ops, function)(*arguments, **settings)
        expected = getattr(reference, function)(*arguments, **settings)
        for ours, theirs in zip(*(out if isinstance(out, tuple) else (out,) for out in (found, expected))):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_definition_is_computed_wide_and_rounded_once() -> None:
    hidden, weight = draw(5, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16)
    with ops.running("reference"):
        found = ops.rms_norm(hidden, weight=weight, epsilon=EPSILON)
    wide = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    expected = reference.rms_norm(wide[0], weight=wide[1], epsilon=EPSILON)
    found.sum().backward()
    expected.sum().backward()
    assert torch.equal(found, expected.bfloat16())
    assert torch.equal(hidden.grad, wide[0].grad.bfloat16()) and torch.equal(weight.grad, wide[1].grad.bfloat16())
