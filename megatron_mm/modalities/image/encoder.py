"""The image encoder: a tower of the family that image.encoder names, whole on every rank."""

import torch
from torch import Tensor, nn

from megatron_mm.modalities.image.spec import IMAGE, ImageConfig


class Encoder(nn.Module):
    """Images to features, one a patch."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.trainable = config.trainable
        self.width, self.image_size = config.hidden_size, config.image_size
        self.family = IMAGE.family(config)
        self.tower = self.family.build(config)
        self.tower.requires_grad_(config.trainable)
        if self.family.norm:
            self.tower.get_submodule(self.family.norm).requires_grad_(False)

    def forward(self, images: tuple[Tensor, ...]) -> Tensor:
        """Return the features of `images`, in order.

        Shapes: images of (3, image_size, image_size) uint8; returns (num_images * num_patches, width). Without images a
        trainable tower still runs once, on nothing, so that every rank's gradients exist.
        """
        weight = next(self.tower.parameters())
        if not images and not self.trainable:
            return weight.new_empty(0, self.width)
        batch = torch.stack(images) if images else weight.new_zeros(1, 3, self.image_size, self.image_size)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            pixels = (batch.float() / 127.5 - 1.0).to(weight.dtype)  # mean and std 0.5
            features = self.family.features(self.tower, pixels).flatten(0, 1)  # (num_images * num_patches, width)
        return features if images else features[:0]

    @staticmethod
    def example_unit(config: ImageConfig, *, device: torch.device | str | None = None) -> Tensor:
        """Return a unit for rehearsals and counts of work: (3, image_size, image_size) uint8 without values."""
        return torch.empty(3, config.image_size, config.image_size, dtype=torch.uint8, device=device)
