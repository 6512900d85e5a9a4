"""Run one training step of the chosen ranks of a job of any size on this CPU, without its GPUs."""

import argparse
import json
import sys
from multiprocessing import get_context
from pathlib import Path

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError
from megatron_mm.planning.rehearsal import (
    STANDS_FOR,
    RankReport,
    RehearsalFailed,
    distinct_ranks,
    rehearse,
    stage_ranks,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", help="a preset's name, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--world-size", type=int, required=True, help="ranks of the job")
    parser.add_argument("--ranks", default="distinct", help="distinct, stages, all, or numbers: 0,8,1023")
    parser.add_argument("--on", choices=("gpu", "cpu"), default="gpu", help="whose code path is rehearsed")
    parser.add_argument("--media", type=int, default=1, help="images and seconds of sound on each encoding rank")
    parser.add_argument("--json", type=Path, help="write the reports there too")
    arguments = parser.parse_intermixed_args()
    try:
        config = configs.load(arguments.preset, arguments.overrides)
        ranks = _chosen(arguments.ranks, config, arguments.world_size)
        reports = []
        for rank in ranks:
            with get_context("spawn").Pool(1) as pool:  # each rank is a process of its own, as in the job
                reports.append(pool.apply(_one, (config, rank, arguments.world_size, arguments.on, arguments.media)))
            print(describe(reports[-1]), flush=True)
    except (ConfigError, RehearsalFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.on == "gpu":
        print("\n".join(f"{key}: {text}" for key, text in STANDS_FOR.items()))
    if arguments.json:
        lines = [{"rank": r.rank, "place": r.place, "peak": r.peak, "additions": r.additions} for r in reports]
        arguments.json.write_text(json.dumps(lines, indent=1))
    return 0


def _one(config: Config, rank: int, world_size: int, on: str, media: int) -> RankReport:
    return rehearse(config, rank=rank, world_size=world_size, on=on, media=media)


def _chosen(text: str, config: Config, world_size: int) -> list[int]:
    if text in ("distinct", "stages", "all"):
        ways = {"distinct": distinct_ranks, "stages": stage_ranks, "all": lambda _, size: list(range(size))}
        return ways[text](config, world_size)
    ranks = [int(number) for number in text.split(",")]
    if outside := [rank for rank in ranks if not 0 <= rank < world_size]:
        raise ConfigError(f"--ranks {outside} are none of the {world_size} ranks. Use 0 to {world_size - 1}.")
    return ranks


def describe(report: RankReport) -> str:
    """Return a rank's report for people."""
    lines = [
        f"rank {report.rank} ({report.place}): {report.parameters:,} parameters, {report.num_layers} layers, "
        f"{report.num_micro_batches} micro-batches, peak {report.peak_bytes / 2**30:.2f} GiB, "
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
