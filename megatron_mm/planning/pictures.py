"""Pictures of a plan: the schedule as a timeline, memory by rank, and memory over a step."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_mm.planning.ledger import Sample
from megatron_mm.planning.timeline import Pass, waiting

PASSES = {False: "#3b6ea5", True: "#d9822b"}
"""Colours of forward and backward passes of the first chunk; those of later chunks are lighter."""
CATEGORIES = {
    "weights": "#3b6ea5",
    "gradients": "#6fa8dc",
    "optimizer": "#7f8c8d",
    "activations": "#d9822b",
    "temporary": "#e9c46a",
    "communication": "#7b9e4b",
}
"""Colours of what memory is held for."""
FEW = 400
"""Passes of which each is drawn with its number; more are drawn as pixels, as are half as many moments of memory."""
GIB = 2**30


def timeline(passes: Sequence[Pass], title: str) -> Figure:
    """Draw a row a stage and a box a pass; what is left white is waiting, whose share stands at the end of the row."""
    stages, chunks = 1 + max(one.stage for one in passes), 1 + max(one.chunk for one in passes)
    figure, axes = _axes(1.3 + 0.34 * stages, title)
    boxes = []
    for one in passes:
        low, high = one.stage - 0.42, one.stage + 0.42
        boxes.append([(one.start, low), (one.start, high), (one.end, high), (one.end, low)])
    colours = [_lighter(PASSES[one.backward], 0.6 * one.chunk / chunks) for one in passes]
    edges = "white" if len(passes) <= FEW else "none"
    drawn = PolyCollection(boxes, facecolors=colours, edgecolors=edges, linewidths=0.5)
    drawn.set_rasterized(len(passes) > FEW)
    axes.add_collection(drawn)
    for one in passes if len(passes) <= FEW else ():
        middle = (one.start + one.end) / 2
        axes.text(middle, one.stage, str(one.micro_batch), ha="center", va="center", fontsize=6, color="white")
    seconds = max(one.end for one in passes)
    for stage, share in enumerate(waiting(passes)):
        axes.text(1.01 * seconds, stage, f"{share:.1%}", va="center", fontsize=8, color="0.35")
    axes.text(1.01 * seconds, -0.75, "waits", va="center", fontsize=8, color="0.35")
    axes.set_xlim(0, seconds)
    axes.set_ylim(stages - 0.4, -0.6)
    axes.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
    axes.set_xlabel("seconds")
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    names = "forward", "backward"
    for backward, name in enumerate(names):
        axes.plot([], [], color=PASSES[bool(backward)], linewidth=6, label=name)
    if chunks > 1:
        axes.plot([], [], color=_lighter(PASSES[False], 0.5), linewidth=6, label="lighter: later layers")
    _legend(axes, columns=3)
    return figure


def memory_by_rank(held: Mapping[str, Mapping[str, float]], title: str, *, capacity: float | None = None) -> Figure:
    """Draw a bar a rank, cut into what memory is held for; `held` is bytes by rank and category.

    `capacity` is what the device has, in bytes.
    """
    figure, axes = _axes(1.4 + 0.34 * len(held), title)
    left = [0.0] * len(held)
    for name in _categories(held.values()):
        sizes = [categories.get(name, 0.0) / GIB for categories in held.values()]
        axes.barh(range(len(held)), sizes, left=left, color=_colour(name), label=name.replace("_", " "), height=0.75)
        left = [before + size for before, size in zip(left, sizes)]
    for place, total in enumerate(left):
        axes.text(total, place, f" {total:.1f}", va="center", fontsize=8)
    if capacity is not None:
        axes.axvline(capacity / GIB, color="0.3", linewidth=1, linestyle="--")
        axes.text(capacity / GIB, -0.75, f"{capacity / GIB:.0f} GiB ", ha="right", va="center", fontsize=8)
    axes.set_yticks(range(len(held)), list(held))
    axes.set_ylim(len(held) - 0.4, -0.9)
    axes.set_xlabel("GiB")
    axes.tick_params(left=False)
    _legend(axes, columns=6)
    return figure


def memory_over_a_step(history: Sequence[Sample], title: str) -> Figure:
    """Draw what a rehearsed rank holds over a step, and when it is most."""
    figure, axes = _axes(3.6, title)
    times = [sample.operators - history[0].operators for sample in history]
    names = _categories([sample.held for sample in history])
    layers = [[sample.held.get(name, 0) / GIB for sample in history] for name in names]
    colours = [_colour(name) for name in names]
    for layer in axes.stackplot(times, layers, colors=colours, labels=names, step="post", linewidth=0):
        layer.set_rasterized(len(history) > FEW // 2)
    totals = [sum(sample.held.values()) / GIB for sample in history]
    place = max(range(len(totals)), key=totals.__getitem__)
    axes.plot(times[place], totals[place], marker="v", color="black", markersize=6)
    side = "left" if times[place] < times[-1] / 2 else "right"
    text = f"  peak {totals[place]:.2f} GiB, {history[place].phase}  "
    axes.text(times[place], totals[place], text, ha=side, va="bottom", fontsize=9)
    axes.set_xlim(0, times[-1])
    axes.set_ylim(0, 1.12 * totals[place])
    axes.set_xlabel("operators of the step")
    axes.set_ylabel("GiB")
    _legend(axes, columns=6)
    return figure


def as_svg(figure: Figure) -> str:
    """Return a figure as the SVG element of an HTML page; the same figure gives the same text."""
    with matplotlib.rc_context({"svg.hashsalt": "megatron_mm", "svg.fonttype": "none"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, dpi=200)
    return text.getvalue()[text.getvalue().index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a file of the kind that its name ends with: .png, .svg or .pdf."""
    figure.savefig(path, dpi=150)


def _axes(height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(12, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left", pad=24)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(axes: Axes, *, columns: int) -> None:
    axes.legend(frameon=False, ncols=columns, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0))


def _categories(held: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the categories that anything is held for, the usual ones first."""
    found = {name for categories in held for name, size in categories.items() if size}
    return [name for name in CATEGORIES if name in found] + sorted(found - CATEGORIES.keys())


def _colour(category: str) -> str:
    return CATEGORIES.get(category, "#b07aa1")


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    """Return `colour` mixed with a share of white."""
    return tuple(part + (1.0 - part) * share for part in to_rgb(colour))
