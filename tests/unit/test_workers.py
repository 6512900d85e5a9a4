"""Workers: in order, within limits, and no item costs more than itself."""

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from megatron_mm.ingest.workers import Failure, Limits, Workers, restart_limits

LIMITS = Limits(wall_seconds=8.0, cpu_seconds=1, memory_gib=0.5)


@dataclass(frozen=True)
class Numbers:
    """A piece of work of the tests; it can be cut into its numbers."""

    values: tuple[int, ...]


def hang() -> None:
    time.sleep(600)


def spin() -> None:
    while True:
        pass


def hog() -> None:
    bytearray(2**30)


def crash() -> None:
    ctypes.string_at(0)


def leave() -> None:
    os._exit(3)


def blunder() -> None:
    raise KeyError("glyph")


FAULTS: dict[int, Callable[[], None]] = {-1: hang, -2: spin, -3: hog, -4: crash, -5: leave, -6: blunder}
REASONS = {
    -1: "more than 8 seconds",
    -2: "more than 1 seconds of CPU time",
    -3: "more than 0.5 GiB of memory",
    -4: "died (SIGSEGV)",
    -5: "died (exit status 3)",
    -6: "raised KeyError at test_workers.py:",
}


def make_square() -> Callable[[Numbers], list[int]]:
    def square(work: Numbers) -> list[int]:
        for value in work.values:
            if value < 0:
                FAULTS[value]()
        return [value * value for value in work.values]

    return square


def make_nothing() -> Callable[[Numbers], list[int]]:
    raise ValueError("no tokenizer here")


def cut(work: Numbers) -> list[Numbers]:
    return [Numbers((value,)) for value in work.values]


def test_results_come_in_the_order_of_the_work() -> None:
    work = [Numbers((value,)) for value in range(40)]
    with Workers(2, make_square) as workers:
        assert list(workers.run(iter(work))) == [(item, [item.values[0] ** 2]) for item in work]


def test_what_hangs_explodes_or_crashes_costs_only_itself() -> None:
    work = [Numbers((value,)) for value in (1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7)]
    with Workers(2, make_square, limits=LIMITS) as workers:
        results = list(workers.run(work))
    assert [item for item, _ in results] == work
    for item, result in results:
        value = item.values[0]
        if value > 0:
            assert result == [value * value]
        else:
            assert isinstance(result, Failure)
            assert REASONS[value] in result.reason


def test_work_that_fails_is_cut_and_its_good_parts_are_kept() -> None:
    work = [Numbers((1, 2)), Numbers((3, -5, 4)), Numbers((5,))]
    with Workers(1, make_square, limits=LIMITS, split=cut) as workers:
        results = list(workers.run(work))
    assert [item.values for item, _ in results] == [(1, 2), (3,), (-5,), (4,), (5,)]
    assert [result for _, result in results if not isinstance(result, Failure)] == [[1, 4], [9], [16], [25]]


def make_echo() -> Callable[[bytes], bytes]:
    def echo(work: bytes) -> bytes:
        if work.startswith(b"hang"):
            hang()
        return work

    return echo


def test_items_and_results_may_be_larger_than_a_pipe() -> None:
    # A worker that sends its result while it is sent its next item must not wait for ever.
    work = [bytes([number]) * 5 * 2**20 for number in range(12)]
    with Workers(2, make_echo, limits=Limits(wall_seconds=20.0)) as workers:
        assert [result for _, result in workers.run(work)] == work
    work[3] = b"hang" * 2**20
    with Workers(1, make_echo, limits=Limits(wall_seconds=3.0)) as workers:
        results = [result for _, result in workers.run(work)]
    assert [number for number, result in enumerate(results) if isinstance(result, Failure)] == [3]
    assert results[4:] == work[4:]


def make_slow() -> Callable[[Numbers], int]:
    def work(item: Numbers) -> int:
        for value in item.values:
            if value > 0:
                restart_limits(value)
            until = time.process_time() + 0.75
            while time.process_time() < until:
                pass
        return len(item.values)

    return work


def test_a_document_that_is_known_to_be_long_is_given_time() -> None:
    # The system counts whole seconds, so that a limit of 1 is one of 1 to 2.
    with Workers(1, make_slow, limits=Limits(wall_seconds=60.0, cpu_seconds=1)) as workers:
        (_, long), (_, short) = workers.run([Numbers((9, 0, 0)), Numbers((0, 0, 0))])
    assert long == 3
    assert "of CPU time" in short.reason


def make_sleeper() -> Callable[[Numbers], int]:
    def work(item: Numbers) -> int:
        for value in item.values:
            if value:
                restart_limits()
            time.sleep(1.1)
        return len(item.values)

    return work


def test_the_limits_of_an_item_are_those_of_each_of_its_documents() -> None:
    with Workers(1, make_sleeper, limits=Limits(wall_seconds=3.0)) as workers:
        results = [result for _, result in workers.run([Numbers((1, 1, 1)), Numbers((0, 0, 0))])]
    assert results[0] == 3 and results[1] == Failure("reading it took more than 3 seconds")
    restart_limits()  # outside of a worker nothing is limited


def test_a_worker_that_cannot_start_ends_the_run() -> None:
    with Workers(1, make_nothing) as workers, pytest.raises(RuntimeError, match="cannot start: (.|\n)*no tokenizer"):
        list(workers.run([Numbers((1,))]))
