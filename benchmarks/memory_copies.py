"""How soon a run is back: from copies in the memory of two nodes, and from the newest checkpoint on disk.

    python benchmarks/memory_copies.py [--ranks 2] [--rounds 5] [--folder DIR] [--memory /dev/shm]

Data-parallel ranks of the preset tiny with a larger decoder (a checkpoint of about 430 MB), each on a node of its own
in name. In turns they save to disk in the background, copy to memory, and come back: from the checkpoint, as a start
does (verified, then loaded); from memory; and from memory after the loss of the last node, whose rank gets its share
over TCP. The stalls are what training waits for a save and for a copy. All is on one machine, so the page cache stands
in for a disk, which is to the disk's advantage.
"""

import argparse
import functools
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from checkpoint_stall import SETTINGS
from verdict import finish

BAR = 1.0
"""Back from memory to back from the disk's page cache."""


def rank_main(rank: int, ranks: int, rounds: int, folder: str, memory: str, results: multiprocessing.Queue) -> None:
    """Be one rank: save, copy and come back in turns."""
    from megatron_mm.engine import device

    device.keep_out_accelerators()  # before megatron-core is imported
    from megatron_mm import config as configs
    from megatron_mm.checkpoint import copies as copying
    from megatron_mm.data.loader import Loader
    from megatron_mm.engine import mesh as meshes
    from megatron_mm.training import checkpoints
    from megatron_mm.training.copies import begin_copy, make_copies, restore
    from megatron_mm.training.state import build_state
    from megatron_mm.training.step import train_step

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29714"}
    torch.set_num_threads(1)
    host = Path(memory, f"host{rank}")
    host.mkdir()
    copying.host_name = lambda: host.name
    made = copying.memory_folder
    copying.memory_folder = lambda memory_dir, run_dir: made(f"{memory_dir}/{host.name}", run_dir)
    copied = ["checkpoint.memory_interval=1", f"checkpoint.memory_dir={memory}"]
    config = configs.load("tiny", [*SETTINGS, f"run_dir={folder}/run", *copied])
    mesh = meshes.initialize(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    saver, copies = checkpoints.make_saver(state), make_copies(state, None)
    seconds = defaultdict(list)

    def timed(name: str, action) -> None:
        dist.barrier()
        started = time.perf_counter()
        action()
        dist.barrier()
        seconds[name].append(time.perf_counter() - started)

    for _ in range(rounds + 1):  # the first round warms up
        train_step(state, loader.step(state.step))
        checkpoints.begin_save(state, saver)
        while (saved := saver.poll()) is None:
            time.sleep(0.05)
        seconds["save stall"].append(saved.stall_seconds)
        seconds["save until it counts"].append(saved.seconds)
        train_step(state, loader.step(state.step))
        begin_copy(state, copies)
        while (one := copies.poll()) is None:
            time.sleep(0.05)
        seconds["copy stall"].append(one.stall_seconds)
        seconds["copy until it counts"].append(one.seconds)
        newest = checkpoints.newest(config)
        timed("back from disk", functools.partial(checkpoints.resume, state))
        timed("back from memory", functools.partial(restore, state, copies, newest=newest))
        assert state.step == one.step
        if rank == ranks - 1:
            shutil.rmtree(copies.folder / f"step_{one.step:08d}")
        timed("back from memory, one node lost", functools.partial(restore, state, copies, newest=newest))
        assert state.step == one.step
        copies.drop()
    size = sum(file.stat().st_size for file in newest.iterdir()) / 1e6
    copies.close()
    if rank == 0:
        results.put(({name: times[1:] for name, times in seconds.items()}, size))
    meshes.leave()


def main() -> None:
    """Start the ranks and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to save (default: the folder for temporary files)")
    parser.add_argument("--memory", default="/dev/shm", help="where to copy")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        tempfile.TemporaryDirectory(dir=options.memory) as memory,
    ):
        arguments = (options.ranks, options.rounds, folder, memory, results)
        ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(options.ranks)]
        for process in ranks:
            process.start()
        while results.empty():
            if any(process.exitcode for process in ranks):
                raise SystemExit("a rank has failed")
            time.sleep(0.1)
        seconds, size = results.get()
        for process in ranks:
            process.join()
    print(f"{options.ranks} data-parallel ranks, a checkpoint of {size:.0f} MB, {options.rounds} rounds\n")
    print(f"{'':<34}{'median':>9}{'least':>9}{'most':>9}")
    for name, times in seconds.items():
        print(f"{name:<34}{statistics.median(times):>8.3f}s{min(times):>8.3f}s{max(times):>8.3f}s")
    ours = statistics.median(seconds["back from memory, one node lost"])
    finish("memory_copies", ours=ours, peer=statistics.median(seconds["back from disk"]), bar=BAR)


if __name__ == "__main__":
    main()
