"""From a micro-batch to decoder inputs: token rows, and media features over their placeholders.

The result stands in the sequence-parallel layout at once: no rank ever holds the embedding of the whole sequence.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_mm.batch import MediaUnits, MicroBatch
from megatron_mm.config import Config
from megatron_mm.engine.mesh import Mesh
from megatron_mm.errors import DataError
from megatron_mm.kernels.embedding import assemble_embeddings, token_rows
from megatron_mm.modalities import MODALITIES, Modality


class TypedLinear(nn.Linear):
    """A linear layer whose output carries a modality's type embedding.

    It is added to the bias, not to the output, so that an export that folds it there is exact to the bit.
    """

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__(input_size, output_size)
        self.type_embedding = nn.Parameter(torch.empty(output_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden @ weight.T + (bias + type_embedding)."""
        return F.linear(hidden, self.weight, self.bias + self.type_embedding)


class Projector(nn.Module):
    """Encoder features to decoder inputs: LayerNorm, Linear, GELU, Linear with the modality-type embedding."""

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = nn.Linear(width, hidden_size)
        self.linear_2 = TypedLinear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        """Return decoder inputs: (num_tokens, width) to (num_tokens, hidden). No communication."""
        return self.linear_2(F.gelu(self.linear_1(self.norm(features))))


class MediaEmbedding(nn.Module):
    """One modality's encoder, split over the tensor and context ranks, and its projector."""

    def __init__(self, modality: Modality, config: Config, *, mesh: Mesh) -> None:
        super().__init__()
        self.modality, self.rank = modality.name, mesh.rank
        self.encoder = modality.part("encoder").Encoder(getattr(config, modality.name))
        self.projector = Projector(self.encoder.width, config.model.hidden_size)
        self.tp_cp_group = mesh.tp_cp_group
        for parameter in self.parameters():
            # Each rank sees some of the items and some of the positions: gradients are summed over tp, and over cp as
            # those of all parameters are.
            parameter.sequence_parallel = mesh.tp_size > 1

    def forward(self, units: MediaUnits) -> Tensor:
        """Return the decoder inputs that fall into this rank's sequence shard: (num_local_tokens, hidden).

        Collective over tp_cp: all-gathers features at encoder width; the backward pass reduce-scatters their gradients.
        Raises DataError if the encoder makes other rows of this rank's units than they have placeholders.
        """
        features = self.encoder(units.inputs)
        if features.shape[0] != units.own_rows:
            raise DataError(
                f"rank {self.rank}: the {self.modality} encoder made {features.shape[0]} features of "
                f"{len(units.inputs)} units whose placeholders are {units.own_rows}: the shards were written for other "
                "sizes of media. Preprocess the inputs again."
            )
        features = F.pad(features, (0, 0, 0, units.rows_per_rank - features.shape[0]))
        if self.tp_cp_group.size() > 1:
            features = gather_from_sequence_parallel_region(features, True, self.tp_cp_group)
        return self.projector(features.index_select(0, units.rows))


class TokenEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding over packed tokens, whose gradient is summed in a fixed order on a GPU too."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of this rank's sequence shard: (num_tokens,) ids to (num_tokens/tp, hidden).

        Collective over tp: reduce-scatters the rows.
        """
        rows = token_rows(self.weight, ids=tokens, first_id=self.vocab_start_index)
        return reduce_scatter_to_sequence_parallel_region(rows, group=self.tp_group)


class MultimodalEmbedding(MegatronModule):
    """Embeds the tokens and the media of one micro-batch; each modality is a submodule of its name."""

    def __init__(self, config: Config, transformer_config: TransformerConfig, mesh: Mesh) -> None:
        super().__init__(transformer_config)  # a plain Module would save its sharded children as if they were whole
        self.tp_group = mesh.tp_group
        hidden_size = config.model.hidden_size
        self.word_embeddings = TokenEmbedding(
            config.model.vocab_size,
            hidden_size,
            init_method=transformer_config.init_method,
            reduce_scatter_embeddings=transformer_config.sequence_parallel,
            config=transformer_config,
            tp_group=mesh.tp_group,
        )
        self.text_type_embedding = nn.Parameter(torch.empty(hidden_size))
        self.text_type_embedding.sequence_parallel = transformer_config.sequence_parallel
        for modality in MODALITIES:
            self.add_module(modality.name, MediaEmbedding(modality, config, mesh=mesh))

    @property
    def media(self) -> dict[str, MediaEmbedding]:
        """The encoder and projector of each modality, by its name."""
        return {modality.name: self.get_submodule(modality.name) for modality in MODALITIES}

    def forward(self, micro_batch: MicroBatch) -> Tensor:
        """Return decoder inputs (num_tokens/cp/tp, 1, hidden). Collective over tp: reduce-scatters the token rows."""
        tokens = self.word_embeddings(micro_batch.tokens)  # (num_tokens/cp/tp, hidden)
        features = torch.cat([embed(micro_batch.media[name]) for name, embed in self.media.items()])
        positions = torch.cat([micro_batch.media[name].positions for name in self.media])
        hidden = assemble_embeddings(tokens, text_type=self.text_type_embedding, features=features, positions=positions)
        return hidden.unsqueeze(1)  # (num_tokens/cp/tp, 1, hidden)
