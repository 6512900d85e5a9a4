"""How long training stands still for a checkpoint: in the background, beside megatron-core's synchronous save.

    python benchmarks/checkpoint_stall.py [--tp 2] [--ranks 2] [--rounds 5] [--folder DIR]

Ranks of the preset tiny with a larger decoder (a checkpoint of about 430 MB) save in turns: ours in the background, and
dist_checkpointing.save, which returns when all is written. The stall is what a rank waits for a save from its beginning
to the next step and, in the background, for its commit some steps later. Steps that run beside the writing, and beside
the reading back from the disk, are slower where the cores are few: that is shown too. With --tp 1 the ranks are
data-parallel: the synchronous save first gathers the optimizer state over them, which is megatron-core's form that fits
every layout; ours writes each rank's share.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from verdict import finish

STEPS_BETWEEN = 4
BAR = 0.5
"""Ours to the synchronous save: writing is the larger part of a save even into the page cache of this machine."""
SETTINGS = (
    *("model.num_layers=6", "model.hidden_size=512", "model.ffn_hidden_size=1536", "model.num_attention_heads=8"),
    *("model.head_dim=64", "training.global_batch_size=2", "training.micro_batch_size=1", "evaluation.interval=0"),
    *("logging.tensorboard=false", "checkpoint.keep=1", "model.vocab_size=8192"),
)


def gathered(state: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the state as megatron-core describes it in its form that fits every layout."""
    chunks = {"model": state.chunks[0].sharded_state_dict(metadata=metadata)}
    return {**chunks, "optimizer": state.optimizer.sharded_state_dict(chunks["model"], metadata=metadata)}


def rank_main(rank: int, ranks: int, tp: int, rounds: int, folder: str, results: multiprocessing.Queue) -> None:
    """Be one rank: train, and save in both ways in turns."""
    from megatron_mm.engine import device

    device.keep_out_accelerators()  # before megatron-core is imported
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_mm import config as configs
    from megatron_mm.data.loader import Loader
    from megatron_mm.engine import mesh as meshes
    from megatron_mm.training import checkpoints
    from megatron_mm.training.state import build_state
    from megatron_mm.training.step import train_step

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29713"}
    torch.set_num_threads(1)
    config = configs.load("tiny", [*SETTINGS, f"parallel.tp={tp}", f"run_dir={folder}/ours"])
    mesh = meshes.initialize(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    filesystem_async._results_queue = None  # what this package leaves there is no queue
    filesystem_async.get_write_results_queue("fork")  # as quick as the peer can be: it would start an interpreter
    queue = filesystem_async._results_queue
    saver = checkpoints.make_saver(state)
    stalls: dict[str, list[float]] = {"background": [], "synchronous": []}
    steps: dict[str, list[float]] = {"alone": [], "beside": [], "beside reading": []}
    spent: dict[str, list[float]] = {"until committed": [], "read back": []}

    def step(kind: str) -> None:
        started = time.perf_counter()
        train_step(state, loader.step(state.step))
        steps[kind].append(time.perf_counter() - started)

    for _ in range(rounds + 1):  # the first round warms up
        for _ in range(STEPS_BETWEEN):
            step("alone")
        checkpoints.begin_save(state, saver)
        while (saved := saver.poll()) is None:
            step("beside" if saver._pending.read_back is None else "beside reading")
        stalls["background"].append(saved.stall_seconds)
        spent["until committed"].append(saved.seconds)
        spent["read back"].append(saved.read_back_seconds)
        step("alone")
        dist.barrier()
        started = time.perf_counter()
        path = Path(folder) / "peer"
        if rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        dist.barrier()
        metadata = checkpoints._metadata(state)
        filesystem_async._results_queue = queue
        dist_checkpointing.save(gathered(state, metadata), str(path))
        dist.barrier()
        stalls["synchronous"].append(time.perf_counter() - started)
    size = sum(file.stat().st_size for file in saved.path.iterdir()) / 1e6
    if rank == 0:
        results.put(({kind: times[1:] for kind, times in (stalls | spent).items()}, steps, size))
    meshes.leave()


def main() -> None:
    """Start the ranks and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel size (default 2); the rest is data-parallel")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="where to write (default: the folder for temporary files)")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        arguments = (options.ranks, options.tp, options.rounds, folder, results)
        ranks = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(options.ranks)]
        for process in ranks:
            process.start()
        while results.empty():
            if any(process.exitcode for process in ranks):
                raise SystemExit("a rank has failed")
            time.sleep(0.1)
        stalls, steps, size = results.get()
        for process in ranks:
            process.join()
    print(
        f"{options.ranks} ranks, tp={options.tp}, a checkpoint of {size:.0f} MB, {options.rounds} saves of each kind\n"
    )
    print(f"{'':<28}{'median':>9}{'least':>9}{'most':>9}")
    for name, times in (
        ("stall, in the background", stalls["background"]),
        ("stall, synchronous", stalls["synchronous"]),
        ("from begin to commit", stalls["until committed"]),
        ("from commit to read back", stalls["read back"]),
    ):
        print(f"{name:<28}{statistics.median(times):>8.3f}s{min(times):>8.3f}s{max(times):>8.3f}s")
    for name, times in (
        ("step, nothing beside it", steps["alone"]),
        ("step beside the writing", steps["beside"]),
        ("step beside the reading", steps["beside reading"]),
    ):
        print(f"{name:<28}{statistics.median(times):>8.3f}s{min(times):>8.3f}s{max(times):>8.3f}s")
    ours, peer = statistics.median(stalls["background"]), statistics.median(stalls["synchronous"])
    finish("checkpoint_stall", ours=ours, peer=peer, bar=BAR)


if __name__ == "__main__":
    main()
