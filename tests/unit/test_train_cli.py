"""The command line: help that explains, errors that a user can mend, no traceback for them."""

import subprocess
import sys

import pytest
from launch import run_command

from megatron_mm import config as configs
from megatron_mm import train
from megatron_mm.checkpoint.save import SaveFailed


def test_help_explains_every_field() -> None:
    command = [sys.executable, "-m", "megatron_mm.train", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    text = " ".join(shown.stdout.split())
    for key, _, _, explanation in configs.describe_fields():
        assert f" {key} (" in text
        assert explanation in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "Did you mean 'tiny'?"),
        (["tiny", "training.stepz=3"], "Did you mean training.steps?"),
        (["tiny", "parallel.tp=2"], "1 ranks cannot be cut into replicas of parallel.tp=2 x cp=1 x pp=1 = 2 ranks"),
        (["tiny", "data.train=[/nowhere/p]"], "/nowhere/p.json is missing"),
        (["tiny", "training.kernels=native", "data.train=[/nowhere/p]"], "training.kernels=native, but"),
        (["mm_1b"], "image.pretrained is not given, and training.start_from names no checkpoint"),
        (["tiny", "audio.trainable=false"], "an encoder of random weights that never learns"),
        (["tiny", "image.pretrained=''"], "image.pretrained: String should have at least 1 character"),
        (["mm_88b", "--describe", "--world-size", "100"], "100 ranks cannot be cut"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(arguments: list[str], message: str) -> None:
    failed = run_command(*arguments)
    assert failed.status == (3 if "p.json" in message else 2)
    assert failed.stderr.startswith("error: ")
    assert message in failed.stderr


def test_a_run_that_stops_by_choice_says_why_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(config: configs.Config) -> None:
        raise SaveFailed("3 saves in a row failed")

    monkeypatch.setattr(train, "_train", stop)
    monkeypatch.setenv("RANK", "3")
    assert train.main(["tiny"]) == 75
    assert capsys.readouterr().err == "[rank 3] SaveFailed: 3 saves in a row failed\n"
