"""python -m megatron_mm.train PRESET [section.key=value ...]: train, on one rank or under torchrun on many."""

import argparse
import json
import logging
import sys
import textwrap
from pathlib import Path

from megatron_mm import config as configs
from megatron_mm import endings, printable
from megatron_mm.checkpoint.format import whole_ones
from megatron_mm.environment import read_number, use_private_caches
from megatron_mm.retry import be_patient

log = logging.getLogger("megatron_mm")


MEMORY = (
    "Give each rank fewer weights (raise parallel.tp or parallel.pp), or fewer activations (lower "
    "training.micro_batch_size or data.seq_len, set training.recompute=full)."
)
"""What helps a run that asks for more memory than there is."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status, as endings.py has it."""
    options = _parser().parse_intermixed_args(arguments)
    return endings.run(lambda: _run(options), memory=MEMORY)


def _run(options: argparse.Namespace) -> None:
    from megatron_mm.engine import device

    _set_log_level()
    config = configs.load(options.preset, options.overrides)
    device.keep_out_accelerators()
    use_private_caches()
    if options.describe:
        print(json.dumps(_describe(config, options.world_size)))
        return
    configs.check_own_run(options.preset, config)
    be_patient(config.guard.retry_minutes)
    if options.check:
        _check(config, options.world_size)
    elif options.evaluate:
        _evaluate(config, Path(options.evaluate))
    else:
        _train(config)


def _train(config: configs.Config) -> None:
    from megatron_mm.engine import mesh as meshes
    from megatron_mm.training.loop import train

    with endings.note(stop=lambda: _kept(config), disk=f"run_dir={config.run_dir}"):
        mesh = meshes.initialize(config)
        train(config, mesh)
        meshes.leave()


def _kept(config: configs.Config) -> str:
    """Return what a run that is cut off leaves, and how it goes on."""
    saved = whole_ones(Path(config.run_dir) / "checkpoints")
    if not saved:
        return f"no checkpoint is saved in run_dir={config.run_dir}, so the same command starts anew"
    return f"{saved[-1]} is saved, and the same command goes on from it"


def _describe(config: configs.Config, world_size: int | None) -> dict:
    from megatron_mm.model import accounting

    size = config.parallel.ranks_per_replica if world_size is None else world_size
    configs.check_world(config, size)
    return accounting.describe(config, size)


def _check(config: configs.Config, world_size: int | None) -> None:
    from megatron_mm.training.check import check

    for found in check(config, config.parallel.ranks_per_replica if world_size is None else world_size):
        print(printable.line(found))
    print("everything that can be checked on one CPU fits")


def _evaluate(config: configs.Config, path: Path) -> None:
    from megatron_mm.engine import mesh as meshes
    from megatron_mm.training.evaluate import evaluate_checkpoint

    mesh = meshes.initialize(config)
    losses = evaluate_checkpoint(config, mesh, path)
    if mesh.is_rank_0:
        for name, loss in losses.items():
            print(f"{printable.line(name):<40} {loss:.4f}")
        print(json.dumps({"checkpoint": str(path), **losses}))
    meshes.leave()


def _parser() -> argparse.ArgumentParser:
    parser = endings.Parser(
        prog="python -m megatron_mm.train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a multimodal decoder. Without torchrun it runs on one rank; without a GPU, on the CPU.",
        epilog=_explain_fields(),
    )
    parser.add_argument("preset", metavar="PRESET", help=f"one of {', '.join(configs.preset_names())}, or a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that differ from the preset"
    )
    parser.add_argument("--describe", action="store_true", help="print what the preset amounts to, as JSON, and exit")
    parser.add_argument(
        "--check", action="store_true", help="check all that a start would, on one CPU, writing nothing, and exit"
    )
    parser.add_argument(
        "--evaluate",
        metavar="CHECKPOINT",
        help="print the held-out losses of a checkpoint, by source and dataset, and exit",
    )
    parser.add_argument(
        "--world-size",
        type=endings.at_least(1),
        metavar="N",
        help="ranks of the run to describe or check (default: tp x cp x pp)",
    )
    return parser


def _explain_fields() -> str:
    lines = ["settings:"]
    for key, kind, default, explanation in configs.describe_fields():
        lines.append(f"  {key} ({kind}, {default if default == 'required' else 'default ' + default})")
        lines.append(
            textwrap.fill(explanation, 100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
        )
    return "\n".join(lines)


def _set_log_level() -> None:
    """Let rank 0 speak at INFO and the others at WARNING."""
    log.setLevel(logging.INFO if read_number("RANK", 0) == 0 else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
