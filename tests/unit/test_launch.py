"""The batch scripts print what they would run; what they run on a SLURM is tested in tests/slurm."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def plan(script: str, *arguments: str, **environment: str) -> str:
    """Return what a script prints outside of SLURM."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "NCCL_"))}
    ended = subprocess.run(
        [str(ROOT / "examples" / script), *arguments],
        env={**clean, "PYTHON": sys.executable, "DRY_RUN": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.mark.parametrize(("gpu", "preset"), [("NVIDIA A100-SXM4-80GB", "mm_88b"), ("NVIDIA H100", "mm_88b_fp8")])
def test_the_88b_runs_on_1024_ranks_in_the_precision_of_its_gpus(gpu: str, preset: str) -> None:
    full = "1" if "H100" in gpu else "brief"
    text = plan("pretrain_88b.sh", "training.steps=20000", GPU=gpu, DRY_RUN=full)
    assert "# 128 nodes x 8 ranks = 1024 ranks" in text
    assert f"-m megatron_mm.train {preset} run_dir=" in text
    assert "training.steps=20000" in text
    assert ('"total": 88579360384' in text and '"ranks": 1024' in text) == (full == "1")
    exports = re.findall(r"^export .*$", text, re.MULTILINE)
    assert len(exports) >= 8
    assert all(re.fullmatch(r"export \w+=\S+    # .{20,}", line) for line in exports)


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
