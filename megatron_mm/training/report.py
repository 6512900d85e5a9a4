"""What came of a run: its loss curves as a picture, and a short report, both from metrics.jsonl."""

from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from megatron_mm.training.goodput import goodput_of
from megatron_mm.training.metrics import read_metrics

PREFIX = "heldout/loss"


def plot_losses(run_dir: str | Path) -> Path:
    """Draw the training loss and the held-out losses by source into run_dir/loss.png, and return the file."""
    records = read_metrics(run_dir)
    steps = [record for record in records if "grad_norm" in record]
    evaluations = _evaluations(records)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_curve(steps, "loss"), color="0.75", linewidth=1, label="training, all sources")
    for name in sorted({name for record in evaluations for name in record if name.startswith(PREFIX)}):
        label = "held out, " + (name.removeprefix(PREFIX + "/") if name != PREFIX else "all sources")
        style = {"color": "black", "linewidth": 2} if name == PREFIX else {"linewidth": 1.5}
        axes.plot(*_curve(evaluations, name), marker="o", markersize=4, label=label, **style)
    for start in [record for record in records if "layout" in record]:
        axes.axvline(start["step"], color="0.85", linestyle="--", linewidth=1, zorder=0)
        axes.text(
            start["step"], 1.0, f" {start['layout']}", transform=axes.get_xaxis_transform(), va="bottom", fontsize=8
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path = Path(run_dir) / "loss.png"
    figure.savefig(path, dpi=150)
    return path


def write_report(run_dir: str | Path) -> str:
    """Return the report of a run as text: layouts, size, speed, held-out losses, and where its files are."""
    records = read_metrics(run_dir)
    starts = [record for record in records if "layout" in record]
    steps = [record for record in records if "grad_norm" in record]
    evaluations = _evaluations(records)
    lines = [f"model       {starts[-1]['parameters']:,} parameters"]
    for number, start in enumerate(starts):
        stop = starts[number + 1]["step"] if number + 1 < len(starts) else steps[-1]["step"]
        own = [record for record in steps if start["step"] < record["step"] <= stop]
        speed = f"{median(record['tokens_per_second'] for record in own):,.0f} tokens/s" if own else "no steps"
        lines.append(f"layout      {start['layout']}, steps {start['step']} to {stop}, {speed}")
    lines.append(f"tokens      {steps[-1]['tokens']:,}")
    spent = goodput_of(records)
    if spent.total:
        lines.append(f"goodput     {spent.describe()}")
    lines.append(f"training    loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}")
    lines.append(f"held out    after step {evaluations[0]['step']} -> after step {evaluations[-1]['step']}")
    for name in [name for name in evaluations[0] if name.startswith(PREFIX)]:
        label = name.removeprefix(PREFIX).lstrip("/") or "all"
        lines.append(f"  {label:<9} loss {evaluations[0][name]:.3f} -> {evaluations[-1][name]:.3f}")
    lines += [
        f"plot        {Path(run_dir) / 'loss.png'}",
        f"files       {run_dir}: metrics.jsonl, config.yaml, tensorboard/, checkpoints/",
    ]
    return "\n".join(lines)


def _evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if PREFIX in record]


def _curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    with_name = [record for record in records if name in record]
    return [record["step"] for record in with_name], [record[name] for record in with_name]
