"""Which layers and which attention run, and that they are the same whichever it is."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine import ONE_STAGE, at_full_size, parameters_of_a_rank, saved_by
from launch import run_alone, run_isolated
from small import SMALL
from torch import Tensor

from megatron_mm import config as configs
from megatron_mm.batch import attention_spans
from megatron_mm.checkpoint.load import load_weights
from megatron_mm.config import Config
from megatron_mm.engine import device, mesh
from megatron_mm.errors import ConfigError
from megatron_mm.model import backend as backends
from megatron_mm.model.core_attention import (
    DocumentAttention,
    VarlenAttention,
    defined,
    flash_attn_varlen,
    stacked,
    torch_sdpa,
)
from megatron_mm.model.multimodal import build_chunks


def small(*overrides: str) -> Config:
    return configs.load("tiny", [*SMALL, *overrides])


SHARING = ("model.num_attention_heads=16", "model.head_dim=64")
"""Enough heads that share keys for the stacked form to be the faster one."""


def test_a_cpu_takes_local_layers_and_its_own_attention() -> None:
    chosen = backends.choose(small(*SHARING))
    assert (chosen.name, chosen.attention) == ("local", "stacked")
    assert isinstance(chosen.core_attention(None, 1, None), DocumentAttention)
    assert chosen.core_attention(None, 1, None).attend is stacked
    for override in ("training.attention=sdpa", "training.precision=bf16"):
        assert backends.choose(small(*SHARING, override)).core_attention(None, 1, None).attend is torch_sdpa


@pytest.mark.parametrize("override", ["model.num_query_groups=16", "data.seq_len=128", "parallel.tp=8"])
def test_attention_that_would_never_run_is_neither_taken_nor_named(override: str) -> None:
    assert backends.choose(small(*SHARING, override)).attention == "sdpa"
    with pytest.raises(ConfigError, match="training.attention=stacked is never the faster one"):
        backends.choose(small(*SHARING, override, "training.attention=stacked"))


def test_the_definitions_bring_an_attention_of_their_own() -> None:
    chosen = backends.choose(small(*SHARING, "training.kernels=reference"))
    assert (chosen.attention, chosen.core_attention(None, 1, None).attend) == ("reference", defined)
    assert backends.choose(small("training.kernels=reference", "training.attention=sdpa")).attention == "sdpa"
    assert backends.choose(small("training.attention=reference")).attention == "reference"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.backend=transformer_engine", "training.backend=transformer_engine need TransformerEngine, but its"),
        ("training.precision=fp8", "training.precision=fp8 need TransformerEngine, but its kernels run on GPUs"),
        ("parallel.tp_comm_overlap=true", "parallel.tp_comm_overlap=true need TransformerEngine"),
        ("training.attention=varlen", "training.attention=varlen runs on GPUs"),
        ("training.attention=flash_attn", "training.attention=flash_attn runs on GPUs"),
        ("training.precision=bf16 training.attention=stacked", "runs on CPUs in FP32, .* on cpu with .*precision=bf16"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused(override: str, said: str) -> None:
    tensor_parallel = ["parallel.tp=2"] if "tp_comm" in override else []
    with pytest.raises(ConfigError, match=said):
        backends.choose(small(*override.split(), *tensor_parallel))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let `choose` believe in a GPU of a capability, with packages installed on its machine."""

    def pretend(capability: tuple[int, int], *installed: str) -> None:
        monkeypatch.setattr(device, "current", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(device, "has_gpu", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(backends, "find_spec", lambda name: name in installed or None)

    return pretend


A100, H100 = (8, 0), (9, 0)


@pytest.mark.parametrize(
    ("capability", "recipe", "allowed"),
    [(A100, "current", False), ((8, 9), "current", True), ((8, 9), "blockwise", False), (H100, "blockwise", True)],
)
def test_fp8_needs_a_gpu_that_has_it(
    capability: tuple[int, int], recipe: str, allowed: bool, gpu: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(capability, "transformer_engine")
    engine = SimpleNamespace(backend=lambda: "its backend")
    monkeypatch.setitem(sys.modules, "megatron_mm.model.transformer_engine", engine)
    monkeypatch.setattr("megatron_mm.model.transformer_engine", engine, raising=False)
    config = configs.load("mm_88b_fp8", [f"training.fp8_recipe={recipe}"])
    if allowed:
        assert backends.choose(config) == "its backend"
    else:
        with pytest.raises(ConfigError, match=rf"found|{capability[0]}\.{capability[1]}"):
            backends.choose(config)


def test_a_gpu_takes_what_is_installed(gpu: Callable) -> None:
    gpu(H100)
    assert backends.choose(small("training.precision=bf16")).attention == "varlen"
    assert backends.choose(small()).attention == "sdpa"  # FP32
    with pytest.raises(ConfigError, match="flash-attn is not installed"):
        backends.choose(small("training.attention=flash_attn", "training.precision=bf16"))
    with pytest.raises(ConfigError, match="attention=stacked runs on CPUs in FP32, and this rank is on cuda"):
        backends.choose(small("training.attention=stacked"))
    with pytest.raises(ConfigError, match="need TransformerEngine, but it is not installed"):
        backends.choose(configs.load("mm_88b_fp8"))
    assert backends.choose(small("training.precision=bf16", "training.attention=sdpa")).attention == "sdpa"


@pytest.mark.parametrize("asked", ["auto", "transformer_engine"])
@pytest.mark.parametrize(
    "ignored", ["training.attention=sdpa", "training.attention=flash_attn", "training.kernels=reference"]
)
def test_what_transformer_engine_would_ignore_is_refused(
    ignored: str, asked: str, gpu: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(H100, "transformer_engine", "flash_attn")
    engine = SimpleNamespace(backend=lambda: "its backend")
    monkeypatch.setitem(sys.modules, "megatron_mm.model.transformer_engine", engine)
    monkeypatch.setattr("megatron_mm.model.transformer_engine", engine, raising=False)
    overrides = ["training.precision=bf16", f"training.backend={asked}"]
    assert backends.choose(small(*overrides)) == "its backend"
    with pytest.raises(ConfigError, match=rf"{ignored}, but TransformerEngine's .*\(training.backend={asked}\)"):
        backends.choose(small(*overrides, ignored))


def test_flash_kernels_are_not_run_on_fp32(gpu: Callable) -> None:
    gpu(H100, "flash_attn")
    for attention in ("varlen", "flash_attn"):
        with pytest.raises(ConfigError, match=f"attention={attention} takes 16-bit operands"):
            backends.choose(small(f"training.attention={attention}"))


def slow_attend(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_kv: Tensor, max_q: int, max_kv: int
) -> Tensor:
    """What a flash kernel means: one query after another, float64 softmax, aligned at the end of each document."""
    bounds = list(zip(cu_q, cu_q[1:], cu_kv, cu_kv[1:]))
    assert max_q == max(stop - start for start, stop, _, _ in bounds)
    assert max_kv == max(stop - start for _, _, start, stop in bounds)
    rows = []
    for first, last, key_first, key_last in bounds:
        for position in range(first, last):
            seen = slice(key_first, key_last - (last - 1 - position))
            heads = [head * key.shape[1] // query.shape[1] for head in range(query.shape[1])]
            scores = torch.einsum("hd,thd->ht", query[position], key[seen, heads]) / query.shape[2] ** 0.5
            rows.append(torch.einsum("ht,thd->hd", scores.softmax(-1), value[seen, heads]))
    return torch.stack(rows)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(16,), (1, 6, 9), (5, 5, 5, 1)], ids=str)
def test_all_forms_of_attention_are_the_slow_one(lengths: tuple[int, ...], groups: int, cp_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(3, 16, 4, 8, generator=generator, dtype=torch.float64)
    for rank in range(cp_size):
        spans = attention_spans(lengths, cp_rank=rank, cp_size=cp_size)
        own = torch.cat([row[0, span.start : span.stop] for span in spans])
        results = []
        for form in (DocumentAttention(), DocumentAttention(defined), VarlenAttention(slow_attend)):
            leaves = [leaf.clone().requires_grad_() for leaf in (own, row[1, :, :groups], row[2, :, :groups])]
            context = form(*leaves, spans=spans)
            context.backward(torch.linspace(-1, 1, context.numel(), dtype=torch.float64).view_as(context))
            results.append([context.detach(), *(leaf.grad for leaf in leaves)])
        for *others, expected in zip(*results, strict=True):
            for found in others:
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("package", ["flash_attn_interface", "flash_attn"])
def test_the_flash_attn_package_is_called_as_it_wants(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_varlen_func(q, k, v, cu_q, cu_kv, max_q, max_kv, *, causal: bool) -> tuple[Tensor, None]:
        assert causal
        return slow_attend(q, k, v, cu_q, cu_kv, max_q, max_kv), None

    for name in ("flash_attn_interface", "flash_attn"):
        module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func) if name == package else None
        monkeypatch.setitem(sys.modules, name, module)
    spans = attention_spans((3, 5), cp_rank=0, cp_size=1)
    query, key = torch.randn(8, 4, 6), torch.randn(8, 1, 6)
    found = VarlenAttention(flash_attn_varlen())(query, key, key, spans=spans)
    torch.testing.assert_close(found, DocumentAttention()(query, key, key, spans=spans))


def test_transformer_engine_has_the_parameters_of_the_local_layers_at_full_size() -> None:
    """Names, shapes and checkpoint keys of one rank of TP8, all 110 layers, on meta; FP8 against local BF16."""
    local = run_alone(parameters_of_a_rank, "local", "meta", "mm_88b", *ONE_STAGE)
    engine, buffers = run_isolated(at_full_size, "mm_88b_fp8")
    assert len(local["parameters"]) > 110 * 8
    assert len(local["keys"]) + len(local["factories"]) == len(local["parameters"])
    assert engine == local
    assert buffers["shape"] == [8192, 8192]
    assert buffers["tp_size"] == 8
    assert buffers["quantization_modes"] == ["FP8", "NONE"]  # the end layers stay BF16


def test_transformer_engine_marks_and_starts_parameters_as_the_local_layers_do() -> None:
    """What gradients are summed over, how each tensor is cut, and initial values: small, with storage."""
    small_model = [*SMALL, "parallel.tp=2", "model.qk_norm=true"]
    local = run_alone(parameters_of_a_rank, "local", "cpu", "tiny", *small_model)
    engine = run_isolated(parameters_of_a_rank, "transformer_engine", "cpu", "tiny", *small_model)
    for parameters in (local["parameters"], engine["parameters"]):
        for name, (shape, dtype, sequence_parallel, is_sharded, *cut) in parameters.items():
            parameters[name] = (shape, dtype, bool(sequence_parallel), bool(is_sharded), cut if is_sharded else None)
    assert any(parameter[2] for parameter in local["parameters"].values())
    assert any(parameter[3] for parameter in local["parameters"].values())
    assert engine == local


def loaded_by_local_layers(folder: str) -> dict[str, Tensor]:
    """Return the weights of a checkpoint as the local backend has them, on one rank."""
    config = small()
    ranks = mesh.initialize(config)
    (model,) = build_chunks(config, ranks)
    load_weights([model], config=config, mesh=ranks, path=Path(folder))
    return {key: value.detach().clone() for key, value in model.named_parameters()}


def test_a_checkpoint_of_transformer_engine_loads_into_the_local_layers(tmp_path: Path) -> None:
    saved = run_isolated(saved_by, "transformer_engine", str(tmp_path / "saved"), "tiny", *SMALL)
    assert saved["layers"].startswith(
        ("megatron.core.extensions.transformer_engine", "transformer_engine", "megatron_mm.model.transformer_engine")
    )
    loaded = run_alone(loaded_by_local_layers, str(tmp_path / "saved"))
    assert loaded.keys() == saved["weights"].keys()
    for key, value in saved["weights"].items():
        assert torch.equal(loaded[key], value), key
