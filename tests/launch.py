"""run_ranks: call a function on several gloo ranks of this machine and return what each of them returned.

run_command: run the package's command line in such a process, without the seconds that its imports take.
run_isolated: call a function in an interpreter that has imported nothing yet.
"""

import contextlib
import io
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

TIMEOUT_SECONDS = 900
PRELOAD = ["no_accelerators", "megatron_mm.training.loop", "megatron_mm.train", "tokenizers", "PIL.Image"]

# One clean server imports what the ranks need and forks them: neither an import nor an autograd thread for each.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


def _start_server() -> None:
    """Start the server that forks the ranks, once, where it finds the module that keeps accelerators out."""
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()


def run_command(*arguments: str) -> Ended:
    """Return how `python -m megatron_mm.train ARGUMENTS` ends."""
    return run_alone(_main, list(arguments))


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """Return [function(*args, **kwargs) on rank 0, on rank 1, ...]; raise what a rank raised, with its rank."""
    return _run(world_size, function, *args, joined=True, **kwargs)


def run_alone(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args), called in a process that is in no process group."""
    (result,) = _run(1, function, *args, joined=False)
    return result


def run_until_end(function: Callable[..., Any], *args: Any) -> int:
    """Return how a process that calls function(*args) ends: 0, or less its signal if one killed it."""
    _start_server()
    process = _context.Process(target=function, args=args)
    process.start()
    process.join(TIMEOUT_SECONDS)
    assert process.exitcode is not None, f"the process did not finish in {TIMEOUT_SECONDS} s"
    return process.exitcode


def start_ranks(world_size: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Start function(*args) on several ranks that meet in `folder`, and return their processes, to be killed."""
    folder.mkdir(parents=True)
    _start_server()
    processes = [
        _context.Process(target=_run_rank, args=(rank, world_size, str(folder), True, function, args, {}))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def run_isolated(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args), called in a fresh interpreter."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result(TIMEOUT_SECONDS)


def _main(arguments: list[str]) -> Ended:
    from megatron_mm.train import main

    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        status = main(arguments)
    return Ended(status, stdout.getvalue(), stderr.getvalue())


def _run(world_size: int, function: Callable[..., Any], *args: Any, joined: bool, **kwargs: Any) -> list[Any]:
    """Run a function in `world_size` processes, `joined` in a process group or not."""
    _start_server()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _context.Process(target=_run_rank, args=(rank, world_size, folder, joined, function, args, kwargs))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            if any(Path(folder, f"{rank}.error").exists() for rank in range(world_size)):
                time.sleep(1.0)  # the others may fail for the same reason: let the first cause be written
                break
            time.sleep(0.02)
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        if errors := sorted(Path(folder).glob("*.error"), key=lambda path: path.stat().st_mtime_ns):
            # The first: others may only have lost it.
            raise AssertionError(f"rank {errors[0].stem} of {world_size} failed:\n{errors[0].read_text()}")
        if late:
            raise AssertionError(f"ranks {late} of {world_size} did not finish in {TIMEOUT_SECONDS} s")
        return [pickle.loads(Path(folder, f"{rank}.result").read_bytes()) for rank in range(world_size)]


def _run_rank(
    rank: int, world_size: int, folder: str, joined: bool, function: Callable[..., Any], args: tuple, kwargs: dict
) -> None:
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        if joined:
            from megatron_mm.engine import device  # imports torch, which processes that only launch are spared

            device.prepare(rank, world_size)
            store = dist.FileStore(f"{folder}/store", world_size)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        result = function(*args, **kwargs)
        partial = Path(folder, f"{rank}.partial")
        partial.write_bytes(pickle.dumps(result))
        if joined:
            dist.barrier()
        partial.rename(Path(folder, f"{rank}.result"))
        if joined:
            dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
