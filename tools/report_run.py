"""Print a short report of a run and draw its loss curves: what it was, how fast, and what it learned."""

import sys
from pathlib import Path

from megatron_mm.engine import device

device.keep_out_accelerators()  # before megatron-core is imported

from megatron_mm import endings
from megatron_mm.errors import DataError
from megatron_mm.training.metrics import read_metrics
from megatron_mm.training.report import plot_losses, write_report


def main() -> int:
    parser = endings.Parser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run_dir of the run")
    run_dir = parser.parse_args().run_dir
    return endings.run(lambda: _run(run_dir))


def _run(run_dir: Path) -> None:
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        raise DataError(f"{file} does not exist: {run_dir} is not the run_dir of a run. Give one.")
    if not read_metrics(run_dir):
        raise DataError(f"{file} holds no record of a run: it ended before its first step, or the file is damaged.")
    try:
        report = write_report(run_dir)
        plot_losses(run_dir)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(f"{file} holds records that no run has written ({error!r}). Restore it.") from error
    print(report)


if __name__ == "__main__":
    sys.exit(main())
