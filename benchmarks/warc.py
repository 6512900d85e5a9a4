"""Web archives to shards, ours beside datatrove's reader and Trafilatura: pages and MB a CPU-second, and memory.

    python benchmarks/make_corpus.py build/corpus
    python benchmarks/make_warc.py build/corpus
    python -m venv peers && peers/bin/pip install 'datatrove[processing]==0.10.0' orjson lxml_html_clean
    python benchmarks/warc.py --corpus build/corpus --datatrove-python peers/bin/python

Whole processes are measured, children included, in interleaved rounds, over 300 and over 1,500 pages: what lies
between is the cost of pages, and the rest that of starting. Ours writes shards of tokens, with one worker and with two.
datatrove reads the same files with its WarcReader, takes the text out with Trafilatura in its default form, and writes
JSON lines: it tokenizes nothing. Ours must hold every paragraph of every article; what datatrove finds is printed.
`--memory` reads 1 and 5 GB, the same members over and over, once.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

from make_warc import FEW_PAGES
from preprocess import Run, measure
from verdict import finish

from megatron_mm.shards import ShardReader
from megatron_mm.tokenizer import TextTokenizer

ROUNDS = 3
BAR = 5.0
MAX_GROWTH = 1.1
"""Memory of reading 5 GB over that of reading 1 GB."""
GIGABYTES = (1, 5)
FILES = ("few.warc.gz", "pages.warc.gz")
ROOT = Path(__file__).parents[1]
OURS, TWO_WORKERS, PEER = "ours, 1 worker", "ours, 2 workers", "datatrove and Trafilatura"
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.readers import WarcReader
from datatrove.pipeline.writers import JsonlWriter
if __name__ == "__main__":
    folder, name, out = sys.argv[1:]
    writer = JsonlWriter(out, compression=None)
    steps = [WarcReader(folder, glob_pattern=name), Trafilatura(timeout=30), writer]
    LocalPipelineExecutor(steps, logging_dir=out + "/logs").run()
"""


def main() -> None:
    """Measure everything and say whether the bar holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the folder that make_warc.py wrote to")
    parser.add_argument("--datatrove-python", type=Path, required=True, help="a Python that has datatrove")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"interleaved rounds (default {ROUNDS})")
    parser.add_argument("--memory", action="store_true", help="measure memory over 1 and 5 GB too")
    arguments = parser.parse_args()
    work = arguments.corpus / "work-warc"
    work.mkdir(exist_ok=True)
    paths = [arguments.corpus / name for name in FILES]
    paragraphs = json.loads((arguments.corpus / "pages.json").read_text())
    runs: dict[tuple[str, Path], list[Run]] = {}
    found: dict[str, dict[str, str]] = {}
    for number in range(arguments.rounds):
        for tool, path in itertools.product((OURS, TWO_WORKERS, PEER), paths):
            command = peers(arguments.datatrove_python, path, work) if tool == PEER else ours(tool, path, work)
            run = measure(command, work / "out", env=environment())
            runs.setdefault((tool, path), []).append(run)
            print(f"round {number} {tool} {path.name}: {run}", flush=True)
            found[tool] = written_by_peer(work / "out") if tool == PEER else written(work / "out" / "p")
    complete = check(found, paragraphs)
    growth = memory(paths[-1], work) if arguments.memory else 1.0
    report(runs, paths, len(paragraphs), holds=complete and growth < MAX_GROWTH)


def ours(tool: str, path: Path, work: Path) -> list[str]:
    """Return our command over `path`."""
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path)]
    command += ["--workers", "2" if tool == TWO_WORKERS else "1", "--output-prefix", f"{work}/out/p"]
    return [*command, "--tokenizer", f"{work.parent}/gpt2/tokenizer.json"]


def peers(python: Path, path: Path, work: Path) -> list[str]:
    """Return datatrove's command over `path`."""
    return [str(python), "-c", DATATROVE, str(path.parent), path.name, str(work / "out")]


def environment() -> dict[str, str]:
    """Return what the tools find in their environment: one thread a process."""
    threads = dict.fromkeys(("RAYON_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    return {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}


def written(prefix: Path) -> dict[str, str]:
    """Return the text of each document of our shards by its address."""
    shard, tokenizer = ShardReader(prefix), TextTokenizer(Path(f"{prefix}.tokenizer"))
    urls = shard.origins(0, shard.num_documents).column("url")
    return {url: tokenizer.decode(shard.tokens(number).tolist()) for number, url in enumerate(urls)}


def written_by_peer(out: Path) -> dict[str, str]:
    """Return the text of each document that datatrove wrote by its address."""
    (path,) = out.glob("*.jsonl")
    documents = [json.loads(line) for line in path.read_text().splitlines()]
    return {document["metadata"]["url"]: document["text"] for document in documents}


def check(found: dict[str, dict[str, str]], paragraphs: dict[str, list[str]]) -> bool:
    """Print what each tool found of the pages' articles; return whether ours gave all of them."""
    shares = {}
    for tool, texts in found.items():
        read = {url: " ".join(texts.get(url, "").split()) for url in paragraphs}
        kept = sum(all(words in read[url] for words in own) for url, own in paragraphs.items())
        shares[tool] = kept / len(paragraphs)
        print(f"{tool}: {len(texts)} documents of {len(paragraphs)} pages, {shares[tool]:.1%} with every paragraph")
    return shares[OURS] == shares[TWO_WORKERS] == 1.0


def memory(path: Path, work: Path) -> float:
    """Read files of GIGABYTES made of the same members; return by how much the memory of the last is larger."""
    peaks = []
    for size in GIGABYTES:
        large = work / f"{size}GB.warc.gz"
        with open(large, "wb") as target:
            while target.tell() < size * 1e9:
                with open(path, "rb") as source:
                    shutil.copyfileobj(source, target)
        run = measure(ours(TWO_WORKERS, large, work), work / "out", env=environment())
        large.unlink()
        peaks.append(run.rss_mb)
        print(f"{size} GB, 2 workers: {run.rss_mb:.0f} MB, {run.wall_seconds:.0f} s, {run.cpu_seconds:.0f} CPU s")
    shutil.rmtree(work / "out")
    return peaks[-1] / peaks[0]


def report(runs: dict[tuple[str, Path], list[Run]], paths: list[Path], num_pages: int, *, holds: bool) -> None:
    """Print the table and the verdict."""
    few, all_pages = paths
    size_mb = (all_pages.stat().st_size - few.stat().st_size) / 1e6
    print(f"\n{num_pages} pages, {all_pages.stat().st_size / 1e6:.0f} MB of WARC.gz")
    print(f"{'tool':<28}{'to start':>9}{'a page':>9}{'pages / CPU s':>15}{'MB / CPU s':>12}{'wall s':>9}{'peak MB':>9}")
    costs: dict[str, float] = {}
    for tool in (OURS, TWO_WORKERS, PEER):
        small, whole = (statistics.median(run.cpu_seconds for run in runs[tool, path]) for path in paths)
        costs[tool] = (whole - small) / (num_pages - FEW_PAGES)
        wall = statistics.median(run.wall_seconds for run in runs[tool, all_pages])
        peak = max(run.rss_mb for run in runs[tool, all_pages])
        start = f"{small - FEW_PAGES * costs[tool]:>7.1f} s{1000 * costs[tool]:>6.2f} ms"
        rates = f"{1 / costs[tool]:>15.0f}{size_mb / (whole - small):>12.2f}"
        print(f"{tool:<28}{start}{rates}{wall:>9.1f}{peak:>9.0f}")
    finish("warc", ours=costs[OURS], peer=costs[PEER], bar=1 / BAR, holds=holds)


if __name__ == "__main__":
    main()
