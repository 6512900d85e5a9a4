"""Start-up and sample fetch of a dataset of 50 million documents, beside megatron-core's GPTDataset.

    python benchmarks/dataset_start.py --work build/dataset_start

Builds synthetic shards (lognormal lengths, mean 1,000 tokens; the token file is a hole of 100 GB that takes no disk,
the indexes 2 GB). Each contestant starts in a process of its own: seconds and the growth of its peak memory, mapped
pages included, from before to after; then random samples of 8,192 tokens are fetched, ours as the micro-batch that
training takes, and compared with checksums as in training. Rounds are interleaved, medians taken. The cost at 1e9
documents is measured on a dataset of twenty such shards. GPTDataset builds its index anew in an empty cache each time.
"""

import argparse
import atexit
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from verdict import finish

ROUNDS = 3
SEQ_LEN = 8192
FETCHES = 100
PASSES = 10
"""Times that the same samples are fetched: they stay in the page cache, which more of them would not."""
COPIES = 20
MEAN, SIGMA = 1_000, 1.3
MAX_SECONDS, MAX_MB = 1.0, 200.0
BLOCK = 2_000_000


def main() -> None:
    """Build the shards, measure all contestants and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the synthetic shards")
    parser.add_argument("--documents", type=int, default=50_000_000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    prefix = str(arguments.work / f"synthetic-{arguments.documents}")
    if not Path(prefix + ".json").exists():
        arguments.work.mkdir(parents=True, exist_ok=True)
        build(prefix, arguments.documents)
    contestants = {
        "GPTDataset": (gpt_dataset, [prefix]),
        "ours, best fit": (best_fit, [prefix]),
        "ours, concatenated": (concatenated, [prefix]),
        f"ours, best fit, x{COPIES}": (best_fit, [prefix] * COPIES),
        f"ours, concatenated, x{COPIES}": (concatenated, [prefix] * COPIES),
    }
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, contestant in contestants.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                results[name].append(pool.apply(measure, contestant))
    print(f"{arguments.documents} documents, {SEQ_LEN} tokens a sample")
    print(f"{'':<28}{'start s':>9}{'growth MB':>11}{'fetch us':>10}")
    medians = {name: [statistics.median(column) for column in zip(*own)] for name, own in results.items()}
    for name, (seconds, megabytes, microseconds) in medians.items():
        print(f"{name:<28}{seconds:>9.3f}{megabytes:>11.1f}{microseconds:>10.1f}")
    ours, peer = medians["ours, best fit"], medians["GPTDataset"]
    small = ours[0] < MAX_SECONDS and ours[1] < MAX_MB
    finish("dataset_start", ours=ours[2], peer=peer[2], bar=1.0, holds=small)


def measure(prepare: Callable[[list[str]], Callable[[], tuple]], prefixes: list[str]) -> tuple[float, float, float]:
    """Return (seconds, MB) of a start-up, and the microseconds of CPU time of a fetch."""
    begin = prepare(prefixes)
    before = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    started = time.perf_counter()
    fetch, num_samples = begin()
    seconds = time.perf_counter() - started
    growth = memory_mb("VmHWM") - before
    samples = np.random.default_rng(0).integers(0, num_samples, FETCHES).tolist()
    for sample in samples:  # what they touch is in the page cache from here on
        fetch(sample)
    started = time.process_time()
    for _ in range(PASSES):
        for sample in samples:
            fetch(sample)
    return seconds, growth, (time.process_time() - started) / (FETCHES * PASSES) * 1e6


def best_fit(prefixes: list[str]) -> Callable[[], tuple]:
    """Import what our loader needs and return what starts it."""
    return our_loader(prefixes, "best_fit")


def concatenated(prefixes: list[str]) -> Callable[[], tuple]:
    """As `best_fit`, with documents laid end to end."""
    return our_loader(prefixes, "concatenate")


def our_loader(prefixes: list[str], packing: str) -> Callable[[], tuple]:
    """Return a function that starts a loader of one rank and returns (fetch, number of samples).

    What decodes media is imported before, as all that the peer imports is.
    """
    from megatron_mm import config as configs
    from megatron_mm.data.loader import Loader
    from megatron_mm.data.media import make_decoders

    settings = [f"data.seq_len={SEQ_LEN}", f"data.packing={packing}", "model.vocab_size=51200"]
    config = configs.load("tiny", settings)
    ranks = {f"{axis}_rank": 0 for axis in ("tp", "cp", "dp")} | {f"{axis}_size": 1 for axis in ("tp", "cp", "dp")}
    mesh = SimpleNamespace(**ranks, is_rank_0=False, is_first_chunk=lambda chunk: True)

    make_decoders(config, has_gpu=False)

    def begin() -> tuple:
        loader = Loader(prefixes, config=config, mesh=mesh)
        return lambda sample: loader.micro_batch([sample]), loader.num_samples

    return begin


def gpt_dataset(prefixes: list[str]) -> Callable[[], tuple]:
    """Import megatron-core's dataset and return what builds it."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(vocab_size=50257, eod=50256, eos=50256, pad=50257, unique_identifiers={"class": "none"})
    cache = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, cache)
    config = GPTDatasetConfig(
        path_to_cache=cache,
        random_seed=1234,
        sequence_length=SEQ_LEN,
        blend=(prefixes, None),
        split="100,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )

    def begin() -> tuple:
        indexed = IndexedDataset(prefixes[0])
        dataset = GPTDataset(indexed, prefixes[0], np.arange(len(indexed), dtype=np.int32), None, Split.train, config)
        return dataset.__getitem__, len(dataset)

    return begin


def memory_mb(field: str) -> float:
    """Return a field of this process's status in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) / 1024


def build(prefix: str, documents: int) -> None:
    """Write shards of `documents` lognormal lengths whose tokens are all zero, which take no disk."""
    from megatron_mm.shards.format import (
        DOCUMENT,
        MANIFEST_VERSION,
        MEDIA_HEADER,
        MEDIA_MAGIC,
        MEDIA_VERSION,
        PAGES_SUFFIX,
        TOKEN_HEADER,
        TOKEN_MAGIC,
        TOKEN_VERSION,
    )
    from megatron_mm.shards.writer import write_manifest

    rng = np.random.default_rng(0)
    blocks = [min(BLOCK, documents - start) for start in range(0, documents, BLOCK)]
    tokens = 0
    with open(prefix + ".idx", "wb") as lengths_file, open(prefix + ".idx", "r+b") as pointers_file:
        lengths_file.write(TOKEN_HEADER.pack(TOKEN_MAGIC, TOKEN_VERSION, 8, documents, documents + 1))
        pointers_file.seek(TOKEN_HEADER.size + 4 * documents)
        for size in blocks:
            own = np.exp(rng.normal(np.log(MEAN) - SIGMA**2 / 2, SIGMA, size)).clip(2, 200_000).astype(np.int32)
            own.tofile(lengths_file)
            ends = tokens + np.cumsum(own, dtype=np.int64)
            (np.concatenate([[tokens], ends[:-1]]) * 2).tofile(pointers_file)
            tokens = int(ends[-1])
        lengths_file.flush()
        for start in range(0, documents + 1, BLOCK):
            np.arange(start, min(start + BLOCK, documents + 1), dtype=np.int64).tofile(pointers_file)
    Path(prefix + ".media.bin").touch()
    Path(prefix + ".media.idx").write_bytes(MEDIA_HEADER.pack(MEDIA_MAGIC, MEDIA_VERSION, documents, 0))
    os.truncate(prefix + ".media.idx", MEDIA_HEADER.size + documents * DOCUMENT.itemsize)
    Path(prefix + ".bin").touch()
    os.truncate(prefix + ".bin", 2 * tokens)
    ids = {"pad": 1, "end_of_text": 0, "image": 2, "audio": 3}
    tokenizer = {"sha256": "0" * 64, "vocab_size": 50264, "special_ids": ids}
    files = {suffix: summary(prefix, suffix) for suffix in (".bin", ".idx", ".media.bin", ".media.idx")}
    write_pages(prefix)
    pages = summary(prefix, PAGES_SUFFIX)
    manifest = {"version": MANIFEST_VERSION, "documents": documents, "tokens": tokens, "tokenizer": tokenizer}
    write_manifest(prefix, manifest | {"media": {}, "files": files, "pages": pages})


def summary(prefix: str, suffix: str) -> dict[str, object]:
    """Return what a manifest says of a file: its bytes, and the checksum of each block; P.bin is all zero."""
    from megatron_mm.shards.format import BLOCK_BYTES

    size = os.path.getsize(prefix + suffix)
    if suffix == ".bin":
        whole, rest = divmod(size, BLOCK_BYTES)
        sums = [zlib.crc32(bytes(BLOCK_BYTES))] * whole + ([zlib.crc32(bytes(rest))] if rest else [])
        return {"bytes": size, "block_crc32": sums}
    with open(prefix + suffix, "rb") as file:
        return {
            "bytes": size,
            "block_crc32": [zlib.crc32(block) for block in iter(lambda: file.read(BLOCK_BYTES), b"")],
        }


def write_pages(prefix: str) -> None:
    """Write P.crc, for tokens that are all zero."""
    from megatron_mm.shards.format import PAGE_BYTES, PAGED, PAGES_SUFFIX

    with open(prefix + PAGES_SUFFIX, "wb") as sums:
        for suffix in PAGED:
            whole, rest = divmod(os.path.getsize(prefix + suffix), PAGE_BYTES)
            if suffix == ".bin":
                crc32s = [zlib.crc32(bytes(size)) for size in (PAGE_BYTES, rest)]
                np.full(whole, crc32s[0], "<u4").tofile(sums)
                np.asarray(crc32s[1:] if rest else [], "<u4").tofile(sums)
                continue
            with open(prefix + suffix, "rb") as file:
                while block := file.read(PAGE_BYTES * 4096):
                    pages = range(0, len(block), PAGE_BYTES)
                    np.asarray([zlib.crc32(block[page : page + PAGE_BYTES]) for page in pages], "<u4").tofile(sums)


if __name__ == "__main__":
    main()
