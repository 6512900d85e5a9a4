"""The batch scripts print what they would run; what they run on a SLURM is tested in tests/slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script outside of SLURM."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "NCCL_"))}
    return subprocess.run(
        [str(ROOT / "examples" / script), *arguments],
        env={**clean, "PYTHON": sys.executable, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
    )


def plan(script: str, *arguments: str, **environment: str) -> str:
    """Return what a script prints outside of SLURM."""
    ended = run(script, *arguments, **environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize(("gpu", "preset"), [("NVIDIA A100-SXM4-80GB", "mm_88b"), ("NVIDIA H100", "mm_88b_fp8")])
def test_the_88b_runs_on_1024_ranks_in_the_precision_of_its_gpus(gpu: str, preset: str) -> None:
    full = "1" if "H100" in gpu else "brief"
    random = {"IMAGE_PRETRAINED": "random", "AUDIO_PRETRAINED": "random"}
    text = plan("pretrain_88b.sh", "training.steps=20000", GPU=gpu, DRY_RUN=full, **random)
    assert "# 128 nodes x 8 ranks = 1024 ranks" in text
    assert f"-m megatron_mm.train {preset} run_dir=" in text
    assert "training.steps=20000" in text
    assert ('"total": 88579350656' in text and '"ranks": 1024' in text) == (full == "1")
    exports = re.findall(r"^export .*$", text, re.MULTILINE)
    assert len(exports) >= 8
    assert all(re.fullmatch(r"export \w+=\S+    # .{20,}", line) for line in exports)


def train_command(text: str) -> str:
    (command,) = [line for line in text.splitlines() if "-m megatron_mm.train" in line]
    return command


def test_the_88b_starts_from_the_encoders_of_the_site_or_of_the_command_line(tmp_path: Path) -> None:
    vit, sound = tmp_path / "vit.safetensors", tmp_path / "wav2vec2"
    vit.touch()
    sound.mkdir()  # a Hugging Face folder
    quick = {"DRY_RUN": "brief", "GPU": "A100"}
    site = {"IMAGE_PRETRAINED": str(vit), "AUDIO_PRETRAINED": str(sound)}
    text = plan("pretrain_88b.sh", **quick, **site)
    assert "error" not in text
    assert f" image.pretrained={vit} audio.pretrained={sound}" in train_command(text)
    given = [f"image.pretrained={vit}", "audio.pretrained=random"]
    assert train_command(plan("pretrain_88b.sh", *given, **quick)).endswith(" ".join(given))
    # Both are in the checkpoint: those of the site would take their place.
    text = plan("pretrain_88b.sh", "training.start_from=runs/a/step_1", **quick, **site)
    assert "error" not in text and "pretrained" not in train_command(text)


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        ([], {}, ["IMAGE_PRETRAINED", "AUDIO_PRETRAINED"]),
        ([], {"IMAGE_PRETRAINED": "random"}, ["AUDIO_PRETRAINED"]),
        (["audio.pretrained=null", "image.pretrained=random"], {}, ["AUDIO_PRETRAINED"]),
        ([], {"IMAGE_PRETRAINED": "/nowhere/vit.pth", "AUDIO_PRETRAINED": "random"}, ["/nowhere/vit.pth"]),
        (["audio.pretrained=/nowhere/a.pth", "training.start_from=runs/a"], {}, ["/nowhere/a.pth"]),
    ],
    ids=str,
)
def test_the_88b_does_not_start_without_the_files_of_its_encoders(
    arguments: list[str], environment: dict[str, str], named: list[str]
) -> None:
    given = {"GPU": "A100", "TRAIN_DATA": "[data/train]", **environment}
    refused = run("pretrain_88b.sh", *arguments, DRY_RUN="", **given)
    dry = run("pretrain_88b.sh", *arguments, DRY_RUN="brief", **given)
    assert (refused.returncode, dry.returncode) == (1, 0)
    for ended in (refused, dry):
        errors = [line for line in ended.stdout.splitlines() if line.startswith("error: ")]
        assert len(errors) == len(named)
        for line, name in zip(errors, named):
            assert name in line and "examples/site.env, or give" in line
    assert "srun" not in refused.stdout and "srun" in dry.stdout


def test_the_tiny_job_is_the_same_body(tmp_path: Path) -> None:
    text = plan("pretrain_tiny.sh", RUN_DIR=str(tmp_path), IMAGE="image.sqsh", DRY_RUN="brief")
    assert "# 4 nodes x 1 ranks = 4 ranks" in text
    assert f"--container-image=image.sqsh --container-mounts={ROOT},{tmp_path}" in text
    assert "--kill-on-bad-exit=1 --wait=60" in text
    assert "NCCL" not in text  # it is on CPUs
    assert not list(tmp_path.iterdir())


def test_an_array_element_that_is_done_again_keeps_its_share() -> None:
    given = {"INPUT": "a b", "OUTPUT": "out", "TOKENIZER": "t.json", "SLURM_ARRAY_TASK_ID": "17", "TASKS": "64"}
    text = plan("preprocess_array.sh", **given)
    assert "--input a b --output-prefix out --tokenizer t.json --workers 2 --task 17 --tasks 64" in text
