"""Print a short report of a run and draw its loss curves: what it was, how fast, and what it learned."""

import argparse
import sys
from pathlib import Path

from megatron_mm.training.report import plot_losses, write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run_dir of the run")
    run_dir = parser.parse_args().run_dir
    if not (run_dir / "metrics.jsonl").exists():
        print(f"error: {run_dir}/metrics.jsonl does not exist: {run_dir} is not the run_dir of a run.", file=sys.stderr)
        return 1
    plot_losses(run_dir)
    print(write_report(run_dir))
    return 0


if __name__ == "__main__":
    sys.exit(main())
