"""What every native kernel has as a torch operator and at the start of a run, shown with the CUDA source on the host.

What each computes is compared with its definition in the test of its own file.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import simt
import torch
from agreement import draw
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_mm.errors import ConfigError
from megatron_mm.kernels import forms, native
from megatron_mm.kernels import select as choice
from megatron_mm.kernels import swiglu as swiglu_file
from megatron_mm.kernels.forms import running
from megatron_mm.kernels.rms_norm import add_rms_norm
from megatron_mm.kernels.select import disagreements, examples, select
from megatron_mm.kernels.swiglu import swiglu

CPU = torch.device("cpu")
LAUNCHERS = Path(__file__).parents[2] / "csrc" / "kernels" / "launch.h"
EPSILON = 1e-5


def operands(name: str) -> tuple:
    """Return BF16 arguments of the operator `name`."""

    def new(*shape: int) -> Tensor:
        return draw(torch.bfloat16, *shape).requires_grad_()

    media_row = torch.tensor([-1, 1, -1, 0, -1], dtype=torch.int32)
    ids, mask = torch.tensor([2, 0, 7, 2, 5]), torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    angles = torch.outer(torch.arange(5), torch.linspace(1, 0.1, 3))
    rope = (new(5, 2, 6), new(5, 1, 2, 6), angles.cos(), angles.sin())
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
        "rms_norm_backward": (*kept[:2], kept[1], kept[2], torch.rand(5)),
        "mqa_rope": (*rope, None, None, EPSILON),
        "mqa_rope (norm)": (*rope, new(6), new(6), EPSILON),
        "mqa_rope_backward": (kept[3], kept[4], kept[4], None, None, *rope[2:], None, None, EPSILON),
        "cross_entropy_statistics": (kept[0], ids, mask, 2),
        "cross_entropy_combine": (torch.rand(2, 3, 5), mask, 0.1),
        "cross_entropy_backward": (kept[0], torch.rand(2, 5), ids, mask, torch.rand(5), 2, 0.1),
    }[name]


NAMES = (
    *("assemble_forward", "token_rows", "swiglu", "rms_norm", "rms_norm (add)", "mqa_rope", "mqa_rope (norm)"),
    *("assemble_backward", "token_rows_backward", "swiglu_backward", "rms_norm_backward", "mqa_rope_backward"),
    *("cross_entropy_statistics", "cross_entropy_combine", "cross_entropy_backward"),
)


def operator(name: str) -> Callable:
    return getattr(torch.ops.megatron_mm, name.split()[0]).default


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("name", NAMES)
def test_the_operator_is_well_formed(name: str) -> None:
    torch.library.opcheck(operator(name), operands(name))


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_have_the_shapes_of_real_ones(name: str) -> None:
    arguments = [argument.detach() if isinstance(argument, Tensor) else argument for argument in operands(name)]
    real = operator(name)(*arguments)
    with FakeTensorMode() as mode:
        fake = operator(name)(
            *(mode.from_tensor(argument) if isinstance(argument, Tensor) else argument for argument in arguments)
        )
    for ours, theirs in zip(*(out if isinstance(out, tuple) else (out,) for out in (fake, real))):
        if theirs is not None:
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def block(hidden: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """Two operators, one after another."""
    normed, total = add_rms_norm(hidden, residual=residual, weight=weight, epsilon=EPSILON)
    return swiglu(normed) + total[:, :4]


@pytest.mark.usefixtures("on_host")
def test_operators_compile_into_one_graph() -> None:
    arguments = [draw(torch.float32, *shape).requires_grad_() for shape in ((5, 8), (5, 8), (8,))]
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(block(*arguments).square().sum(), arguments)
    found = torch.autograd.grad(compiled(*arguments).square().sum(), arguments)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs)


EXAMPLES = list(examples(torch.float32, CPU))


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("number", range(len(EXAMPLES)), ids=[name for name, _ in EXAMPLES])
def test_gradients_are_those_of_finite_differences(number: int) -> None:
    call, tensors = EXAMPLES[number][1]

    def outputs(*tensors: Tensor) -> list[Tensor]:
        found = call(*tensors)
        return list(found) if isinstance(found, tuple) else [found]

    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    weights = [draw(torch.float32, *output.shape, seed=5) for output in outputs(*tensors)]
    found = torch.autograd.grad(outputs(*leaves), leaves, weights)

    def weighed(*tensors: Tensor) -> float:
        pairs = zip(outputs(*tensors), weights, strict=True)
        return sum((output.double() * weight).sum().item() for output, weight in pairs)

    step = 2.0**-7
    for place, gradient in enumerate(found):
        for seed in (6, 7):
            direction = draw(torch.float32, *gradient.shape, seed=seed)
            ends = [
                weighed(*tensors[:place], tensors[place] + sign * step * direction, *tensors[place + 1 :])
                for sign in (1, -1)
            ]
            expected, scale = (ends[0] - ends[1]) / (2 * step), gradient.norm() * direction.norm()
            # Rounding 1e-7 / step of the sums, and step^2 of the third derivative.
            assert abs((gradient.double() * direction).sum() - expected) <= 1e-3 * scale


def test_the_check_at_start_up_runs_every_kernel_and_finds_a_fault(
    on_host: simt.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = set()
    launch = native.launch
    monkeypatch.setattr(native, "launch", lambda name, *arguments: launched.add(name) or launch(name, *arguments))
    assert disagreements(CPU) == []  # launches on the host
    assert launched == set(re.findall(r"^int (\w+)\(", LAUNCHERS.read_text(), re.MULTILINE))
    right = swiglu_file.swiglu_native
    monkeypatch.setattr(swiglu_file, "swiglu_native", lambda gate_and_up: right(gate_and_up.flip(-1)))
    assert [line.split(" (")[0] for line in disagreements(CPU)] == ["swiglu", "swiglu"]


@pytest.fixture
def _form() -> None:
    before = forms.form()
    yield
    forms.use(before)


@pytest.mark.usefixtures("_form")
def test_the_choice_of_kernels_is_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [select(asked, CPU) for asked in ("auto", "fused", "reference")] == ["fused", "fused", "reference"]
    assert forms.form() == "reference"
    with pytest.raises(ConfigError, match=r"training\.kernels=native, but"):
        select("native", CPU)
    assert forms.form() == "reference"
    monkeypatch.setattr(native, "library", lambda: object())
    monkeypatch.setattr(choice, "disagreements", lambda device: ["swiglu (torch.float32): off by 1.0e+00"])
    for asked in ("auto", "native"):
        with pytest.raises(ConfigError, match=r"swiglu .* Use training\.kernels=fused"):
            select(asked, torch.device("cuda"))
    monkeypatch.setattr(choice, "disagreements", lambda device: [])
    assert [select(asked, torch.device("cuda")) for asked in ("auto", "native")] == ["native", "native"]


@pytest.mark.usefixtures("_form")
def test_a_gpu_without_the_library_runs_what_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(native, "library", lambda: None)
    assert select("auto", gpu) == "fused"
    with pytest.raises(ConfigError, match="the CUDA extension is not built"):
        select("native", gpu)
    monkeypatch.setattr(native, "library", lambda: pytest.fail("the library is looked for"))
    assert [select(asked, gpu) for asked in ("reference", "fused")] == ["reference", "fused"]


NOTHING_BUILT = """
import sys

class Watch:
    def find_spec(self, name, *_):
        assert not name.endswith("kernels._cuda"), name

sys.meta_path.insert(0, Watch())
import torch
from megatron_mm.kernels.select import examples, select
assert select("reference", torch.device("cuda")) == "reference"
for _, (call, tensors) in examples(torch.float32, torch.device("cpu")):
    outputs = call(*(tensor.requires_grad_() for tensor in tensors))
    sum(out.sum() for out in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
"""


def test_the_reference_form_never_looks_for_the_library() -> None:
    subprocess.run([sys.executable, "-c", NOTHING_BUILT], check=True)


def test_running_a_form_ends_with_its_block() -> None:
    before = forms.form()
    with pytest.raises(RuntimeError), running("native"):
        assert forms.form() == "native"
        raise RuntimeError
    assert forms.form() == before
