"""A plan as one HTML page: what was chosen and why, the schedule as a timeline, memory, and the table of layouts."""

from html import escape

from megatron_mm.planning.layouts import Forecast, Planned

COLOURS = {"forward": "#4c78a8", "backward": "#72b7b2"}
BARS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
ROWS = 20


def timeline(pp: int, micro_batches: int) -> str:
    """Return the 1F1B schedule as SVG: a row a stage, backward twice as long as forward; white is the bubble.

    An interleaved schedule is drawn by its plain form, whose bubble is vpp times as wide.
    """
    forward, backward = 1.0, 2.0
    done: dict[tuple[str, int, int], float] = {}
    queues = []
    for stage in range(pp):
        warm_up = min(pp - stage - 1, micro_batches)
        order = [("forward", number) for number in range(warm_up)]
        for number in range(micro_batches - warm_up):
            order += [("forward", warm_up + number), ("backward", number)]
        order += [("backward", number) for number in range(micro_batches - warm_up, micro_batches)]
        queues.append(order)
    clock, boxes = [0.0] * pp, []
    while any(queues):
        for stage, queue in enumerate(queues):
            if not queue:
                continue
            kind, number = queue[0]
            before = ("forward", stage - 1, number) if kind == "forward" else ("backward", stage + 1, number)
            first = (kind == "forward" and stage == 0) or (kind == "backward" and stage == pp - 1)
            if not first and before not in done:
                continue
            start = max(clock[stage], 0.0 if first else done[before])
            clock[stage] = done[kind, stage, number] = start + (forward if kind == "forward" else backward)
            boxes.append((stage, start, clock[stage] - start, kind, number))
            queue.pop(0)
    scale = 900 / max(clock)
    parts = [
        f'<rect x="{60 + start * scale:.1f}" y="{8 + 22 * stage}" width="{width * scale - 0.6:.1f}" height="19" '
        f'fill="{COLOURS[kind]}"><title>{kind} {number}</title></rect>'
        for stage, start, width, kind, number in boxes
    ]
    names = [f'<text x="0" y="{22 + 22 * s}" font-size="12">stage {s}</text>' for s in range(pp)]
    return f'<svg width="970" height="{14 + 22 * pp}">{"".join(names + parts)}</svg>'


def memory_bars(planned: Planned, capacity: float) -> str:
    """Return the memory of the fullest rank by category, against what the GPU has, as SVG."""
    x, parts = 0.0, []
    for colour, (name, size) in zip(BARS, planned.memory.items()):
        width = 900 * size / capacity
        parts.append(f'<rect x="{x:.1f}" y="0" width="{width:.1f}" height="24" fill="{colour}"/>')
        parts.append(f'<text x="{x + 3:.1f}" y="40" font-size="11">{name} {size / 2**30:.1f}</text>')
        x += max(width, 1)
    return f'<svg width="920" height="46"><rect width="900" height="24" fill="#eee"/>{"".join(parts)}</svg>'


def explain(planned: list[Planned], too_big: int, forecast: Forecast) -> list[str]:
    """Return the plan as lines for people."""
    best = planned[0]
    time = best.time
    lines = [
        f"{best.describe()}: {time.total:.2f} s a step, the fastest of {len(planned)} "
        f"layouts that fit; {too_big} do not",
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
    return lines


def page(title: str, planned: list[Planned], lines: list[str], *, capacity: float) -> str:
    """Return the report as HTML without any other file."""
    best = planned[0]
    rows = "".join(
        f"<tr><td>{escape(one.describe())}</td><td>{one.time.total:.2f}</td><td>{one.layout.bubble:.1%}</td>"
        f"<td>{one.time.tensor_communication:.2f}</td><td>{one.memory_bytes / 2**30:.1f}</td></tr>"
        for one in planned[:ROWS]
    )
    shown = min(best.layout.num_micro_batches, 16)
    return (
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title>"
        "<style>body{font:14px sans-serif;margin:2em}"
        "td,th{padding:2px 10px;text-align:right}td:first-child{text-align:left}</style>"
        f"<h1>{escape(title)}</h1>{''.join(f'<p>{escape(line)}</p>' for line in lines)}"
        f"<h2>Schedule (plain 1F1B, {shown} micro-batches; interleaving divides the white by {best.layout.vpp})</h2>"
        f"{timeline(best.layout.pp, shown)}<h2>Memory of the fullest rank, GiB of {capacity / 2**30:.0f}</h2>"
        f"{memory_bars(best, capacity)}<h2>Layouts</h2><table><tr><th>layout<th>s a step<th>bubble"
        f"<th>exposed s<th>GiB</tr>{rows}</table>\n"
    )
