"""What came of a run: its loss curves as a picture, and a short report, both from metrics.jsonl."""

import os.path
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_mm.modalities import BY_NAME
from megatron_mm.model.loss import BY_DATASET
from megatron_mm.printable import line
from megatron_mm.storage import replacing
from megatron_mm.training.goodput import goodput_of
from megatron_mm.training.metrics import read_metrics

PREFIX = "heldout/loss"
KINDS = ("text", *BY_NAME)
COLOURS, DASHES = 10, ("-", "--", ":")
"""Curves that matplotlib gives colours of their own, and what tells the next ones from them."""

Records = Sequence[dict[str, Any]]


def plot_losses(run_dir: str | Path) -> Path:
    """Draw the training loss and the held-out losses into run_dir/loss.png, and return the file.

    A panel shows the held-out losses by source and, where there are several datasets, another one by dataset.
    """
    records = read_metrics(run_dir)
    names = _names(records, PREFIX)
    datasets = _names(records, f"heldout/{BY_DATASET}")
    panels = [[name for name in names if name not in (PREFIX, *datasets)]]
    if len(datasets) > 1:
        panels.append(datasets)
    figure = Figure(figsize=(8, 4.5 * len(panels)), layout="constrained")
    rows = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, own in zip(rows, panels):
        _draw(axes, records, own)
    rows[-1].set_xlabel("optimizer step")
    path = Path(run_dir) / "loss.png"
    with replacing(path) as file:
        figure.savefig(file, dpi=150, format="png")
    return path


def _draw(axes: Axes, records: Records, names: Sequence[str]) -> None:
    """Draw the training loss, the whole held-out loss and those of `names`, and where the run was started."""
    steps, evaluations = _steps(records), [record for record in records if PREFIX in record]
    axes.plot(*_curve(steps, "loss"), color="0.75", linewidth=1, label="training, all sources")
    axes.plot(*_curve(evaluations, PREFIX), color="black", linewidth=2, marker="o", markersize=4, label="held out, all")
    for number, (name, label) in enumerate(zip(names, _labels(names))):
        style = {"linestyle": DASHES[number // COLOURS % len(DASHES)], "linewidth": 1.5, "marker": "o", "markersize": 4}
        axes.plot(*_curve(evaluations, name), label=f"held out, {label}", **style)
    for start in [record for record in records if "layout" in record]:
        axes.axvline(start["step"], color="0.85", linestyle="--", linewidth=1, zorder=0)
        layout, place = f" {line(start['layout'])}", {"transform": axes.get_xaxis_transform(), "va": "bottom"}
        axes.text(start["step"], 1.0, layout, **place, fontsize=8, parse_math=False)
    axes.set_ylabel("loss (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False, fontsize=8).get_texts():
        text.set_parse_math(False)  # the $ of a path is no formula


def write_report(run_dir: str | Path) -> str:
    """Return the report of a run as text: layouts, size, speed, tokens, losses, and where its files are."""
    records = read_metrics(run_dir)
    spent = goodput_of(records)
    lines = [
        *_describe_starts(records),
        *_describe_tokens(records),
        *([f"goodput     {spent.describe()}"] if spent.total else []),
        *_describe_training(records),
        *_describe_heldout(records),
        f"plot        {Path(run_dir) / 'loss.png'}",
        f"files       {run_dir}: metrics.jsonl, config.yaml, tensorboard/, checkpoints/",
    ]
    return "\n".join(map(line, lines))


def _describe_starts(records: Records) -> Iterator[str]:
    starts, steps = [record for record in records if "layout" in record], _steps(records)
    if starts:
        yield f"model       {starts[-1]['parameters']:,} parameters"
    for number, start in enumerate(starts):
        last = steps[-1]["step"] if steps else start["step"]
        stop = starts[number + 1]["step"] if number + 1 < len(starts) else last
        own = [record for record in steps if start["step"] < record["step"] <= stop]
        speed = f"{median(record['tokens_per_second'] for record in own):,.0f} tokens/s" if own else "no steps"
        yield f"layout      {start['layout']}, steps {start['step']} to {stop}, {speed}"


def _describe_tokens(records: Records) -> Iterator[str]:
    """Tell what the positions of all steps held, each kind apart."""
    steps = _steps(records)
    if not steps:
        return
    last = steps[-1]
    yield f"tokens      {last['tokens']:,}"
    if "loss_tokens" not in last:  # a run of before kinds were counted apart, whose tokens include padding
        return
    for kind in KINDS:
        yield f"  {kind:<9} {last[f'{kind}_tokens']:,}"
    yield f"  with loss {last['loss_tokens']:,}"
    padding = last["padding_tokens"]
    yield f"padding     {padding:,} positions, {padding / max(1, padding + last['tokens']):.2%} of all"
    uncounted = sum(record.get("uncounted_steps", 0) for record in records)
    if uncounted:
        yield f"  of {uncounted} steps metrics.jsonl has no counts: they are left out here"


def _describe_training(records: Records) -> Iterator[str]:
    steps = _steps(records)
    without = sum(record.get("loss", 0.0) is None for record in steps)
    yield f"training    {_change(steps, 'loss') or 'no step with a loss'}"
    yield from _by_dataset(steps, BY_DATASET)
    if without:
        yield f"  no loss   in {without} of the steps: no token of their batch bore loss, and they changed nothing"


def _describe_heldout(records: Records) -> Iterator[str]:
    evaluations = [record for record in records if PREFIX in record]
    if not evaluations:
        yield "held out    not evaluated"
        return
    yield f"held out    after step {evaluations[0]['step']} -> after step {evaluations[-1]['step']}"
    datasets = f"heldout/{BY_DATASET}"
    for name in _names(evaluations, PREFIX):
        if not name.startswith(datasets):
            label = name.removeprefix(PREFIX).lstrip("/") or "all"
            yield f"  {label:<9} {_change(evaluations, name) or 'no loss: no token of the samples bears loss'}"
    yield from _by_dataset(evaluations, datasets)


def _by_dataset(records: Records, prefix: str) -> Iterator[str]:
    """Tell the loss of each dataset, where there are several."""
    names = _names(records, prefix)
    for name in names if len(names) > 1 else ():
        yield f"  {_change(records, name)}, {name.removeprefix(prefix)}"


def _steps(records: Records) -> list[dict[str, Any]]:
    return [record for record in records if "grad_norm" in record]


def _names(records: Records, prefix: str) -> list[str]:
    """Return the names that begin with `prefix`, in the order in which they first appear."""
    return list(dict.fromkeys(name for record in records for name in record if name.startswith(prefix)))


def _labels(names: Sequence[str]) -> list[str]:
    """Return what tells `names` apart: the folder that all datasets lie in is left out, and a long name's beginning."""
    own = [name.removeprefix(f"{PREFIX}/").removeprefix("dataset/") for name in names]
    shared = os.path.commonpath(own) if len(own) > 1 and len({name.startswith("/") for name in own}) == 1 else ""
    labels = [line(name).removeprefix(line(shared)).lstrip("/") or line(name) for name in own]
    return [label if len(label) <= 40 else f"...{label[-37:]}" for label in labels]


def _curve(records: Records, name: str) -> tuple[list[int], list[float]]:
    known = [record for record in records if record.get(name) is not None]
    return [record["step"] for record in known], [record[name] for record in known]


def _change(records: Records, name: str) -> str:
    """Return the first and the last value that is known, for people; nothing if there is none."""
    _, values = _curve(records, name)
    return f"loss {values[0]:.3f} -> {values[-1]:.3f}" if values else ""
