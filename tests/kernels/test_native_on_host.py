"""Every kernel, forward and backward, against its FP64 reference: the CUDA source on the host, and the plain form.

The CUDA source runs under both sanitizers, three times: threads and blocks in order, in the opposite one, and in a
random one. The bits must be the same each time.
"""

from collections.abc import Callable
from types import ModuleType

import pytest
import simt
import torch
from torch import Tensor

from megatron_mm.kernels import check as start_up
from megatron_mm.kernels import native, ops, plain, reference

SEEDS = (0, 1, 2)
UNALIGNED = 8
"""Bytes: keeps 8-byte ids aligned and 16-byte accesses not."""
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
"""Of the error, as a part of the element plus the tensor's root mean square: FP32 sums in some order; for BF16 the half
unit (2^-9) of a rounded result and of a rounded intermediate."""
EPSILON = 1e-5

Case = Callable[[ModuleType], list[Tensor]]


@pytest.fixture(params=["native", "plain"])
def check(request: pytest.FixtureRequest) -> Callable[[Case, list[Tensor], list[torch.dtype]], None]:
    """Return a function that runs a case and compares what it returns with what is expected."""
    if request.param == "plain":
        return lambda case, expected, dtypes: assert_near(case(plain), expected, dtypes)
    host: simt.Host = request.getfixturevalue("on_host")

    def run(case: Case, expected: list[Tensor], dtypes: list[torch.dtype]) -> None:
        host.offset, host.seed = UNALIGNED, SEEDS[-1]
        assert_near(case(native), expected, dtypes)
        host.offset, host.seed = 0, SEEDS[0]
        first = case(native)
        assert_near(first, expected, dtypes)
        for host.seed in SEEDS[1:]:
            for ours, again in zip(first, case(native)):
                assert torch.equal(ours, again), "the order of threads shows"

    return run


def assert_near(found: list[Tensor], expected: list[Tensor], dtypes: list[torch.dtype]) -> None:
    assert len(found) == len(expected) == len(dtypes)
    for ours, theirs, dtype in zip(found, expected, dtypes):
        assert ours.shape == theirs.shape
        assert ours.dtype == dtype
        if theirs.numel():
            scale = theirs.abs() + theirs.square().mean().sqrt()
            worst = ((ours.double() - theirs).abs() / scale.clamp(min=1e-30)).nan_to_num(torch.inf).max().item()
            assert worst <= BOUND[dtype], worst


def draw(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def gradients(outputs: list[Tensor], inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    total = sum((output * weight.double()).sum() for output, weight in zip(outputs, weights))
    return list(torch.autograd.grad(total, inputs))


def exact(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double().requires_grad_() for tensor in tensors]


dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 1056), (0, 8), (5, 0), (33, 16)], ids=str)
def test_swiglu(check: Callable, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, columns = shape
    gate_and_up, gradient = 3 * draw(dtype, rows, 2 * columns), draw(dtype, rows, columns)
    (leaf,) = exact(gate_and_up)
    out = reference.swiglu(leaf)
    expected = [out.detach(), *gradients([out], [leaf], [gradient])]
    check(
        lambda kernels: [kernels.swiglu(gate_and_up), kernels.swiglu_backward(gradient, gate_and_up)],
        expected,
        [dtype, dtype],
    )


@dtypes
@pytest.mark.parametrize("adds", [True, False], ids=["add", "plain"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (7, 5), (2, 1056), (0, 8), (7, 16)], ids=str)
def test_rms_norm(check: Callable, dtype: torch.dtype, shape: tuple[int, int], adds: bool) -> None:
    hidden, residual, weight = draw(dtype, *shape), draw(dtype, *shape, seed=1), draw(dtype, shape[1])
    gradient, passed = draw(dtype, *shape, seed=2), draw(dtype, *shape, seed=3)
    # Of one column the gradient is what epsilon leaves of a difference of equal terms: a small one leaves rounding.
    epsilon = 0.5 if shape[1] == 1 else EPSILON
    # The sum is rounded before it is normed, by the kernel as by torch; a gradient of its terms is one of the sum.
    total, scale = exact(hidden + residual if adds else hidden, weight)
    normed = reference.rms_norm(total, weight=scale, epsilon=epsilon)
    backward = gradients([normed, total], [total, scale], [gradient, passed if adds else torch.zeros(())])
    expected = [total.detach() if adds else torch.empty(0), normed.detach(), *backward]

    def case(kernels: ModuleType) -> list[Tensor]:
        found, out, inverse = kernels.rms_norm(hidden, residual if adds else None, weight, epsilon)
        kept = found if adds else hidden
        back = kernels.rms_norm_backward(gradient, passed if adds else None, kept, weight, inverse)
        return [found, out, *back]

    check(case, expected, [dtype] * 4)


@dtypes
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("shape", [(3, 8, 1, 6), (2, 4, 2, 256), (0, 2, 1, 4), (29, 4, 1, 16)], ids=str)
def test_mqa_rope(check: Callable, dtype: torch.dtype, shape: tuple[int, int, int, int], norm: bool) -> None:
    # The last shape has more heads than the blocks of the backward pass turn at a time: weights' gradients add up.
    tokens, heads, groups, head_dim = shape
    query, wider = draw(dtype, tokens, heads, head_dim), draw(dtype, tokens, groups + 1, 2, head_dim)
    key_value = wider[:, 1:]  # a rank's groups among those of all: tokens are not packed
    weights = [draw(dtype, head_dim, seed=seed) if norm else None for seed in (1, 2)]
    positions = torch.cat([torch.arange(tokens - tokens // 3), torch.arange(tokens // 3)])  # a second document
    angles = torch.outer(positions.double(), 10000.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64))
    cos, sin = angles.cos().float(), angles.sin().float()
    back = [draw(dtype, tokens, count, head_dim, seed=3) for count in (heads, groups, groups)]
    leaves = exact(query, key_value, *(weights if norm else []))
    outputs = reference.mqa_rope(
        *(leaves[0],),
        **{"key_value": leaves[1], "cos": cos.double(), "sin": sin.double(), "epsilon": EPSILON},
        **dict(zip(("query_weight", "key_weight"), leaves[2:])),
    )
    nothing = [] if norm else [torch.empty(0), torch.empty(0)]
    expected = [*(output.detach() for output in outputs), *gradients(list(outputs), leaves, back), *nothing]

    def case(kernels: ModuleType) -> list[Tensor]:
        inputs = (query, key_value) if norm else (None, None)
        forward = kernels.mqa_rope(query, key_value, cos, sin, *weights, EPSILON)
        return [*forward, *kernels.mqa_rope_backward(*back, *inputs, cos, sin, *weights, EPSILON)]

    check(case, expected, [dtype] * 7)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (6, 1056, 2), (0, 8, 0), (20, 8, 0), (20, 16, 9)], ids=str)
def test_assemble_embeddings(check: Callable, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, num_media = shape
    tensors = [draw(dtype, rows, columns), draw(dtype, columns), draw(dtype, num_media, columns)]
    gradient = draw(dtype, rows, columns, seed=1)
    positions = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:num_media]
    media_row = ops.media_rows(tensors[0], positions)
    leaves = exact(*tensors)
    out = reference.assemble_embeddings(leaves[0], text_type=leaves[1], features=leaves[2], positions=positions)
    expected = [out.detach(), *gradients([out], leaves, [gradient])]

    def case(kernels: ModuleType) -> list[Tensor]:
        forward = kernels.assemble_forward(*tensors, media_row)
        return [forward, *kernels.assemble_backward(gradient, media_row, num_media)]

    check(case, expected, [dtype] * 4)


@dtypes
@pytest.mark.parametrize("shards", [1, 8])
@pytest.mark.parametrize(
    ("shape", "ids"),
    [((1, 1), 8), ((32, 5), 1), ((33, 16), 1), ((70, 8), 24), ((97, 16), 2), ((0, 8), 8)],
    ids=["one", "one whole tile", "one run over tiles", "many", "two long runs", "empty"],
)
def test_token_rows(check: Callable, dtype: torch.dtype, shape: tuple[int, int], ids: int, shards: int) -> None:
    rows, columns = shape
    vocab = 24
    table, gradient = draw(dtype, vocab, columns), draw(dtype, rows, columns)
    tokens = torch.randint(ids, (rows,), generator=torch.Generator().manual_seed(rows)) * (vocab // ids)
    (leaf,) = exact(table)
    out = leaf[tokens]
    expected = [out.detach(), *gradients([out], [leaf], [gradient])]

    def case(kernels: ModuleType) -> list[Tensor]:
        size = vocab // shards
        firsts = range(0, vocab, size)
        parts = [kernels.token_rows(table[first : first + size], tokens, first) for first in firsts]
        backward = [kernels.token_rows_backward(gradient, tokens, first, size) for first in firsts]
        return [torch.stack(parts).sum(0), torch.cat(backward)]  # one rank's row and zeros: the sum is exact

    check(case, expected, [dtype] * 2)


@dtypes
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize(("shards", "shape"), [(1, (1, 1)), (1, (5, 1056)), (8, (3, 56)), (8, (9, 64)), (1, (0, 8))])
def test_cross_entropy(check: Callable, dtype: torch.dtype, shards: int, shape: tuple[int, int], masked: bool) -> None:
    rows, vocab = shape
    logits, weight, z_loss = 4 * draw(dtype, rows, vocab), draw(torch.float32, 2, rows), 0.01
    logits[::3] += 64.0  # exp() of these overflows without the maximum
    labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(rows))
    mask = (torch.arange(rows) % 4 != 2).float() if masked else None
    (leaf,) = exact(logits)
    losses = reference.cross_entropy(leaf, labels=labels, mask=mask, z_loss=z_loss)
    expected = [losses.detach(), *gradients([losses], [leaf], [weight])]
    if masked:
        logits[mask == 0] = torch.nan  # never read

    def case(kernels: ModuleType) -> list[Tensor]:
        parts = [part.clone() for part in logits.chunk(shards, dim=1)]
        firsts = range(0, vocab, vocab // shards)
        statistics = [kernels.cross_entropy_statistics(part, labels, mask, first) for part, first in zip(parts, firsts)]
        found, log_z = kernels.cross_entropy_combine(torch.stack(statistics), mask, z_loss)
        for part, first in zip(parts, firsts):
            kernels.cross_entropy_backward(part, weight, labels, mask, log_z, first, z_loss)
        return [found, torch.cat(parts, dim=1)]

    check(case, expected, [torch.float32, dtype])


def differentiable(name: str) -> tuple[list[Tensor], Callable, Callable]:
    """Return FP32 (inputs, inputs to outputs, inputs and weights of the outputs to gradients) of a kernel."""
    one = torch.float32
    if name == "swiglu":
        return (
            [draw(one, 4, 24)],
            lambda leaf: [native.swiglu(leaf)],
            lambda leaf, weight: [native.swiglu_backward(weight, leaf)],
        )
    if name == "rms_norm":

        def norm_gradients(*tensors: Tensor) -> list[Tensor]:
            hidden, residual, scale, of_sum, of_normed = tensors
            total, _, inverse = native.rms_norm(hidden, residual, scale, EPSILON)
            of_input, of_scale = native.rms_norm_backward(of_normed, of_sum, total, scale, inverse)
            return [of_input, of_input, of_scale]

        inputs = [draw(one, 4, 16), draw(one, 4, 16, seed=1), draw(one, 16)]
        return inputs, lambda *tensors: list(native.rms_norm(*tensors, EPSILON)[:2]), norm_gradients
    if name == "mqa_rope":
        angles = torch.outer(torch.arange(4.0), torch.linspace(1, 0.1, 8))
        turn = (angles.cos(), angles.sin())
        return (
            [draw(one, 4, 2, 16), draw(one, 4, 1, 2, 16), draw(one, 16), draw(one, 16, seed=1)],
            lambda query, key_value, *scales: list(native.mqa_rope(query, key_value, *turn, *scales, EPSILON)),
            lambda query, key_value, query_scale, key_scale, *weights: list(
                native.mqa_rope_backward(*weights, query, key_value, *turn, query_scale, key_scale, EPSILON)
            ),
        )
    if name == "assemble_embeddings":
        media_row = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
        return (
            [draw(one, 4, 8), draw(one, 8), draw(one, 2, 8)],
            lambda *tensors: [native.assemble_forward(*tensors, media_row)],
            lambda *tensors: list(native.assemble_backward(tensors[-1], media_row, 2)),
        )
    if name == "token_rows":
        ids = torch.tensor([2, 5, 2, 9, 3])
        return (
            [draw(one, 4, 8)],
            lambda table: [native.token_rows(table, ids, 2)],
            lambda table, weight: [native.token_rows_backward(weight, ids, 2, 4)],
        )
    labels, mask, z_loss = torch.tensor([3, 0, 7]), torch.tensor([1.0, 0.0, 1.0]), 0.1

    def losses(logits: Tensor) -> tuple[Tensor, Tensor]:
        statistics = native.cross_entropy_statistics(logits, labels, mask, 0)
        return native.cross_entropy_combine(statistics.unsqueeze(0), mask, z_loss)

    def logit_gradients(logits: Tensor, weight: Tensor) -> list[Tensor]:
        written = logits.clone()
        native.cross_entropy_backward(written, weight, labels, mask, losses(logits)[1], 0, z_loss)
        return [written]

    return [draw(one, 3, 8)], lambda logits: [losses(logits)[0]], logit_gradients


@pytest.mark.parametrize(
    "name", ["swiglu", "rms_norm", "mqa_rope", "assemble_embeddings", "token_rows", "cross_entropy"]
)
def test_gradients_are_those_of_finite_differences(on_host: simt.Host, name: str) -> None:
    inputs, forward, backward = differentiable(name)
    weights = [draw(torch.float32, *output.shape, seed=5) for output in forward(*inputs)]
    found = backward(*inputs, *weights)

    def weighed(tensors: list[Tensor]) -> float:
        outputs = zip(forward(*tensors), weights, strict=True)
        return sum((output.double() * weight).sum().item() for output, weight in outputs)

    step = 2.0**-7
    for place, gradient in enumerate(found):
        for seed in (6, 7):
            direction = draw(torch.float32, *gradient.shape, seed=seed)
            ends = [
                weighed([*inputs[:place], inputs[place] + sign * step * direction, *inputs[place + 1 :]])
                for sign in (1, -1)
            ]
            expected, scale = (ends[0] - ends[1]) / (2 * step), gradient.norm() * direction.norm()
            # Rounding 1e-7 / step of the sums, and step^2 of the third derivative.
            assert abs((gradient.double() * direction).sum() - expected) <= 1e-3 * scale


def test_a_row_too_wide_is_refused(on_host: simt.Host) -> None:
    wide = torch.zeros(1, 8193)
    with pytest.raises(ValueError, match="wider than the kernel holds"):
        native.rms_norm(wide, None, wide[0], EPSILON)
    heads = torch.zeros(1, 1, 258)
    with pytest.raises(ValueError, match="wider than the kernel holds"):
        native.mqa_rope(heads, torch.zeros(1, 1, 2, 258), *torch.zeros(2, 1, 129), None, None, EPSILON)


def test_a_nan_is_not_hidden(on_host: simt.Host) -> None:
    logits = torch.zeros(2, 64)
    logits[1, 40] = torch.nan
    statistics = native.cross_entropy_statistics(logits, torch.tensor([1, 2]), None, 0)
    losses, _ = native.cross_entropy_combine(statistics.unsqueeze(0), None, 0.0)
    assert losses[0].isnan().tolist() == [False, True]


def test_the_check_at_start_up_finds_nothing_and_finds_a_fault(
    on_host: simt.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cpu")  # native launches on the host
    assert start_up.disagreements(device) == []
    right = native.swiglu
    monkeypatch.setattr(native, "swiglu", lambda gate_and_up: right(gate_and_up.flip(-1)))
    assert [line.split(" (")[0] for line in start_up.disagreements(device)] == ["swiglu", "swiglu"]
    public = {name for name in vars(plain) if callable(getattr(plain, name)) and not name.startswith("_")}
    covered = set(start_up._cases(torch.float32))
    assert public - {"Tensor"} == covered
