"""Copies in the memory of two nodes: a run that has lost one goes on from them, to the bit, or says why it cannot."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from small import TRAINED, small_config

from megatron_mm.checkpoint import copies as copying
from megatron_mm.checkpoint.copies import Copied, Copies
from megatron_mm.checkpoint.forked import Forked
from megatron_mm.checkpoint.format import COMMITTED, MANIFEST, Fence, TakenOver, read_manifest, whole_ones
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.training import checkpoints, loop
from megatron_mm.training.copies import begin_copy, make_copies, restore
from megatron_mm.training.metrics import read_metrics
from megatron_mm.training.state import TrainState, build_state
from megatron_mm.training.step import StepResult, train_step

STEPS = 7
BEFORE, AFTER = "aabb", "ccaa"
"""The hosts of ranks 0 to 3: host b is lost, and the spare c moves the ranks of host a."""


def run_of(shards: Path, run_dir: Path, *overrides: str) -> Config:
    """Return a run of TP2 DP2 that is on the disk after step 3 and in memory after steps 1, 2, 4 and 5."""
    return small_config(
        shards,
        run_dir,
        *("parallel.tp=2", "training.precision=bf16", "training.global_batch_size=2", f"training.steps={STEPS}"),
        *("checkpoint.interval=3", "checkpoint.memory_interval=1", f"checkpoint.memory_dir={run_dir.parent}/memory"),
        *overrides,
    )


def on_host(host: str) -> None:
    """Let this process stand on a host of this name, with memory of its own."""
    copying.host_name = lambda: host
    made = copying.memory_folder
    copying.memory_folder = lambda memory_dir, _: made(_memory(memory_dir, host), "run")


def _memory(memory_dir: str, host: str) -> str:
    folder = Path(memory_dir, host)
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def wait_for_copies() -> None:
    """Let every copy be written before training goes on: which ones there are does not depend on the time."""
    begin = Copies.begin

    def begin_and_wait(self: Copies, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        if isinstance(self._pending.writing, Forked):
            self._pending.writing.join()

    Copies.begin = begin_and_wait


def said() -> list[str]:
    """Return a list to which every later warning of the package is added."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("megatron_mm").addHandler(handler)
    return lines


def train(config: Config, hosts: str, *, killed: bool = False) -> dict[str, Any]:
    """Train as the command does, on hosts of these names; `killed` ends every rank with -9 in step 6."""
    mesh = meshes.cut(config)
    lines = said()
    on_host(hosts[mesh.rank])
    wait_for_copies()
    loop.plot_losses = lambda run_dir: run_dir

    def step(state: TrainState, batches: Any) -> StepResult:
        if killed and state.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(state, batches)

    loop.train_step = step
    state = loop.train(config, mesh)
    return {**contents(state), "said": "\n".join(lines)}


def contents(state: TrainState) -> dict[str, Any]:
    """Return all that a rank holds: weights, and the state of the optimizer."""
    whole = [one for chunk in state.chunks for one in chunk.state_dict().items()]
    held = {name: value.clone() for name, value in whole if value is not None}
    for number, part in enumerate(state.optimizer.chained_optimizers):
        for index, own in enumerate(part.optimizer.state.values()):
            held |= {f"{number}.{index}.{name}": value.clone() for name, value in own.items()}
    return {"step": state.step, "held": held}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["step"] == other["step"]
    assert one["held"].keys() == other["held"].keys()
    for name, value in one["held"].items():
        assert torch.equal(other["held"][name], value), name


@pytest.fixture(scope="module")
def killed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run_dir, with the memory of its hosts beside it, of a run that was killed in step 6."""
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    with pytest.raises(FileNotFoundError):  # no rank returns
        run_ranks(4, train, run_of(shards, run_dir), BEFORE, killed=True)
    assert [path.name for path in whole_ones(run_dir / "checkpoints")] == ["step_00000003"]
    return run_dir


def test_a_run_goes_on_from_memory_after_the_loss_of_a_node(killed: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(killed.parent, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "memory" / "b")
    whole = run_ranks(4, train, run_of(shards, tmp_path / "whole", "checkpoint.memory_interval=0"), BEFORE)
    seen = run_ranks(4, train, run_of(shards, tmp_path / "run"), AFTER)
    for one, other in zip(seen, whole):
        assert_same(one, other)
    assert "going on from step 5, of which the nodes have kept copies in memory" in seen[0]["said"]
    assert "2 of 4 ranks had their share from another node" in seen[0]["said"]
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if "grad_norm" in record] == list(range(1, STEPS + 1))
    assert not any((tmp_path / "memory").glob("*/megatron_mm-*/*"))  # freed


def shares(memory: Path, step: int, rank: int) -> list[Path]:
    """Return both copies of a share."""
    found = sorted(memory.glob(f"*/megatron_mm-*/*/step_{step:08d}/rank_{rank:05d}.bin"))
    assert len(found) == 2
    return found


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(path: Path, **facts: Any) -> Path:
    """Let the manifest of a checkpoint say something else, and be whole."""
    text = json.dumps({**json.loads((path / MANIFEST).read_text()), **facts})
    (path / MANIFEST).write_text(text)
    (path / COMMITTED).write_text(hashlib.sha256(text.encode()).hexdigest())
    return path


Case = tuple[Path, Path, tuple[str, ...]]
"""The memory, the newest checkpoint, and settings beside those of the run."""


def break_them(root: Path, run_dir: Path) -> dict[str, Case]:
    """Return broken copies by what is wrong with them."""
    newest = run_dir / "checkpoints" / "step_00000003"
    other = shutil.copytree(run_dir, root / "other")
    (other / "left_out.json").write_text(json.dumps({"run": read_manifest(newest)["run"], "left_out": [[4, 2, 2]]}))
    names = ("flipped", "both flipped", "lost", "run", "lives", "newer", "left out", "settings", "layout")
    memory = {name: shutil.copytree(run_dir.parent / "memory", root / name) for name in names}
    flip(shares(memory["flipped"], 5, rank=0)[0])
    for path in shares(memory["both flipped"], 5, rank=1):
        flip(path)
    for step in (4, 5):
        shares(memory["lost"], step, rank=2)[0].unlink()
    shutil.rmtree(memory["lost"] / "b")
    cases: dict[str, Case] = {name: (memory[name], newest, ()) for name in names}
    for name, facts in (("run", {"run": "another"}), ("lives", {"lives": ["another"]}), ("newer", {"step": 5})):
        copy = shutil.copytree(newest, root / f"of {name}" / f"step_{facts.get('step', 3):08d}")
        cases[name] = (memory[name], edit(copy, **facts), ())
    cases["left out"] = (memory["left out"], newest, (f"run_dir={other}",))
    cases["settings"] = (memory["settings"], newest, ("data.seed=9",))
    cases["layout"] = (memory["layout"], newest, ("parallel.tp=1",))
    return cases


def try_all(shards: Path, run_dir: Path, cases: dict[str, Case]) -> dict[str, tuple[int | None, str]]:
    """Return to which step a run comes from memory in each case, and what it says."""
    lines, seen = said(), {}
    mesh = meshes.cut(run_of(shards, run_dir))
    on_host(BEFORE[mesh.rank])
    state = build_state(run_of(shards, run_dir), mesh)
    for name, (memory, newest, overrides) in cases.items():
        lines.clear()
        config = run_of(shards, run_dir, f"checkpoint.memory_dir={memory}", *overrides)
        if config.parallel != state.config.parallel:
            state = build_state(config, meshes.cut(config))
        state.config = config
        copies = make_copies(state, None)
        seen[name] = (restore(state, copies, newest=newest), "\n".join(lines))
    return seen


def test_what_is_not_whole_or_not_of_this_run_is_named(killed: Path, shards: Path, tmp_path: Path) -> None:
    seen = run_ranks(4, try_all, shards, killed, break_them(tmp_path, killed))[0]
    print(seen)
    expected = {
        "flipped": (5, "rank_00000.bin on a has other bytes than were written; the share's other copy is taken"),
        "both flipped": (4, "the copy of step 5 in memory is not used: .*the share of rank 1 is whole on no node"),
        "lost": (None, "step 5 in memory is not used: .*the share of rank 2 is whole on no node"),
        "run": (None, "it is of another run"),
        "lives": (None, "the run has gone another way since: step_00000003"),
        "newer": (None, "step_00000005 is not older"),
        "left out": (None, "the run has left out other batches since"),
        "settings": (None, "was saved with other settings, which a resumed run cannot change:\n  data.seed"),
        "layout": (None, "it is of the layout TP2 PP1 DP2 on 4 ranks, this one is TP1 PP1 DP4 on 4 ranks"),
    }
    for name, (step, reason) in expected.items():
        assert seen[name][0] == step, (name, seen[name])
        assert re.search(reason, seen[name][1]), (name, seen[name])


def copy_and_come_back(shards: Path, run_dir: Path) -> dict[str, str]:
    """Come back from copies to the bit, with FP32 weights that are gathered late; return what was said of failures."""
    overrides = ("training.precision=fp32", "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    config = run_of(shards, run_dir, *overrides, *TRAINED)
    mesh, lines, seen = meshes.cut(config), said(), {}
    on_host(BEFORE[mesh.rank])
    other = copying.memory_folder(config.checkpoint.memory_dir, "").with_name("other")
    if mesh.rank in (0, 2):
        other.mkdir(mode=0o700)
        (other / "lock").write_text("/gone/run\n")
    dist.barrier()
    state = build_state(config, mesh)
    batches = Loader(config.data.train, config=config, mesh=mesh).step(0)
    train_step(state, batches)
    checkpoints.save(state)
    state.lives = ["this"]
    copies = make_copies(state, checkpoints.take_over(config, mesh))
    seen["leftover"] = "\n".join(lines)
    assert not other.exists()
    train_step(state, batches)
    assert copy(state, copies).step == 2, lines
    before = contents(state)
    train_step(state, batches)
    lines.clear()
    if mesh.rank == 1:
        copying.write_share = fail
    assert copy(state, copies) is None
    seen["failure"] = "\n".join(lines)
    assert restore(state, copies, newest=checkpoints.newest(config)) == 2, lines
    assert_same(contents(state), before)
    copying.write_share = written
    if mesh.is_rank_0:
        Fence.take(checkpoints.folder(config))
    with pytest.raises(TakenOver):
        copy(state, copies)
    copies.close()
    dist.barrier()
    assert not copies.folder.exists()
    return seen


written = copying.write_share


def fail(*_: Any, **__: Any) -> str:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def copy(state: TrainState, copies: Copies) -> Copied | None:
    begin_copy(state, copies)
    copies._pending.writing.join()
    dist.barrier()
    return copies.poll()


def test_a_copy_that_fails_leaves_the_one_before(shards: Path, tmp_path: Path) -> None:
    seen = run_ranks(4, copy_and_come_back, shards, tmp_path / "run")
    assert "a has copies of /gone/run, which no longer runs: removed" in seen[0]["leftover"]
    assert "step 3 is not copied to memory: rank 1 on a: OSError: [Errno 28]" in seen[0]["failure"]
