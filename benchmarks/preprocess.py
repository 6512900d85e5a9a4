"""Preprocessing of JSON lines, ours beside Megatron-LM's two tools and datatrove: CPU time, memory, ids.

Ours also reads the same corpus as gzip, Zstandard and Parquet, which must cost less than twice what the lines cost.

    python benchmarks/make_corpus.py build/corpus
    git clone https://github.com/NVIDIA/Megatron-LM
    python -m venv peers && peers/bin/pip install datatrove==0.10.0 orjson tokenizers
    python benchmarks/preprocess.py --corpus build/corpus --megatron Megatron-LM --datatrove-python peers/bin/python

Megatron-LM's tools run from their source in this environment, whole processes are measured, one worker each (ours also
with two, for the gain), rounds are interleaved and medians taken. preprocess_data_fast.py reads the whole corpus, as
ours does. preprocess_data.py and datatrove are far slower: they read two parts of it, and their cost of the whole is
extrapolated along the line through both, which leaves their start-up where it is. The ids of every tool must be the
same as ours.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
from verdict import finish

ROUNDS = 3
TWO_WORKERS = "ours, 2 workers"
PARTS_MB = (1, 11)
BARS = {"preprocess_data.py": 30.0, "datatrove": 10.0, "preprocess_data_fast.py": 2.5}
MAX_RSS_MB = 500
FORMS = {"gzip": "jsonl.gz", "Zstandard": "jsonl.zst", "Parquet": "parquet"}
"""Other forms of the corpus, and how their files end."""
ROW_GROUP = 10_000
"""Documents of a row group of the Parquet file."""
MAX_FORM_COST = 2.0
"""CPU time of a form over that of plain lines."""
ROOT = Path(__file__).parents[1]
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
if __name__ == "__main__":
    folder, name, out, tokenizer = sys.argv[1:]
    writer = MegatronDocumentTokenizer(out, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>")
    LocalPipelineExecutor([JsonlReader(folder, glob_pattern=name), writer], logging_dir=out + "/logs").run()
"""


@dataclass(frozen=True)
class Run:
    """What one process cost, all its children included."""

    cpu_seconds: float
    wall_seconds: float
    rss_mb: float
    """Largest sum over the processes, shared pages counted in each."""


def main() -> None:
    """Measure everything and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the folder that make_corpus.py made")
    parser.add_argument("--megatron", type=Path, required=True, help="Megatron-LM's source")
    parser.add_argument("--datatrove-python", type=Path, required=True, help="a Python that has datatrove")
    arguments = parser.parse_args()
    work = arguments.corpus / "work"
    inputs = cut(arguments.corpus / "corpus.jsonl", work)
    inputs |= write_forms(inputs["whole"], work)
    commands = Commands(arguments.corpus / "gpt2", arguments.megatron.resolve(), arguments.datatrove_python, work)
    runs: dict[tuple[str, str], list[Run]] = {}
    plan = [
        *(("ours", size) for size in inputs),
        (TWO_WORKERS, "whole"),
        ("preprocess_data_fast.py", "whole"),
        *itertools.product(("preprocess_data.py", "datatrove"), ("small", "part")),
    ]
    for number in range(ROUNDS):
        for tool, size in plan:
            if size == "triple" and number:
                continue
            run = measure(commands.of(tool, inputs[size]), work / "out", env=commands.environment(tool))
            runs.setdefault((tool, size), []).append(run)
            print(f"round {number} {tool} {size}: {run}", flush=True)
            keep_ids(work, tool, size)
    check_ids(work, plan)
    report(runs, {size: path.stat().st_size / 1e6 for size, path in inputs.items()})


def cut(corpus: Path, work: Path) -> dict[str, Path]:
    """Return the inputs by size: two parts for slow tools, the corpus, and three times the corpus."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    inputs = {"whole": corpus}
    for name, size_mb in zip(("small", "part"), PARTS_MB):
        with open(corpus, "rb") as file:
            data = file.read(size_mb * 1_000_000)
        inputs[name] = work / f"{name}.jsonl"
        inputs[name].write_bytes(data[: data.rindex(b"\n") + 1])
    inputs["triple"] = work / "triple.jsonl"
    with open(inputs["triple"], "wb") as target:
        for _ in range(3):
            with open(corpus, "rb") as source:
                shutil.copyfileobj(source, target)
    return inputs


def write_forms(corpus: Path, work: Path) -> dict[str, Path]:
    """Return the corpus as a file of each of FORMS."""
    paths = {form: work / f"{form}.{suffix}" for form, suffix in FORMS.items()}
    for form, codec in (("gzip", "gzip"), ("Zstandard", "zstd")):
        with corpus.open("rb") as source, pyarrow.output_stream(paths[form], compression=codec) as target:
            shutil.copyfileobj(source, target)
    with corpus.open("rb") as source:
        texts = [json.loads(line)["text"] for line in source]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}), paths["Parquet"], compression="zstd", row_group_size=ROW_GROUP
    )
    return paths


@dataclass(frozen=True)
class Commands:
    """How each tool is called."""

    gpt2: Path
    megatron: Path
    datatrove_python: Path
    work: Path

    def of(self, tool: str, path: Path) -> list[str]:
        """Return the command of one tool over `path`."""
        out = str(self.work / "out")
        if tool in ("ours", TWO_WORKERS):
            command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path)]
            command += ["--output-prefix", f"{out}/p", "--tokenizer", f"{self.gpt2}/tokenizer.json"]
            return [*command, "--workers", "2" if tool == TWO_WORKERS else "1"]
        if tool == "datatrove":
            names = [str(path.parent), path.name, out, f"{self.gpt2}/tokenizer.json"]
            return [str(self.datatrove_python), "-c", DATATROVE, *names]
        command = [sys.executable, str(self.megatron / "tools" / tool), "--input", str(path), "--append-eod"]
        command += ["--output-prefix", f"{out}/p", "--tokenizer-type", "HuggingFaceTokenizer"]
        command += ["--tokenizer-model", str(self.gpt2.resolve())]
        return [*command, *(["--use-gigatoken"] if "fast" in tool else ["--workers", "1"])]

    def environment(self, tool: str) -> dict[str, str]:
        """Return what a tool finds in its environment."""
        path = {"PYTHONPATH": str(self.megatron)} if tool.startswith("preprocess") else {}
        return {
            **os.environ,
            **path,
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "RAYON_NUM_THREADS": "1",
        }


def measure(command: list[str], out: Path, *, env: dict[str, str]) -> Run:
    """Run a command with an empty folder `out` and return what it cost."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started = time.perf_counter()
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    peak = [0.0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak), daemon=True)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{out.with_suffix('.log').read_text()[-3000:]}")
    return Run(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, peak[0])


def _watch(pid: int, peak: list[float]) -> None:
    """Note the largest resident memory of a process and its children, until it ends."""
    try:
        parent = psutil.Process(pid)
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in (parent, *parent.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total / 1e6)
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        pass


def keep_ids(work: Path, tool: str, size: str) -> None:
    """Put the tokens that a tool wrote aside."""
    (tokens,) = (path for path in (work / "out").rglob("*.bin") if not path.name.endswith(".media.bin"))
    os.replace(tokens, work / f"{tool}-{size}.bin")


def check_ids(work: Path, plan: list[tuple[str, str]]) -> None:
    """Raise SystemExit unless every tool, and every form of the corpus, gave the ids that ours gave of lines."""
    for tool, size in plan:
        expected = f"ours-{'whole' if size in FORMS else size}"
        ours, theirs = (np.memmap(work / f"{name}.bin", np.uint16) for name in (expected, f"{tool}-{size}"))
        if not np.array_equal(ours, theirs):
            raise SystemExit(f"{tool} on {size}: {len(theirs)} ids differ from our {len(ours)}")


def report(runs: dict[tuple[str, str], list[Run]], sizes_mb: dict[str, float]) -> None:
    """Print the table and the verdict."""
    cpu = {key: statistics.median(run.cpu_seconds for run in own) for key, own in runs.items()}
    rss = {key: max(run.rss_mb for run in own) for key, own in runs.items()}
    whole = sizes_mb["whole"]
    costs = {tool: cpu[tool, "whole"] for tool in ("ours", "preprocess_data_fast.py")}
    for tool in ("preprocess_data.py", "datatrove"):
        slope = (cpu[tool, "part"] - cpu[tool, "small"]) / (sizes_mb["part"] - sizes_mb["small"])
        costs[tool] = cpu[tool, "small"] + slope * (whole - sizes_mb["small"])
    print(f"\n{whole:.0f} MB of JSON lines, one worker; ids equal to ours: all")
    print(f"{'tool':<26}{'CPU s':>9}{'MB / CPU s':>12}{'peak MB':>9}{'ours is':>9}{'bar':>6}")
    for tool, seconds in sorted(costs.items(), key=lambda item: item[1]):
        peak = max(value for (name, _), value in rss.items() if name == tool)
        ratio = f"{seconds / costs['ours']:.1f}x" if tool != "ours" else ""
        print(f"{tool:<26}{seconds:>9.1f}{whole / seconds:>12.2f}{peak:>9.0f}{ratio:>9}{BARS.get(tool, ''):>6}")
    walls = {key: statistics.median(run.wall_seconds for run in own) for key, own in runs.items()}
    one, two = walls["ours", "whole"], walls[TWO_WORKERS, "whole"]
    print(f"ours: start-up and 1 MB {walls['ours', 'small']:.2f} s wall, {cpu['ours', 'small']:.2f} CPU s")
    print(f"ours: {whole / one:.0f} MB/s of wall time with 1 worker, {whole / two:.0f} with 2 ({one / two:.2f}x)")
    print(f"ours: {rss['ours', 'whole']:.0f} MB of memory, {rss['ours', 'triple']:.0f} with three times the input")
    forms = {form: cpu["ours", form] / costs["ours"] for form in FORMS}
    for form, ratio in forms.items():
        seconds, peak = cpu["ours", form], rss["ours", form]
        print(f"ours, {form:<20}{seconds:>9.1f}{whole / seconds:>12.2f}{peak:>9.0f}  {ratio:.2f} of lines' cost")
    flat = rss["ours", "triple"] < min(MAX_RSS_MB, 1.2 * rss["ours", "whole"])
    alike = all(ratio <= MAX_FORM_COST for ratio in forms.values())
    reached = all(costs[tool] / costs["ours"] >= bar for tool, bar in BARS.items())
    fast = costs["preprocess_data_fast.py"]
    finish(
        "preprocess",
        ours=costs["ours"],
        peer=fast,
        bar=1 / BARS["preprocess_data_fast.py"],
        holds=flat and alike and reached,
    )


if __name__ == "__main__":
    main()
