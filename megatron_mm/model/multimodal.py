"""One model chunk of one pipeline stage: embedding, layers, head, as many of them as the stage holds."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_mm.batch import MicroBatch
from megatron_mm.config import Config
from megatron_mm.engine.mesh import Mesh
from megatron_mm.kernels.cross_entropy import linear_cross_entropy, vocab_parallel_cross_entropy
from megatron_mm.model.backend import choose
from megatron_mm.model.decoder import block_submodules, transformer_config
from megatron_mm.model.embedding import MultimodalEmbedding
from megatron_mm.model.initialize import initialize_weights
from megatron_mm.model.layer import Backend, PackedDocuments


class MultimodalModel(MegatronModule):
    """A chunk of the decoder; the first one also embeds, the last one also computes the loss of each position."""

    def __init__(
        self, config: Config, transformer: TransformerConfig, *, backend: Backend, mesh: Mesh, chunk: int
    ) -> None:
        super().__init__(transformer)
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.tp_group = mesh.tp_group
        self.vp_stage = chunk if mesh.vpp_size > 1 else None
        self.pre_process, self.post_process = mesh.is_first_chunk(chunk), mesh.is_last_chunk(chunk)
        self.z_loss, self.loss_chunk_tokens = config.training.z_loss, config.training.loss_chunk_tokens
        if self.pre_process:
            self.embedding = MultimodalEmbedding(config, transformer, mesh)
        self.head_dim, self.rope_theta = config.model.head_dim, config.model.rope_theta
        self.decoder = TransformerBlock(
            transformer,
            block_submodules(transformer, backend=backend, chunk=chunk, pp_rank=mesh.pp_rank),
            pre_process=self.pre_process,
            post_process=self.post_process,
            vp_stage=self.vp_stage,
        )
        if self.post_process:
            self.output_layer = ColumnParallelLinear(
                config.model.hidden_size,
                config.model.vocab_size,
                config=transformer,
                init_method=transformer.init_method,
                bias=False,
                gather_output=False,
                tp_group=mesh.tp_group,
            )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take what the stage before has sent; megatron-core's schedules call this."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Return the parameters as parts of whole tensors, under names that do not depend on the layout.

        megatron-core's linear layers add an empty extra state each; ours do not, and which of them holds a weight
        depends on the layout.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {key: value for key, value in state.items() if not key.endswith("_extra_state")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Take parameters from `state_dict`; TransformerEngine's extra states, which are not saved, may be missing."""
        missing, unexpected = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [key for key in missing if not key.endswith("_extra_state")]
        if strict and (missing or unexpected):
            raise RuntimeError(f"the state lacks {missing} and has {unexpected}, which the model does not know")

    def _rotary(self, positions: Tensor) -> Tensor:
        """Return cosine and sine of the angles of each position: (2, num_tokens/cp, head_dim/2) float32."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device) / self.head_dim
        angles = torch.outer(positions.float(), self.rope_theta**-exponents)
        return torch.stack([angles.cos(), angles.sin()])

    def forward(self, micro_batch: MicroBatch) -> Tensor:
        """Return hidden states (num_tokens/cp/tp, 1, hidden), or on the last chunk the cross-entropy and z-loss
        of each position, (2, num_tokens/cp) float32.

        Collective over tp and cp, in every layer.
        """
        hidden = self.embedding(micro_batch) if self.pre_process else None
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            rotary_pos_emb=self._rotary(micro_batch.positions),
            packed_seq_params=PackedDocuments(qkv_format="thd", spans=micro_batch.spans),
        )
        if not self.post_process:
            return hidden
        return self._losses(hidden, micro_batch)

    def _losses(self, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        operands = {"labels": micro_batch.labels, "mask": micro_batch.loss_mask, "z_loss": self.z_loss}
        operands["group"] = self.tp_group
        if self.loss_chunk_tokens == 0:
            logits, _ = self.output_layer(hidden)  # (num_tokens/cp, 1, vocab/tp)
            return vocab_parallel_cross_entropy(logits.squeeze(1), **operands)
        if self.tp_group.size() > 1:
            hidden = gather_from_sequence_parallel_region(hidden, True, self.tp_group)
        weight, chunk_tokens = self.output_layer.weight, self.loss_chunk_tokens
        return linear_cross_entropy(hidden.squeeze(1), weight=weight, chunk_tokens=chunk_tokens, **operands)


def build_chunks(config: Config, mesh: Mesh, *, backend: Backend | None = None) -> list[MultimodalModel]:
    """Build this rank's model chunks with their initial weights, which are the same in every layout and backend.

    Without `backend`, `choose` says what they are built of. Weights on the meta device and fake ones have no values.
    Raises ConfigError if a backend is asked for that cannot be had on this rank.
    """
    backend = backend or choose(config)
    backend.start(config)
    transformer = transformer_config(config, accumulates_in_place=True)
    chunks = [
        MultimodalModel(config, transformer, backend=backend, mesh=mesh, chunk=chunk) for chunk in range(mesh.vpp_size)
    ]
    for chunk in chunks:
        if any(parameter.is_meta for parameter in chunk.parameters()):
            continue
        chunk.to(dtype=transformer.params_dtype)
        if not transformer.use_cpu_initialization:
            chunk.to(torch.cuda.current_device())
        if not any(isinstance(parameter, FakeTensor) for parameter in chunk.parameters()):
            initialize_weights(chunk, config=config, mesh=mesh)
    return chunks
