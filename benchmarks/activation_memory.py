"""Activations that one decoder layer of the 88B keeps for its backward pass, by recomputation mode.

    python benchmarks/activation_memory.py

Counted on meta tensors as rank 0 of 8 tensor ranks (8192 tokens, BF16, sequence parallelism, flash attention): every
storage that autograd saves, once. The peer of each mode is the same layer without recomputation.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from verdict import finish

from megatron_mm import config as configs
from megatron_mm.engine import device

BAR = 0.2
"""Full recomputation keeps the layer's input: one tensor of the more than a dozen."""
SHAPE = ("model.num_layers=1", "parallel.pp=1", "parallel.vpp=1", "parallel.embedding_slot=false")
ALONE = ("parallel.loss_slot=false", "parallel.tp_comm_overlap=false")


def kept_bytes(mode: str) -> int:
    """Return the bytes that autograd keeps of one layer under recomputation `mode`."""
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_mm.batch import attention_spans
    from megatron_mm.engine import mesh as meshes
    from megatron_mm.model.backend import local
    from megatron_mm.model.decoder import block_submodules, transformer_config
    from megatron_mm.model.layer import PackedDocuments

    config = configs.load("mm_88b", [*SHAPE, *ALONE, f"training.recompute={mode}"])
    meshes.cut(config)
    transformer = transformer_config(config)
    submodules = block_submodules(transformer, backend=local("varlen"), chunk=0, pp_rank=0)
    block = TransformerBlock(transformer, submodules, post_layer_norm=False).train()
    num_tokens, head_dim = config.data.seq_len, config.model.head_dim
    weights = {parameter.untyped_storage()._cdata for parameter in block.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage()._cdata] = tensor  # kept alive, so that no address is used twice
        return tensor

    hidden = torch.randn(num_tokens // config.parallel.tp, 1, config.model.hidden_size, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(
            hidden_states=hidden.requires_grad_(),
            attention_mask=None,
            rotary_pos_emb=torch.randn(2, num_tokens, head_dim // 2),
            packed_seq_params=PackedDocuments(spans=attention_spans([num_tokens], cp_rank=0, cp_size=1)),
        )
    return sum(kept.untyped_storage().nbytes() for storage, kept in seen.items() if storage not in weights)


def main() -> None:
    """Count, print, and exit 0 only if full recomputation keeps as little as it should."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    device.use_meta()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    with torch.device("meta"):
        kept = {mode: kept_bytes(mode) for mode in ("none", "selective", "mlp", "full")}
    print(f"{'training.recompute':20}{'MB a layer':>12}{'ratio':>8}")
    for mode, size in kept.items():
        print(f"{mode:20}{size / 1e6:12.1f}{size / kept['none']:8.3f}")
    finish("activation_memory", ours=kept["full"], peer=kept["none"], bar=BAR)


if __name__ == "__main__":
    main()
