"""Choose the layout of a job on so many GPUs, and say what the run will take."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mm.engine import device

device.keep_out_accelerators()  # before megatron-core is imported

from megatron_mm import config as configs
from megatron_mm import endings
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError
from megatron_mm.planning import pictures
from megatron_mm.planning.cost import GPUS, Gpu
from megatron_mm.planning.layouts import USABLE, Planned, forecast, passes, plan, with_layout
from megatron_mm.planning.rehearsal import RankReport, check_messages, rehearse_apart, stage_ranks
from megatron_mm.planning.report import check_folders, explain, page

PICTURES = (".png", ".svg", ".pdf")


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    return endings.run(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    _check_files(options)
    config = configs.load(options.preset, options.overrides)
    gpu, gpus = GPUS[options.gpu], options.gpus
    from megatron_mm.model.accounting import build_on_meta, count_parameters

    counts = count_parameters(model := build_on_meta(config))
    media = sum(count for name, count in counts.items() if name.endswith(("_tower", "_projector")))
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    extra = {"extra_parameters": media, "extra_trained": media - frozen}  # nothing else is ever frozen
    planned, too_big = plan(config, gpus=gpus, gpu=gpu, **extra)
    rehearsed: list[RankReport] = []
    if options.rehearse:
        planned, rehearsed = _rehearsed(config, planned, gpus=gpus, gpu=gpu)
    ahead = forecast(config, planned[0], gpus=gpus, gpu=gpu, parameters=counts["total"])
    lines = explain(config, planned, too_big, ahead, parameters=counts["total"])
    print("\n".join(lines))
    title = f"{options.preset} on {gpus:,} {gpu.name} ({config.training.precision})"
    if options.html:
        options.html.write_text(page(title, config, planned, lines, gpu, rehearsed))
    if options.timeline:
        pictures.save(pictures.timeline(passes(config, planned[0], gpu), planned[0].describe()), options.timeline)


def _parser() -> argparse.ArgumentParser:
    parser = endings.Parser(description=__doc__)
    parser.add_argument("preset", help="a preset's name, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the job")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True)
    parser.add_argument("--rehearse", action="store_true", help="rehearse the winner's first and last stage (minutes)")
    parser.add_argument("--html", type=Path, help="write the report page there")
    parser.add_argument("--timeline", type=Path, help=f"draw the winner's schedule there ({', '.join(PICTURES)})")
    return parser


def _check_files(options: argparse.Namespace) -> None:
    check_folders({"--html": options.html, "--timeline": options.timeline})
    if options.timeline and options.timeline.suffix not in PICTURES:
        raise ConfigError(f"--timeline {options.timeline}: end its name with one of {', '.join(PICTURES)}.")


def _rehearsed(
    config: Config, planned: Sequence[Planned], *, gpus: int, gpu: Gpu
) -> tuple[list[Planned], list[RankReport]]:
    """Return the layouts from the first that fits by rehearsal on, and the rehearsed ranks of that one."""
    for place, one in enumerate(planned):
        cut = with_layout(config, one.layout)
        ranks = stage_ranks(cut, gpus)
        reports = [rehearse_apart(cut, rank=rank, world_size=gpus) for rank in sorted({ranks[0], ranks[-1]})]
        check_messages(reports)
        for report, stage in zip(reports, (0, -1)):
            formula, counted = sum(one.memory[stage].values()), report.peak_bytes
            print(
                f"rehearsed {one.describe()}: rank {report.rank} ({report.place}) holds {counted / 2**30:.1f} GiB, "
                f"by formula {formula / 2**30:.1f}",
                flush=True,
            )
        if max(report.peak_bytes for report in reports) <= USABLE * gpu.memory_bytes:
            return list(planned[place:]), reports
    raise ConfigError(f"none of {len(planned)} layouts fits {gpus} {gpu.name} once rehearsed. Use more GPUs.")


if __name__ == "__main__":
    sys.exit(main())
