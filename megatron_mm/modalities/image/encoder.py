"""The image encoder: a ViT (Dosovitskiy et al. 2021) in Hugging Face's module code, whole on every rank."""

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from megatron_mm.modalities.image.spec import ImageConfig


class Encoder(nn.Module):
    """Patches to features, one a patch: the class token is dropped and the final norm is not applied.

    The projector's LayerNorm stands in the final norm's place and starts from its weights, which makes the pair
    exactly the vision half of InternVL. The tower keeps the published norm, frozen, so that it remains the complete
    ViT that pretrained files hold.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.trainable = config.trainable
        self.width, self.image_size = config.hidden_size, config.image_size
        self.tower = ViTModel(
            ViTConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.ffn_hidden_size,
                image_size=config.image_size,
                patch_size=config.patch_size,
                layer_norm_eps=1e-6,
                hidden_act="gelu",
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            ),
            add_pooling_layer=False,
        )
        self.tower.requires_grad_(config.trainable)
        self.tower.layernorm.requires_grad_(False)

    def forward(self, images: tuple[Tensor, ...]) -> Tensor:
        """Return the features of `images`, in order.

        Shapes: images of (3, image_size, image_size) uint8; returns (num_images * num_patches, width). Without images a
        trainable tower still runs once, on nothing, so that every rank's gradients exist.
        """
        weight = self.tower.embeddings.patch_embeddings.projection.weight
        if not images and not self.trainable:
            return weight.new_empty(0, self.width)
        batch = torch.stack(images) if images else weight.new_zeros(1, 3, self.image_size, self.image_size)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            hidden = self.tower.embeddings((batch.float() / 127.5 - 1.0).to(weight.dtype))  # mean and std 0.5
            for layer in self.tower.layers:
                hidden = layer(hidden)
            features = hidden[:, 1:].flatten(0, 1)  # (num_images * num_patches, width)
        return features if images else features[:0]

    @staticmethod
    def example_unit(config: ImageConfig, *, device: torch.device | str | None = None) -> Tensor:
        """Return a unit for rehearsals and counts of work: (3, image_size, image_size) uint8 without values."""
        return torch.empty(3, config.image_size, config.image_size, dtype=torch.uint8, device=device)
