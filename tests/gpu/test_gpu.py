"""What only a GPU can show: native kernels against their reference, and a run against the same run on the CPU.

Collected by `make test-gpu` alone. docs/gpu_evidence.md lists what stands behind the GPU path where there is none.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import TRAINED, small_config

from megatron_mm import config as configs
from megatron_mm.kernels import ops, reference
from megatron_mm.training.metrics import read_metrics


@pytest.fixture(autouse=True)
def _gpu() -> None:
    assert torch.cuda.is_available(), "these tests need a GPU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 8, 3), (33, 20, 33), (64, 128, 0), (0, 8, 0), (8192, 8192, 784)], ids=str
)
def test_the_native_kernel_computes_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert ops.select("native", torch.device("cuda")) == "native"
    num_tokens, hidden, num_media = shape
    generator = torch.Generator("cuda").manual_seed(0)
    found, expected = [], []
    tokens, text_type, features, weight = (
        torch.randn(size, generator=generator, device="cuda").to(dtype)
        for size in ((num_tokens, hidden), (hidden,), (num_media, hidden), (num_tokens, hidden))
    )
    positions = torch.randperm(num_tokens, generator=generator, device="cuda")[:num_media]
    for results, assemble in ((found, ops.assemble_embeddings), (expected, reference.assemble_embeddings)):
        leaves = [tensor.clone().requires_grad_() for tensor in (tokens, text_type, features)]
        out = assemble(leaves[0], text_type=leaves[1], features=leaves[2], positions=positions)
        out.backward(weight)
        results += [out, leaves[0].grad, leaves[2].grad, leaves[1].grad]
    for ours, theirs in zip(found[:3], expected[:3]):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(found[3], expected[3])  # a sum over tokens: the order of its terms differs


def losses(shards: Path, run_dir: Path, *overrides: str, gpu: bool) -> list[float]:
    """Train six steps as a user would, on the GPU or with it hidden, and return the loss of each."""
    run_dir.mkdir()
    config = small_config(shards, run_dir, *TRAINED, *overrides)
    (run_dir / "settings.yaml").write_text(configs.to_yaml(config))
    environment = dict(os.environ) if gpu else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "megatron_mm.train", str(run_dir / "settings.yaml")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ("on cuda" if gpu else "on cpu") in ended.stderr
    return [record["loss"] for record in read_metrics(run_dir) if "grad_norm" in record]


def test_a_run_on_the_gpu_is_the_run_on_the_cpu(shards: Path, tmp_path: Path) -> None:
    alone = losses(shards, tmp_path / "cpu", gpu=False)
    assert losses(shards, tmp_path / "gpu", gpu=True) == pytest.approx(alone, rel=1e-4)  # FP32 sums in other orders
    # BF16 has 8 bits of mantissa: 0.4% an operation, averaged over thousands of tokens.
    assert losses(shards, tmp_path / "bf16", "training.precision=bf16", gpu=True) == pytest.approx(alone, rel=5e-3)
