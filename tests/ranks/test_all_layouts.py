"""Every layout that 8 ranks allow trains the model of one rank, whatever the model is made of.

`make test` runs every seventh layout of 8 ranks, each with one kind of model, in turn. `make test-layouts` runs every
layout of 2, 4 and 8 ranks with one kind each, and `make test-layouts KINDS=all` with every kind.
"""

import itertools
import os
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from small import TRAINED, layout, small_config, write_shards
from test_layouts import assert_same_curve, curve

STEPS = 2
HEADS = 8
"""So that every tensor-parallel size up to 8 has whole heads."""
KINDS_OF_EACH = os.environ.get("MEGATRON_MM_KINDS", "some")

KINDS = [
    ("text", "mqa", "none", "frozen"),
    ("text", "gqa", "selective", "trained"),
    ("text", "mha", "full", "frozen"),
    ("media", "mqa", "full", "trained"),
    ("media", "gqa", "none", "trained"),
    ("media", "mha", "selective", "frozen"),
    ("media", "mqa", "selective", "frozen"),
    ("media", "gqa", "full", "frozen"),
    ("media", "mha", "none", "trained"),
]
"""(data, attention, recomputation, encoders): any two values of different columns meet in at least one row."""
GROUPS = {"mqa": 1, "gqa": 2, "mha": HEADS}


def layouts(world_size: int) -> Iterator[str]:
    """Yield every (tp, cp, pp, vpp) of `world_size` ranks that six layers, an embedding and a loss slot allow."""
    sizes = (1, 2, 4, 8)
    for tp, cp, pp, vpp in itertools.product(sizes, sizes, sizes, (1, 2, 4)):
        dp, rest = divmod(world_size, tp * cp * pp)
        if rest or not dp or 8 % (pp * vpp) or (vpp > 1 and (pp == 1 or (8 // dp) % pp)):
            continue
        yield f"tp={tp} cp={cp} pp={pp} vpp={vpp}"


def overrides_of(kind: Sequence[str]) -> list[str]:
    _, attention, recompute, encoders = kind
    return [
        f"model.num_attention_heads={HEADS}",
        f"model.num_query_groups={GROUPS[attention]}",
        f"training.recompute={recompute}",
        *(TRAINED if encoders == "trained" else ()),
    ]


def compare(runs: list[tuple[str, Any, str]]) -> list[str]:
    """Train each (name, config, file of the curve of one rank) and return the names; fail at the first that differs."""
    for name, config, expected in runs:
        try:
            assert_same_curve(curve(config, STEPS), pickle.loads(Path(expected).read_bytes()))
        except Exception as error:
            raise AssertionError(f"a model of {name} differs from that of one rank") from error
    return [name for name, _, _ in runs]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text")
    return {"media": shards, "text": write_shards(folder, text_only=True)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> dict[tuple, Path]:
    """The file of the curve of one rank, for each kind of model that is compared."""
    folder = tmp_path_factory.mktemp("curves")
    files = {}
    for kind in {kind for _, _, kinds in chosen() for kind in kinds}:
        (seen,) = run_ranks(1, curve, small_config(data[kind[0]], "unused", *overrides_of(kind)), STEPS)
        files[kind] = folder / "-".join(kind)
        files[kind].write_bytes(pickle.dumps(seen))
    return files


def test_any_two_values_meet_in_a_kind() -> None:
    columns = list(zip(*KINDS))
    for first, second in itertools.combinations(range(4), 2):
        met = {(kind[first], kind[second]) for kind in KINDS}
        assert met == set(itertools.product(columns[first], columns[second]))


def test_the_layouts_of_8_ranks_are_all_there() -> None:
    found = list(layouts(8))
    assert len(found) == len(set(found)) == 35
    assert {"tp=8 cp=1 pp=1 vpp=1", "tp=1 cp=8 pp=1 vpp=1", "tp=1 cp=1 pp=8 vpp=1", "tp=2 cp=2 pp=2 vpp=4"} <= set(
        found
    )


def chosen() -> list[tuple[int, str, list[tuple[str, ...]]]]:
    """Return (ranks, layout, kinds of model) of every test."""
    found = []
    for world_size in (8,) if KINDS_OF_EACH == "some" else (2, 4, 8):
        for text in list(layouts(world_size))[:: 7 if KINDS_OF_EACH == "some" else 1]:
            found.append((world_size, text, KINDS if KINDS_OF_EACH == "all" else [KINDS[len(found) % len(KINDS)]]))
    return found


@pytest.mark.parametrize(("world_size", "text", "kinds"), chosen())
def test_every_layout_gives_the_curve_of_one_rank(
    world_size: int, text: str, kinds: list[tuple[str, ...]], data: dict[str, Path], alone: dict[tuple, Path]
) -> None:
    runs = [
        (", ".join(kind), small_config(data[kind[0]], "unused", *overrides_of(kind), *layout(text)), str(alone[kind]))
        for kind in kinds
    ]
    assert run_ranks(world_size, compare, runs) == [[name for name, _, _ in runs]] * world_size
