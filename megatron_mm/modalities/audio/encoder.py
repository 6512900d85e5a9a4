"""The sound encoder: Wav2Vec 2.0 (Baevski et al. 2020) in Hugging Face's module code, whole on every rank."""

import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

from megatron_mm.modalities.audio.spec import CONV_KERNELS, CONV_STRIDES, AudioConfig


class Encoder(nn.Module):
    """One-second chunks of sound to features, 49 a second; a shorter last chunk is encoded at its own length.

    Zero padding would change the valid frames of the ls960 form by up to 0.8 standard deviations: its group norm runs
    over time.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.trainable = config.trainable
        self.width, self.chunk_samples = config.hidden_size, config.chunk_samples
        layer_norm = config.form == "lv60k"
        self.tower = Wav2Vec2Model(
            Wav2Vec2Config(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.ffn_hidden_size,
                conv_dim=(config.conv_channels,) * len(CONV_KERNELS),
                conv_kernel=CONV_KERNELS,
                conv_stride=CONV_STRIDES,
                conv_bias=layer_norm,
                feat_extract_norm="layer" if layer_norm else "group",
                do_stable_layer_norm=layer_norm,
                num_conv_pos_embeddings=config.pos_conv_kernel,
                num_conv_pos_embedding_groups=config.pos_conv_groups,
                layer_norm_eps=1e-5,
                hidden_dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
                feat_proj_dropout=0.0,
                layerdrop=0.0,
                mask_time_prob=0.0,
                mask_feature_prob=0.0,
                attn_implementation="sdpa",
            )
        )
        self.tower.requires_grad_(config.trainable)

    def forward(self, chunks: tuple[Tensor, ...]) -> Tensor:
        """Return the features of `chunks`, in order.

        Shapes: chunks of (num_samples,) float32 at 16 kHz; returns (num_frames of all, width). Without chunks a
        trainable tower still runs once, on nothing, so that every rank's gradients exist.
        """
        dtype = self.tower.feature_projection.projection.weight.dtype
        if not chunks and not self.trainable:
            return self.tower.feature_projection.projection.weight.new_empty(0, self.width)
        features: list[Tensor] = [torch.empty(0)] * len(chunks)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            if not chunks:
                silence = self.tower.feature_projection.projection.weight.new_zeros(1, self.chunk_samples)
                return self.tower(silence).last_hidden_state[0, :0]
            for indices in _by_length(chunks):
                batch = torch.stack([chunks[index] for index in indices]).to(dtype)  # (num_chunks, num_samples)
                for index, frames in zip(indices, self.tower(batch).last_hidden_state.unbind(0)):
                    features[index] = frames
        return torch.cat(features)

    @staticmethod
    def example_unit(config: AudioConfig, *, device: torch.device | str | None = None) -> Tensor:
        """Return a unit for rehearsals and counts of work: a chunk of (chunk_samples,) float32 without values."""
        return torch.empty(config.chunk_samples, device=device)


def _by_length(chunks: tuple[Tensor, ...]) -> list[list[int]]:
    """Group the indices of chunks that are equally long, so that each group is one batch."""
    groups: dict[int, list[int]] = {}
    for index, chunk in enumerate(chunks):
        groups.setdefault(chunk.numel(), []).append(index)
    return list(groups.values())
