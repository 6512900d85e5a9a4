"""What only a GPU can show: native kernels against their reference, and a run against the same run on the CPU.

Collected by `make test-gpu` alone. docs/gpu_evidence.md lists what stands behind the GPU path where there is none.
"""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agreement import assert_near
from small import TRAINED, small_config

from megatron_mm import config as configs
from megatron_mm.batch import attention_spans
from megatron_mm.kernels.embedding import assemble_embeddings, assemble_embeddings_reference
from megatron_mm.kernels.select import select
from megatron_mm.model.backend import local
from megatron_mm.model.core_attention import DocumentAttention
from megatron_mm.training.metrics import read_metrics


@pytest.fixture(autouse=True)
def _gpu() -> None:
    assert torch.cuda.is_available(), "these tests need a GPU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 8, 3), (33, 20, 33), (64, 128, 0), (0, 8, 0), (8192, 8192, 784)], ids=str
)
def test_the_native_kernel_computes_the_reference(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert select("native", torch.device("cuda")) == "native"
    num_tokens, hidden, num_media = shape
    generator = torch.Generator("cuda").manual_seed(0)
    found, expected = [], []
    tokens, text_type, features, weight = (
        torch.randn(size, generator=generator, device="cuda").to(dtype)
        for size in ((num_tokens, hidden), (hidden,), (num_media, hidden), (num_tokens, hidden))
    )
    positions = torch.randperm(num_tokens, generator=generator, device="cuda")[:num_media]
    for results, assemble in ((found, assemble_embeddings), (expected, assemble_embeddings_reference)):
        leaves = [tensor.clone().requires_grad_() for tensor in (tokens, text_type, features)]
        out = assemble(leaves[0], text_type=leaves[1], features=leaves[2], positions=positions)
        out.backward(weight)
        results += [out, leaves[0].grad, leaves[2].grad, leaves[1].grad]
    for ours, theirs in zip(found[:3], expected[:3]):
        assert torch.equal(ours, theirs)
    text = torch.ones(num_tokens, dtype=torch.bool, device="cuda").index_fill(0, positions, False)
    assert_near([found[3]], [weight[text].double().sum(0)], [dtype])


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


@pytest.mark.parametrize("form", ["varlen", "flash_attn"])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_flash_kernels_attend_as_the_reference_does(form: str, cp_size: int) -> None:
    if form == "flash_attn":
        pytest.importorskip("flash_attn")
    attention = local(form).core_attention(None, 1, None)
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = (700, 1, 323, 1024)
    query, key, value = (
        torch.randn(2048, heads, 128, generator=generator, device="cuda").bfloat16() for heads in (8, 1, 1)
    )
    for rank in range(cp_size):
        spans = tuple(
            dataclasses.replace(span, cu_seqlens_q=span.cu_seqlens_q.cuda(), cu_seqlens_kv=span.cu_seqlens_kv.cuda())
            for span in attention_spans(lengths, cp_rank=rank, cp_size=cp_size)
        )
        own = torch.cat([query[span.start : span.stop] for span in spans])
        results = []
        for run, dtype in ((attention, torch.bfloat16), (DocumentAttention(), torch.float32)):
            leaves = [leaf.to(dtype).requires_grad_() for leaf in (own.clone(), key.clone(), value.clone())]
            context = run(*leaves, spans=spans)
            context.backward(torch.ones_like(context))
            results.append([context.detach(), *(leaf.grad for leaf in leaves)])
        for found, expected in zip(*results):
            error = (found.float() - expected).abs().max() / expected.abs().max()
            assert error < 2e-2  # BF16 operands and probabilities: 0.4% each


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_run_on_transformer_engine_is_near_the_run_on_the_cpu(precision: str, shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformer_engine")
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no FP8")
    shapes = ["model.hidden_size=64", "model.ffn_hidden_size=128", "model.num_attention_heads=4", "model.head_dim=16"]
    alone = losses(shards, tmp_path / "cpu", *shapes, gpu=False)
    engine = [*shapes, f"training.precision={precision}", "training.backend=transformer_engine"]
    # FP8's E4M3 has 3 bits of mantissa: 6% an operation, averaged over thousands of tokens.
    tolerance = 5e-3 if precision == "bf16" else 3e-2
    assert losses(shards, tmp_path / precision, *engine, gpu=True) == pytest.approx(alone, rel=tolerance)
