"""Each patch is still needed: without it, torch or megatron-core still does what its reason says.

A test here that fails says that upstream has changed: take the patch out of the table, with its test.
"""

import contextlib
import errno
import io
import multiprocessing
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_alone
from small import layout, small_config
from torch.distributed.checkpoint import FileSystemReader

from megatron_mm import retry
from megatron_mm.checkpoint.index import IndexUnpickler
from megatron_mm.config import Config
from megatron_mm.engine import device, patches
from megatron_mm.engine.patches import BUCKET_GROUP, PATCHES
from megatron_mm.retry import be_patient

CUDA_IS_MISSING = "CUDA|NVIDIA"
"""What torch says of a CUDA that is not there: it depends on how torch was built and the process began."""
Exercise = Callable[[Config], Any]


def join(config: Config, *, world_size: int = 1) -> Any:
    """Return the mesh of the first rank of a run; with more than one, the others are fake."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_mm.engine import mesh as meshes

    device.prepare()
    store = dist.HashStore() if world_size == 1 else FakeStore()
    dist.init_process_group("gloo" if world_size == 1 else "fake", store=store, rank=0, world_size=world_size)
    return meshes.cut(config)


def step(config: Config, *, world_size: int = 1) -> Any:
    """Return the state after a training step."""
    from megatron_mm.data.loader import Loader
    from megatron_mm.training.state import build_state
    from megatron_mm.training.step import train_step

    mesh = join(config, world_size=world_size)
    state = build_state(config, mesh)
    train_step(state, Loader(config.data.train, config=config, mesh=mesh).step(0))
    return state


def one_step(config: Config) -> None:
    step(config)


def step_of_two_stages(config: Config) -> None:
    step(config, world_size=2)


def random_states(config: Config) -> dict[str, bytes]:
    """Return the random states that each tensor-parallel region starts from."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    join(config)
    return {name: state.numpy().tobytes() for name, state in get_cuda_rng_tracker().get_states().items()}


def forked_differs(config: Config) -> bool:
    """Tell whether a fork draws from a random state of its own."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    join(config)
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        return not torch.equal(before, torch.get_rng_state())


def reductions_of_one_rank(config: Config) -> int:
    """Return the collectives that data parallelism makes in its group of one rank."""
    from megatron.core.distributed import param_and_grad_buffer

    patches._require_gradient_sync = lambda: None
    calls, reduce_scatter = [], param_and_grad_buffer.dist_reduce_scatter_func

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return reduce_scatter(*args, **kwargs)

    param_and_grad_buffer.dist_reduce_scatter_func = count
    step(config)
    return len(calls)


def processes_of_a_save(config: Config) -> list[str]:
    """Return the kinds of processes that run beside a save that is planned."""
    from megatron_mm.training import checkpoints

    state = step(config)
    saver = checkpoints.make_saver(state)
    checkpoints.begin_save(state, saver)
    kinds = sorted(type(process).__name__ for process in multiprocessing.active_children())
    saver.finish()
    return kinds


def exchanges_of_a_plan(config: Config) -> int:
    """Return how often a rank that plans a save looks whether another one has failed, at the end included."""
    from megatron_mm.training import checkpoints

    state = step(config)
    saver, looks = checkpoints.make_saver(state), []
    saver._check_peers = lambda: looks.append(1)
    checkpoints.begin_save(state, saver)
    saver.finish()
    return len(looks)


def rehearse(config: Config) -> None:
    from megatron_mm.planning import rehearsal

    rehearsal.rehearse(config, rank=0, world_size=1, on="cpu")


def rehearse_one_of_two(config: Config) -> None:
    from megatron_mm.planning import rehearsal

    rehearsal.rehearse(config, rank=0, world_size=2, on="cpu")


def random_states_read_in_a_rehearsal(config: Config) -> int:
    """Return how often a rehearsed step forks the random state and reads it."""
    reads, read = [], torch.get_rng_state

    def count() -> torch.Tensor:
        if sys._getframe(1).f_code.co_name == "fork":
            reads.append(1)
        return read()

    torch.get_rng_state = count
    parallel = config.parallel.model_copy(update={"tp": 2})
    rehearse_one_of_two(config.model_copy(update={"parallel": parallel}))
    return len(reads)


class Payload:
    """Something that a checkpoint should not hold: what unpickles it runs code."""

    def __reduce__(self) -> tuple:
        return print, ("executed",), None


def executed_by_index(config: Config) -> str:
    """Return what reading an index with code in it prints, or raises."""
    from torch.distributed.checkpoint import FileSystemReader

    folder = Path(config.run_dir)
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    return printed(folder, lambda: FileSystemReader(folder).read_metadata())


def executed_by_object(config: Config) -> str:
    """Return what loading an object with code in it prints, or raises."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    data = io.BytesIO()
    torch.save(Payload(), data)
    data.seek(0)
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="common_state"))
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    return printed(Path(config.run_dir), lambda: planner.load_bytes(item, data))


class PlanOfAFailingDisk:
    """A plan to read nothing, which the disk refuses once."""

    times = 0

    @property
    def items(self) -> list:
        self.times += 1
        if self.times == 1:
            raise OSError(errno.EIO, "Input/output error")
        return []


def times_read(config: Config) -> int:
    be_patient(1.0)
    retry.FIRST_SECONDS = 1e-3
    plan = PlanOfAFailingDisk()
    with patches.only_plain_data(Path(config.run_dir), IndexUnpickler), contextlib.suppress(OSError):
        FileSystemReader(config.run_dir).read_data(plan, None).wait()
    return plan.times


def printed(folder: Path, load: Callable[[], Any]) -> str:
    out, sys.stdout = sys.stdout, io.StringIO()
    try:
        with patches.only_plain_data(folder, IndexUnpickler):
            load()
    except Exception as error:
        return f"{sys.stdout.getvalue()}{type(error).__name__}"
    finally:
        text, sys.stdout = sys.stdout.getvalue(), out
    return text


RAISES: dict[str, tuple[Exercise, str, tuple[str, ...]]] = {
    "torch.cuda.current_device": (one_step, CUDA_IS_MISSING, ()),
    "torch.cuda.current_stream": (one_step, CUDA_IS_MISSING, ("parallel.overlap_grad_reduce=true",)),
    "torch.cuda.synchronize": (step_of_two_stages, CUDA_IS_MISSING, tuple(layout("pp=2"))),
    "torch.cuda.get_rng_state": (one_step, CUDA_IS_MISSING, ()),
    "torch.tensor": (one_step, CUDA_IS_MISSING, ()),
    "torch.Tensor.type": (one_step, "must be one of torch.cuda.FloatTensor", ()),
    "megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda": (one_step, "you must install APEX", ()),
    "torch.nn.Module._apply": (rehearse, "Couldn't swap", ()),
    "torch.distributed.all_gather_object": (rehearse_one_of_two, "is not supported for tensor subclasses", ()),
    "megatron.core.optimizer.clip_grads.l2_norm_impl": (rehearse, "its data is not allocated", ()),
}
"""By patch: what cannot be done without it, what is said then, and the overrides that it takes."""
DIFFERS: dict[str, tuple[Exercise, Callable[[Any], bool]]] = {
    "torch.cuda.manual_seed": (random_states, lambda states: len(set(states.values())) == len(states) > 1),
    "torch.cuda._lazy_call": (forked_differs, lambda differs: differs),
    f"{BUCKET_GROUP}.start_grad_sync": (reductions_of_one_rank, lambda count: count == 0),
    "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue": (
        processes_of_a_save,
        lambda kinds: "SpawnProcess" not in kinds,
    ),
    "torch.distributed.broadcast_object_list": (exchanges_of_a_plan, lambda looks: looks > 1),
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork": (
        random_states_read_in_a_rehearsal,
        lambda count: count == 0,
    ),
    "torch.distributed.checkpoint.filesystem.pickle": (executed_by_index, lambda text: "executed" not in text),
    "torch.distributed.checkpoint.DefaultLoadPlanner.load_bytes": (
        executed_by_object,
        lambda text: "executed" not in text,
    ),
    "torch.distributed.checkpoint.filesystem.FileSystemReader.read_data": (times_read, lambda times: times == 2),
}
"""By patch: what can be done without it, but with a result that is right only with it."""


def done_without(name: str, exercise: Exercise, config: Config) -> Any:
    """Return what `exercise` returns, or the error that it raises, in a process without the patch `name`."""
    patches.PATCHES = tuple(patch for patch in PATCHES if patch.name != name)
    assert len(patches.PATCHES) == len(PATCHES) - bool(name)
    try:
        return exercise(config)
    except Exception as error:
        return error


@pytest.fixture
def config(shards: Path, tmp_path: Path) -> Config:
    return small_config(shards, tmp_path / "run", "training.global_batch_size=2", "training.recompute=full")


def test_the_page_shows_the_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "patches.md"
    shown = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    names = [", ".join(f"`{name}`" for name in patch.replaces) for patch in PATCHES]
    rest = [f"{patch.reason} | {patch.when} | {patch.traced} | {patch.upstream}" for patch in PATCHES]
    assert shown == [f"| {own} | {other} |" for own, other in zip(names, rest)]


def test_every_patch_is_tested() -> None:
    assert sorted([*RAISES, *DIFFERS]) == sorted(patch.name for patch in PATCHES)


@pytest.mark.parametrize("name", RAISES)
def test_it_cannot_be_done_without(name: str, shards: Path, tmp_path: Path) -> None:
    exercise, message, overrides = RAISES[name]
    config = small_config(shards, tmp_path, "training.global_batch_size=2", "training.recompute=full", *overrides)
    error = run_alone(done_without, name, exercise, config)
    assert isinstance(error, Exception), f"{name} is replaced for nothing: nothing failed without it"
    print(name, error)
    assert re.search(message, str(error)), error


@pytest.mark.parametrize("exercise", dict.fromkeys(exercise for exercise, *_ in RAISES.values()))
def test_it_can_be_done_with_all(exercise: Exercise, shards: Path, tmp_path: Path) -> None:
    config = small_config(
        shards, tmp_path, "training.global_batch_size=2", "training.recompute=full",
        *(layout("pp=2") if exercise is step_of_two_stages else []),
    )  # fmt: skip
    error = run_alone(done_without, "", exercise, config)
    assert not isinstance(error, Exception), error


@pytest.mark.parametrize("name", DIFFERS)
def test_it_is_wrong_without(name: str, config: Config) -> None:
    exercise, is_right = DIFFERS[name]
    assert is_right(run_alone(done_without, "", exercise, config))
    config = config.model_copy(update={"run_dir": config.run_dir + "_without"})
    found = run_alone(done_without, name, exercise, config)
    print(name, found)
    assert not isinstance(found, Exception), found
    assert not is_right(found), f"{name} is replaced for nothing: {found} is right without it"
