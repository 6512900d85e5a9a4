"""Run one training step of the chosen ranks of a job of any size on this CPU, without its GPUs."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_mm.engine import device

device.keep_out_accelerators()  # before megatron-core is imported

from megatron_mm import config as configs
from megatron_mm import endings
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError
from megatron_mm.planning.rehearsal import (
    STANDS_FOR,
    RankReport,
    check_messages,
    distinct_ranks,
    rehearse_apart,
    stage_ranks,
)
from megatron_mm.planning.report import check_folders, rehearsal_page


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    return endings.run(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    check_folders({"--json": options.json, "--html": options.html})
    config = configs.load(options.preset, options.overrides)
    how = {"world_size": options.world_size, "on": options.on, "media": options.media}
    reports = []
    for rank in _chosen(options.ranks, config, options.world_size):
        reports.append(rehearse_apart(config, rank=rank, **how))
        print(describe(reports[-1]), flush=True)
    check_messages(reports)
    if options.on == "gpu":
        print("\n".join(f"{key}: {text}" for key, text in STANDS_FOR.items()))
    if options.json:
        options.json.write_text(json.dumps([_record(report) for report in reports], indent=1))
    if options.html:
        options.html.write_text(rehearsal_page(f"{options.preset} on {options.world_size:,} ranks, rehearsed", reports))


def _parser() -> argparse.ArgumentParser:
    parser = endings.Parser(description=__doc__)
    parser.add_argument("preset", help="a preset's name, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the job")
    parser.add_argument("--ranks", default="distinct", help="distinct, stages, all, or numbers: 0,8,1023")
    parser.add_argument("--on", choices=("gpu", "cpu"), default="gpu", help="whose code path is rehearsed")
    parser.add_argument(
        "--media",
        type=endings.at_least(0),
        default=1,
        help="images, seconds of audio ... on each encoding rank",
    )
    parser.add_argument("--json", type=Path, help="write the reports there too")
    parser.add_argument("--html", type=Path, help="draw memory by rank and over the step there")
    return parser


def _record(report: RankReport) -> dict[str, Any]:
    """Return a report as JSON holds it; sizes are bytes."""
    return {
        **{key: value for key, value in vars(report).items() if isinstance(value, int | float | str)},
        "peak": report.peak,
        "steady": report.steady,
        "additions": report.additions,
        "flops_by_module": report.flops_by_module(),
        "collectives": [{**one._asdict(), "count": count} for one, count in sorted(report.collectives.items())],
        "history": [sample._asdict() for sample in report.history],
    }


def _chosen(text: str, config: Config, world_size: int) -> list[int]:
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: a job has 1 rank or more.")
    if text in ("distinct", "stages", "all"):
        ways = {"distinct": distinct_ranks, "stages": stage_ranks, "all": lambda _, size: list(range(size))}
        return ways[text](config, world_size)
    try:
        ranks = [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--ranks {text}: give distinct, stages, all, or numbers with commas, as 0,8,1023.") from None
    if outside := [rank for rank in ranks if not 0 <= rank < world_size]:
        raise ConfigError(f"--ranks {outside} are none of the {world_size} ranks. Use 0 to {world_size - 1}.")
    return ranks


def describe(report: RankReport) -> str:
    """Return a rank's report for people."""
    lines = [
        f"rank {report.rank} ({report.place}): {report.parameters:,} parameters, {report.num_layers} layers, "
        f"{report.num_micro_batches} micro-batches, peak {report.peak_bytes / 2**30:.2f} GiB in {report.peak_phase}, "
        f"{report.checkpoint_bytes / 2**30:.2f} GiB of checkpoint, rehearsed in {report.seconds:.0f} s"
    ]
    held = {**report.peak, **report.additions}
    lines.append("  peak GiB   " + "  ".join(f"{name} {size / 2**30:.2f}" for name, size in held.items() if size))
    lines.append(
        "  TFLOP      " + "  ".join(f"{name} {flops / 1e12:.2f}" for name, flops in report.flops_by_module().items())
    )
    for collective, count in sorted(report.collectives.items()):
        lines.append(
            f"  {collective.name.strip('_'):36} {collective.group:42} over {collective.size:<5}"
            f"{collective.num_bytes / 1e6:10.3f} MB x {count}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
