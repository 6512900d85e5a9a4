"""Export and import of a checkpoint in the 88B's layer shapes, beside a plain copy of the same bytes on the same disk.

  python benchmarks/export.py [--folder build/export_benchmark] [--layers 4] [--rounds 3] [--keep] [--tokenizer T]

Writes a synthetic checkpoint (4 layers, embeddings, encoders: 9.5 GB) in the pieces that TP8 ranks write, copies it
with cp, exports it, and imports the export, each from a cold page cache and up to the last byte on the disk, in turn.
Needs 40 GB free, which it gives back; with --keep, the checkpoint stays and is there for the next run (--rounds 0
writes it alone). Peak memory is the process's largest resident set as the kernel counts it.
The bars: export and import within twice the copy, in less than 1 GiB and 1.5 GiB.
"""

import argparse
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from verdict import finish

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.model.accounting import build_on_meta

ROOT = Path(__file__).parents[1]
TP = 8
TOTAL_88B_BYTES = 2 * 88_579_360_384
CUT = {
    **dict.fromkeys(("word_embeddings.weight", "output_layer.weight", "linear_q.weight", "linear_fc1.weight"), 0),
    **dict.fromkeys(("linear_proj.weight", "linear_fc2.weight"), 1),
}
"""Along which dimension tensor ranks cut a weight; what is not here is whole."""
LAUNCHER = """
import os, sys
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ), 0)
print("", usage.ru_utime + usage.ru_stime, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""Starts a command from a small process: the kernel counts the memory of what a process was forked from as its own."""


def write_checkpoint(folder: Path, config: Config) -> None:
    """Write random weights as TP8 ranks lay them out."""
    folder.mkdir(parents=True)
    noise = (torch.randn(1 << 26) * 0.02).bfloat16()
    chunks, sizes, stored = {}, {}, {}
    file = (folder / "__0_0.distcp").open("wb")
    for name, parameter in build_on_meta(config).named_parameters():
        key, layer = name, None
        if name.startswith("decoder.layers."):
            number, _, rest = name.removeprefix("decoder.layers.").partition(".")
            key, layer = f"decoder.layers.{rest}", int(number)
        cut = next((dim for end, dim in CUT.items() if name.endswith(end)), None)
        lead = () if layer is None else (layer,)
        sizes[key] = torch.Size((*(() if layer is None else (config.model.num_layers,)), *parameter.shape))
        for rank in range(TP if cut is not None else 1):
            shape, offset = list(parameter.shape), [0] * parameter.dim()
            if cut is not None:
                shape[cut] //= TP
                offset[cut] = rank * shape[cut]
            value = noise[: torch.Size(shape).numel()].view(*(1,) * len(lead), *shape).clone()
            place = torch.Size((*lead, *offset))
            start = file.tell()
            torch.save(value, file)
            chunks.setdefault(key, []).append(ChunkStorageMetadata(place, value.shape))
            stored[MetadataIndex(key, place)] = _StorageInfo("__0_0.distcp", start, file.tell() - start)
    file.close()
    tensors = {
        key: TensorStorageMetadata(TensorProperties(torch.bfloat16), size, chunks[key]) for key, size in sizes.items()
    }
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, storage_data=stored)))
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "manifest.json").write_text(f'{{"step": 0, "bytes": {str(sizes).replace(chr(39), chr(34))}}}')


def make_cold(folder: Path) -> None:
    """Write what is dirty to the disk and take the files of a folder out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(command: list[str], *, source: Path, target: Path) -> tuple[float, float, float]:
    """Run a command that writes `target` from `source`; return (seconds, CPU seconds, peak GiB)."""
    shutil.rmtree(target, ignore_errors=True)
    make_cold(source)
    started = time.perf_counter()
    launched = subprocess.run([sys.executable, "-S", "-c", LAUNCHER, *command], capture_output=True, text=True)
    os.sync()
    seconds = time.perf_counter() - started
    assert launched.returncode == 0, f"{' '.join(command)}: {launched.stderr[-2000:]}"
    cpu, peak = launched.stdout.split()[-2:]
    return seconds, float(cpu), int(peak) / 2**20


def main() -> None:
    """Measure, print the table, and end with the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "export_benchmark")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "examples" / "sample_data" / "tokenizer.json")
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    folder = options.folder
    checkpoint, copy, out, back = (folder / name for name in ("checkpoint", "copy", "export", "import"))
    flat = (
        "parallel.tp=1",
        "parallel.pp=1",
        "parallel.vpp=1",
        "parallel.tp_comm_overlap=false",
        f"model.num_layers={options.layers}",
    )
    config = configs.load("mm_88b", flat)
    try:
        if not (checkpoint / "manifest.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            write_checkpoint(checkpoint, config)
        num_bytes = sum(path.stat().st_size for path in checkpoint.iterdir())
        convert = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
        to_hf = [*convert, "to-hf", str(checkpoint), str(out), "--full", "--tokenizer", str(options.tokenizer)]
        from_hf = [*convert, "from-hf", str(out / "full"), str(back), "--preset", str(checkpoint / "config.yaml")]
        runs = {"copy": [], "export": [], "import": []}
        for _ in range(options.rounds):
            runs["copy"].append(timed(["cp", "-r", str(checkpoint), str(copy)], source=checkpoint, target=copy))
            shutil.rmtree(copy)
            runs["export"].append(timed(to_hf, source=checkpoint, target=out))
            runs["import"].append(timed(from_hf, source=out, target=back))
            shutil.rmtree(back)
    finally:
        for path in (copy, out, back) if options.keep else (folder,):
            shutil.rmtree(path, ignore_errors=True)
    if not options.rounds:
        return
    print(f"{num_bytes / 1e9:.2f} GB of weights, {options.rounds} rounds")
    print(f"{'':8}{'seconds':>10}{'CPU s':>10}{'GB/s':>8}{'peak GiB':>10}{'88B, minutes':>14}")
    median = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in runs.items()}
    for name, (seconds, cpu, peak) in median.items():
        minutes = seconds * TOTAL_88B_BYTES / num_bytes / 60
        print(f"{name:8}{seconds:10.1f}{cpu:10.1f}{num_bytes / seconds / 1e9:8.2f}{peak:10.2f}{minutes:14.1f}")
    small = median["export"][2] < 1.0 and median["import"][2] < 1.5
    fast = median["import"][0] <= 2 * median["copy"][0]
    finish("export", ours=median["export"][0], peer=median["copy"][0], bar=2.0, holds=small and fast)


if __name__ == "__main__":
    main()
