"""Choose the layout of a job on so many GPUs, and say what the run will take."""

import argparse
import sys
from pathlib import Path

from megatron_mm import config as configs
from megatron_mm.errors import ConfigError
from megatron_mm.planning.cost import GPUS
from megatron_mm.planning.layouts import forecast, plan, shape_of
from megatron_mm.planning.report import explain, page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", help="a preset's name, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the job")
    parser.add_argument("--gpu", choices=sorted(GPUS), required=True)
    parser.add_argument("--html", type=Path, help="write the report page there")
    arguments = parser.parse_intermixed_args()
    try:
        config = configs.load(arguments.preset, arguments.overrides)
        gpu, precision = GPUS[arguments.gpu], config.training.precision
        if precision == "fp8" and gpu.fp8_flops == gpu.bf16_flops:
            raise ConfigError(f"training.precision=fp8, but {gpu.name} has no FP8. Use bf16, or h100-80.")
        from megatron_mm.model.accounting import build_on_meta, count_parameters

        counts = count_parameters(build_on_meta(config))
        media = sum(count for name, count in counts.items() if name.startswith(("vision", "audio")))
        planned, too_big = plan(config, gpus=arguments.gpus, gpu=gpu, precision=precision, extra_parameters=media)
        if not planned:
            raise ConfigError(f"none of {too_big} layouts fits {arguments.gpus} {gpu.name}. Use more GPUs.")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    total = counts["total"]
    ahead = forecast(config, planned[0], gpus=arguments.gpus, gpu=gpu, parameters=total)
    tokens = config.tokens_per_step * config.training.steps
    shape = shape_of(config)
    lines = [
        *explain(planned, too_big, ahead),
        f"{total / 1e9:.2f}B parameters (12 L D^2 = {12 * shape.num_layers * shape.hidden**2 / 1e9:.1f}B counts "
        f"multi-head attention; with {shape.groups} key/value heads the wider FFN makes up for it); 6 N T = "
        f"{6 * total * tokens:.2e} FLOPs for {tokens / 1e12:.2f}T tokens",
    ]
    print("\n".join(lines))
    if arguments.html:
        title = f"{arguments.preset} on {arguments.gpus:,} {gpu.name} ({precision})"
        arguments.html.write_text(page(title, planned, lines, capacity=gpu.memory_bytes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
