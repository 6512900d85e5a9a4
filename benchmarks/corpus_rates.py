"""What each kind of corpus costs to preprocess: CPU seconds, tokens and bytes on disk, for docs/corpora.md.

    python benchmarks/corpus_rates.py [--copies 20] [--work FOLDER]

The corpora of examples/make_corpora.py, each several times over, go through tools/preprocess_data.py with one worker.
Start-up, measured on a file of one word, is taken off, so that the rates are those of a long run. There is no peer in
it: the bar is that no kind costs more CPU seconds a million tokens than PEAK, by which docs/corpora.md was written.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from verdict import finish

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "examples/sample_data/tokenizer.json"
COPIES = 20
PEAK = 60.0
"""CPU seconds a million tokens of the dearest kind."""


def main() -> None:
    """Measure each corpus and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=COPIES, help="how many times each corpus is there")
    parser.add_argument("--work", type=Path, help="folder for the corpora and shards (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        for copy in range(arguments.copies):
            run(["examples/make_corpora.py", str(work / "corpora" / str(copy))])
        (work / "word").mkdir(exist_ok=True)
        (work / "word" / "a.txt").write_text("word")
        start, _ = preprocess([work / "word"], work / "shards" / "word")
        print(f"start-up: {start:.1f} CPU seconds")
        print(
            f"{'corpus':<14}{'MB in':>9}{'Mtok':>9}{'documents':>11}{'CPU s':>9}{'CPU s/Mtok':>12}{'bytes/token':>13}"
        )
        dearest = 0.0
        for name in sorted(path.name for path in (work / "corpora" / "0").iterdir()):
            folders = [work / "corpora" / str(copy) / name for copy in range(arguments.copies)]
            seconds, manifest = preprocess(folders, work / "shards" / name)
            seconds -= start
            num_bytes = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
            stored = sum(path.stat().st_size for path in (work / "shards").glob(f"{name}.*"))
            millions = manifest["tokens"] / 1e6
            dearest = max(dearest, seconds / millions)
            print(
                f"{name:<14}{num_bytes / 1e6:>12.1f}{millions:>12.2f}{manifest['documents']:>12}{seconds:>12.1f}"
                f"{seconds / millions:>12.1f}{stored / manifest['tokens']:>12.2f}"
            )
    finish("corpus_rates", ours=dearest, peer=PEAK, bar=1.0)


def preprocess(folders: list[Path], prefix: Path) -> tuple[float, dict]:
    """Return the CPU seconds of the tool over folders, its workers included, and the manifest that it wrote."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(
        [
            *("tools/preprocess_data.py", "--output-prefix", str(prefix), "--tokenizer", str(TOKENIZER)),
            *("--workers", "1", "--input", *map(str, folders)),
        ]
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, json.loads(Path(f"{prefix}.json").read_text())


def run(command: list[str]) -> None:
    """Run a script of this repository; say what it printed if it fails."""
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


if __name__ == "__main__":
    main()
