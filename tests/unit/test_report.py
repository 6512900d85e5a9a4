"""The report and the plot of a run, from its metrics.jsonl."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megatron_mm.training.goodput import Goodput, goodput_of
from megatron_mm.training.report import plot_losses, write_report

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Four steps in two layouts, each with its held-out losses before and after."""
    records = [{"step": 0, "layout": "TP2", "parameters": 1234567}, heldout(0, 5.0), step(1, 4.9), step(2, 4.5)]
    records += [{"step": 2, "layout": "DP2", "parameters": 1234567}, step(3, 4.2), step(4, 4.0), heldout(4, 4.1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def step(number: int, loss: float) -> dict:
    return {"step": number, "loss": loss, "grad_norm": 1.0, "tokens": 100 * number, "tokens_per_second": 10.0 * number}


def heldout(number: int, loss: float) -> dict:
    return {"step": number, "heldout/loss": loss, "heldout/loss/text": loss + 1.0}


def test_goodput_is_the_share_of_time_in_steps_that_are_kept() -> None:
    records = [
        {"step": 0, "layout": "TP2", "start_seconds": 10.0, "time": 110.0, "lost_seconds": 0.0},
        {"step": 1, "grad_norm": 1.0, "step_seconds": 20.0, "time": 130.0},
        {"step": 1, "save_stall_seconds": 2.0, "save_seconds": 9.0, "time": 132.0},
        # Killed after step 2, which took 20 s; started again 30 s later.
        {"step": 1, "layout": "TP2", "start_seconds": 8.0, "time": 190.0, "lost_seconds": 20.0},
        {"step": 2, "grad_norm": 1.0, "step_seconds": 10.0, "time": 200.0},
    ]
    spent = goodput_of(records)
    assert spent == Goodput(steps=30.0, lost_steps=20.0, save_stalls=2.0, starts=18.0, other=30.0)
    assert spent.total == 100.0
    records.append({"step": 3, "grad_norm": 0.0, "updated": False, "step_seconds": 25.0, "time": 225.0})
    assert goodput_of(records) == Goodput(
        steps=30.0, lost_steps=20.0, idle_steps=25.0, save_stalls=2.0, starts=18.0, other=30.0
    )
    assert spent.describe().startswith("30.0% of 100 s: steps 30 s, lost steps 20 s")


def test_the_report_says_what_was_run_and_learned(run_dir: Path) -> None:
    lines = [" ".join(line.split()) for line in write_report(run_dir).splitlines()]
    assert lines[:8] == [
        "model 1,234,567 parameters",
        "layout TP2, steps 0 to 2, 15 tokens/s",
        "layout DP2, steps 2 to 4, 35 tokens/s",
        "tokens 400",
        "training loss 4.900 -> 4.000",
        "held out after step 0 -> after step 4",
        "all loss 5.000 -> 4.100",
        "text loss 6.000 -> 5.100",
    ]


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """Four steps over two datasets, tokens counted apart; the second has no loss, and one restart lost counts."""
    names = ("/data/shards/web", "/data/shards/books")

    def by_dataset(prefix: str, loss: float) -> dict:
        return {f"{prefix}loss/dataset/{name}": loss + number for number, name in enumerate(names)}

    def counts(number: int) -> dict:
        kinds = {"text_tokens": 70, "image_tokens": 20, "audio_tokens": 10, "padding_tokens": 25, "loss_tokens": 65}
        return {kind: size * number for kind, size in kinds.items()}

    records = [{"step": 0, "layout": "DP1", "parameters": 10}, {**heldout(0, 5.0), **by_dataset("heldout/", 5.0)}]
    records += [
        {**step(number, 5.0 - number), **by_dataset("", 5.0 - number), **counts(number)} for number in (1, 2, 3)
    ]
    records[3] = {**step(2, 0.0), **counts(2), "loss": None, "updated": False}
    records += [{"step": 3, "layout": "DP1", "parameters": 10, "uncounted_steps": 2}, {**step(4, 1.0), **counts(4)}]
    records += [{**heldout(4, 4.0), **by_dataset("heldout/", 4.0)}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_tokens_are_told_by_kind_and_losses_by_dataset(counted: Path) -> None:
    lines = [" ".join(line.split()) for line in write_report(counted).splitlines()]
    assert lines[3:-2] == [
        *("tokens 400", "text 280", "image 80", "audio 40", "with loss 260"),
        "padding 100 positions, 20.00% of all",
        "of 2 steps metrics.jsonl has no counts: they are left out here",
        "training loss 4.000 -> 1.000",
        *("loss 4.000 -> 2.000, /data/shards/web", "loss 5.000 -> 3.000, /data/shards/books"),
        "no loss in 1 of the steps: no token of their batch bore loss, and they changed nothing",
        "held out after step 0 -> after step 4",
        *("all loss 5.000 -> 4.000", "text loss 6.000 -> 5.000"),
        *("loss 5.000 -> 4.000, /data/shards/web", "loss 6.000 -> 5.000, /data/shards/books"),
    ]


def test_held_out_datasets_have_a_panel_of_their_own(counted: Path) -> None:
    with Image.open(plot_losses(counted)) as picture:
        two = picture.height
    (counted / "metrics.jsonl").write_text(json.dumps(step(1, 4.0)) + "\n")
    with Image.open(plot_losses(counted)) as picture:
        assert two == 2 * picture.height


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_run_of_few_records_is_reported_and_drawn(counted: Path, kept: int) -> None:
    lines = (counted / "metrics.jsonl").read_text().splitlines()
    no_loss = json.dumps({"step": 1, "heldout/loss": None})
    (counted / "metrics.jsonl").write_text("\n".join([*lines[:kept], no_loss, '{"step": 2, "lo']))
    plot_losses(counted)
    assert "held out" in write_report(counted)
    (counted / "metrics.jsonl").write_text(no_loss + "\n")
    assert "no loss: no token of the samples bears loss" in write_report(counted)


def test_the_curves_are_drawn(run_dir: Path) -> None:
    with Image.open(plot_losses(run_dir)) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=1 << 20)}
    assert (0, 0, 0) in colours, "the held-out loss is drawn in black"
    assert any(max(colour) - min(colour) > 100 for colour in colours), "and that of each source in a colour"


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools" / "report_run.py"), str(tmp_path)]
    failed = subprocess.run(tool, capture_output=True, text=True)
    assert failed.returncode == 3
    assert f"error: {tmp_path}/metrics.jsonl does not exist" in failed.stderr
