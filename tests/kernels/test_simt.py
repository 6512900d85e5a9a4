"""The emulator itself: what it computes, and that each kind of fault is caught in whatever order threads run."""

from collections.abc import Iterator

import pytest
import simt
import torch

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def faults() -> Iterator[simt.Host]:
    program = simt.Host(simt.build("faults"))
    yield program
    program.close()


def run(faults: simt.Host, name: str, seed: int, blocks: int = 1) -> torch.Tensor:
    faults.seed = seed
    numbers = torch.arange(1, 64 * blocks + 1, dtype=torch.float32)
    numbers[1::2] *= -1
    out = torch.zeros_like(numbers)
    faults.launch(name, blocks, numbers, out)
    return out


@pytest.mark.parametrize("seed", SEEDS)
def test_a_correct_kernel_runs(faults: simt.Host, seed: int) -> None:
    out = run(faults, "correct", seed, blocks=3).view(3, 64)
    numbers = torch.arange(1, 193, dtype=torch.float32)
    numbers[1::2] *= -1
    assert torch.equal(out, numbers.view(3, 64).flip(1))
    assert run(faults, "ballot", seed)[0] == sum(1 << lane for lane in range(0, 24, 2))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "report"),
    [
        ("missing_barrier", "race on shared kept|shared kept.* is read before it is written"),
        ("race", "race on shared total"),
        ("stale_reuse", "race on shared kept"),
        ("out_of_bounds", "AddressSanitizer: heap-buffer-overflow"),
        ("shared_out_of_bounds", r"shared kept\[63\] is out of its bounds"),
        ("uninitialised_shared", r"shared kept\[5\] is read before it is written"),
        ("divergent_barrier", "divergent barrier: waits at line .*, others at line"),
        ("exit_before_barrier", "divergent barrier: waits at line .*, and 4 threads have exited"),
        ("exited_lane", "names lane 31, which has exited"),
        ("mask_without_own_lane", "mask lacks its own lane"),
        ("lane_outside_mask", "from lane .*, which is not in its mask"),
        ("absent_lane", "names lane 24, which the block lacks"),
        ("divergent_shuffle", "waits in a warp operation at line .* for lanes that do not come"),
        ("misaligned", "misaligned address"),
    ],
)
def test_a_planted_fault_is_caught(faults: simt.Host, name: str, report: str, seed: int) -> None:
    with pytest.raises(simt.Fault, match=report):
        run(faults, name, seed)


def test_a_result_that_depends_on_the_order_shows() -> None:
    program = simt.Host(simt.build("faults"))
    results = {run(program, "order_dependent", seed, blocks=8)[0].item() for seed in (*SEEDS, 3, 4)}
    program.close()
    assert len(results) > 1
