"""A plan as text and as one HTML page: what was chosen and why, its schedule, its memory, and the other layouts."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from megatron_mm import printable
from megatron_mm.config import Config
from megatron_mm.errors import ConfigError
from megatron_mm.planning import pictures
from megatron_mm.planning.cost import Gpu
from megatron_mm.planning.layouts import Forecast, Planned, overrides, passes
from megatron_mm.planning.rehearsal import RankReport
from megatron_mm.planning.timeline import bubble

ROWS = 20
STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1200px;color:#222}
h1{font-size:22px} h2{font-size:16px;margin-top:2em} svg{width:100%;height:auto}
table{border-collapse:collapse} td,th{padding:3px 10px;text-align:right;border-bottom:1px solid #e5e5e5}
td:first-child,th:first-child{text-align:left} code{background:#f3f3f3;padding:2px 4px}
tr.best{font-weight:600;background:#f6f1e7}
"""


def explain(
    config: Config, planned: Sequence[Planned], too_big: int, forecast: Forecast, *, parameters: int
) -> list[str]:
    """Return the plan as lines for people; `parameters` are all of the model's."""
    best = planned[0]
    time = best.time
    tokens, model = config.tokens_per_step * config.training.steps, config.model
    lines = [
        f"{best.describe()}: {time.total:.2f} s a step, the fastest of {len(planned)} "
        f"layouts that fit; {too_big} do not",
        "settings: " + (" ".join(overrides(config, best.layout)) or "as they are"),
        "seconds: " + ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in vars(time).items()),
        f"{forecast.tokens_per_second:,.0f} tokens/s; MFU "
        + ", ".join(f"{name} {share:.1%}" for name, share in forecast.mfu.items()),
        f"bubble {best.layout.bubble:.1%} of the pipeline's work; {best.memory_bytes / 2**30:.1f} GiB on the fullest "
        "rank",
        f"{forecast.days:.1f} days, {forecast.gpu_hours:,.0f} GPU-hours; {forecast.days_with_failures:.1f} days with a "
        f"failure every {forecast.hours_between_failures:.0f} h and a checkpoint of "
        f"{forecast.checkpoint_bytes / 1e12:.2f} TB every {forecast.checkpoint_seconds_apart / 60:.0f} minutes "
        "(Young/Daly)",
    ]
    if len(planned) > 1:
        second = planned[1]
        lines.append(f"next: {second.describe()}, {second.time.total / time.total - 1:+.1%}")
    lines.append(
        f"{parameters / 1e9:.2f}B parameters (12 L D^2 = {12 * model.num_layers * model.hidden_size**2 / 1e9:.1f}B "
        f"counts multi-head attention; here are {model.num_query_groups} key/value heads); 6 N T = "
        f"{6 * parameters * tokens:.2e} FLOPs for {tokens / 1e12:.2f}T tokens"
    )
    return lines


def page(
    title: str,
    config: Config,
    planned: Sequence[Planned],
    lines: Sequence[str],
    gpu: Gpu,
    rehearsed: Sequence[RankReport] = (),
) -> str:
    """Return the report as HTML without any other file; `rehearsed` are ranks of the first of `planned`."""
    best = planned[0]
    parts = [f"<p>{escape(line)}</p>" for line in lines]
    parts.append("<h2>Schedule of a step</h2>" + _schedule(config, best, gpu))
    held = {f"stage {stage}": memory for stage, memory in enumerate(best.memory)}
    for report in rehearsed:
        held[f"rank {report.rank}, rehearsed"] = {**report.peak, **report.additions}
    by_rank = pictures.memory_by_rank(held, "a rank of each stage at its fullest", capacity=gpu.memory_bytes)
    parts.append("<h2>Memory</h2>" + pictures.as_svg(by_rank))
    for report in rehearsed:
        name = f"rank {report.rank} ({report.place}) over a step, rehearsed"
        parts.append(pictures.as_svg(pictures.memory_over_a_step(report.history, name)))
    parts.append("<h2>Layouts</h2>" + _table(planned))
    return _html(title, parts)


def rehearsal_page(title: str, reports: Sequence[RankReport]) -> str:
    """Return what rehearsed ranks hold as HTML without any other file: side by side, and each over its step."""
    held = {f"rank {report.rank}": {**report.peak, **report.additions} for report in reports}
    parts = [pictures.as_svg(pictures.memory_by_rank(held, "each rank at its fullest"))]
    for report in reports:
        name = f"rank {report.rank} ({report.place}): {report.parameters:,} parameters, {report.num_layers} layers"
        parts.append(pictures.as_svg(pictures.memory_over_a_step(report.history, name)))
    return _html(title, parts)


def check_folders(files: Mapping[str, Path | None]) -> None:
    """Raise ConfigError, before anything is computed, if a file that an option names could not be written."""
    for name, path in files.items():
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{name} {path}: the folder {path.parent} does not exist. Make it first.")


def _html(title: str, parts: Sequence[str]) -> str:
    title = printable.line(title)
    head = f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style>"
    return f"{head}<h1>{escape(title)}</h1>{''.join(parts)}\n"


def _schedule(config: Config, best: Planned, gpu: Gpu) -> str:
    layout = best.layout
    if layout.pp == 1:
        return "<p>One stage: nothing waits.</p>"
    timed = passes(config, best, gpu)
    order = "interleaved 1F1B" if layout.vpp > 1 else "1F1B"
    title = (
        f"{order}, {layout.num_micro_batches} micro-batches in {layout.vpp} chunks a stage: stages wait "
        f"{bubble(timed):.1%} of their work ({layout.bubble:.1%} were all chunks alike and nothing sent)"
    )
    return pictures.as_svg(pictures.timeline(timed, title))


def _table(planned: Sequence[Planned]) -> str:
    """Return the fastest layouts as a table: how they are cut, seconds of a step and where they go, memory."""
    columns = "TP", "PP", "VPP", "CP", "DP", "micro-batch", "recompute", "precision", "s a step", "to the best"
    times = {"layers": "layers", "head": "head", "bubble": "bubble", "tensor_communication": "TP/CP sends"}
    times |= {"pipeline_communication": "PP sends", "data_communication": "DP sends", "optimizer": "optimizer"}
    names = "".join(f"<th>{name}" for name in (*columns, *times.values(), "GiB"))
    rows = []
    for place, one in enumerate(planned[:ROWS]):
        cut, seconds = one.layout, one.time.total
        cells = [cut.tp, cut.pp, cut.vpp, cut.cp, cut.dp, cut.micro_batch_size, cut.recompute, cut.precision]
        cells += [f"{seconds:.2f}", f"{seconds / planned[0].time.total - 1:+.1%}"]
        cells += [f"{getattr(one.time, name):.2f}" for name in times]
        cells.append(f"{one.memory_bytes / 2**30:.1f}")
        kind = " class=best" if place == 0 else ""
        rows.append(f"<tr{kind}>" + "".join(f"<td>{cell}" for cell in cells) + "</tr>")
    return f"<table><tr>{names}</tr>{''.join(rows)}</table>"
