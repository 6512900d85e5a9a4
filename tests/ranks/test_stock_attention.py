"""Our attention is megatron-core's own, with the same weights: what differs is only what is communicated."""

import pytest
import torch
import torch.distributed as dist
from launch import run_ranks
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import build_module
from small import SMALL
from torch import Tensor

from megatron_mm import config as configs
from megatron_mm.batch import attention_spans
from megatron_mm.config import Config
from megatron_mm.engine import mesh as meshes
from megatron_mm.model.backend import local
from megatron_mm.model.decoder import block_submodules, transformer_config
from megatron_mm.model.layer import PackedDocuments, RMSNorm

NUM_TOKENS = 24


def fused_rows(query: Tensor, key_value: Tensor, *, groups: int) -> Tensor:
    """Return megatron-core's fused weight: for each group its query heads, its key, its value; whole."""
    query, key_value = (part.unflatten(0, (groups, -1)) for part in (query, key_value))
    return torch.cat([query, key_value], dim=1).flatten(0, 1)


def unfused_rows(fused: Tensor, *, groups: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The reverse of `fused_rows`."""
    parts = fused.unflatten(0, (groups, -1)).split([fused.shape[0] // groups - 2 * head_dim, 2 * head_dim], dim=1)
    return parts[0].flatten(0, 1), parts[1].flatten(0, 1)


def gathered(local_part: Tensor, dim: int) -> Tensor:
    """Return the shards of all ranks, end to end."""
    parts = [torch.empty_like(local_part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local_part.contiguous())
    return torch.cat(parts, dim)


def both(config: Config) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (ours, megatron-core's) of the output and of the gradients of input and weights, all whole."""
    mesh = meshes.cut(config)
    transformer = transformer_config(config)
    groups, head_dim, tp = config.model.num_query_groups, config.model.head_dim, mesh.tp_size
    stock_spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    # megatron-core's norm without accelerators refuses sequence parallelism.
    stock_spec.submodules.input_layernorm = stock_spec.submodules.pre_mlp_layernorm = RMSNorm
    own_spec = block_submodules(transformer, backend=local(), chunk=0, pp_rank=0).layer_specs[0]
    ours, stock = (
        build_module(spec, config=transformer, layer_number=1).self_attention for spec in (own_spec, stock_spec)
    )
    generator = torch.Generator().manual_seed(0)
    hidden_size, query_size = config.model.hidden_size, config.model.num_attention_heads * head_dim
    draw = lambda *shape: torch.randn(*shape, generator=generator) / shape[-1] ** 0.5  # noqa: E731
    query, key_value = draw(query_size, hidden_size), draw(2 * groups * head_dim, hidden_size)
    out, hidden, back = (
        draw(hidden_size, query_size),
        draw(NUM_TOKENS, 1, hidden_size),
        draw(NUM_TOKENS, 1, hidden_size),
    )
    own = lambda whole, dim: whole.chunk(tp, dim)[mesh.tp_rank]  # noqa: E731
    ours.linear_q.weight.data.copy_(own(query, 0))
    ours.linear_kv.weight.data.copy_(own(key_value, 0) if ours.shards_groups else key_value)
    stock.linear_qkv.weight.data.copy_(own(fused_rows(query, key_value, groups=groups), 0))
    for attention in (ours, stock):
        attention.linear_proj.weight.data.copy_(own(out, 1))
    angles = torch.outer(torch.arange(NUM_TOKENS).float(), 100.0 ** -torch.linspace(0, 1, head_dim // 2))
    mask = torch.ones(1, 1, NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).triu(1)
    documents = PackedDocuments(spans=attention_spans([NUM_TOKENS], cp_rank=0, cp_size=1))
    calls = (
        (
            ours,
            {"rotary_pos_emb": torch.stack([angles.cos(), angles.sin()]), "packed_seq_params": documents},
        ),
        (stock, {"rotary_pos_emb": torch.cat([angles, angles], -1)[:, None, None], "attention_mask": mask}),
    )
    results: list[dict[str, Tensor]] = []
    for attention, arguments in calls:
        leaf = own(hidden, 0).clone().requires_grad_()
        output, _ = attention(leaf, **arguments)
        output.backward(own(back, 0))
        found = {"output": gathered(output.detach(), 0), "hidden": gathered(leaf.grad, 0)}
        found["proj"] = gathered(attention.linear_proj.weight.grad, 1)
        if attention is stock:
            fused = gathered(stock.linear_qkv.weight.grad, 0)
            found["query"], found["key_value"] = unfused_rows(fused, groups=groups, head_dim=head_dim)
        else:
            found["query"] = gathered(ours.linear_q.weight.grad, 0)
            found["key_value"] = ours.linear_kv.weight.grad.clone()
            if ours.shards_groups:
                found["key_value"] = gathered(found["key_value"], 0)
            else:
                dist.all_reduce(found["key_value"])  # as finalize_model_grads does once a step
        results.append(found)
    return {name: (results[0][name], results[1][name]) for name in results[0]}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_output_and_gradients_are_megatron_cores(tp: int, groups: int) -> None:
    overrides = [f"model.num_query_groups={groups}", f"parallel.tp={tp}", "data.seq_len=24"]
    for compared in run_ranks(tp, both, configs.load("tiny", [*SMALL, *overrides])):
        for name, (ours, stock) in compared.items():
            torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
