"""The image encoder: a tower of the family that image.encoder names, whole on every rank."""

import torch
from torch import Tensor, nn

from megatron_mm.modalities.image.spec import IMAGE, ImageConfig


class Encoder(nn.Module):
    """Images to features: one a patch, or one for two by two of them, as wide as the four."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.trainable = config.trainable
        self.pixel_shuffle, self.image_size = config.pixel_shuffle, config.image_size
        self.width = config.hidden_size * (4 if config.pixel_shuffle else 1)
        self.family = IMAGE.family(config)
        self.tower = self.family.build(config)
        self.tower.requires_grad_(config.trainable)
        if self.family.norm:
            self.tower.get_submodule(self.family.norm).requires_grad_(False)

    def forward(self, images: tuple[Tensor, ...]) -> Tensor:
        """Return the features of `images`, in order.

        Shapes: images of (3, image_size, image_size) uint8; returns (num_images * tokens_per_image, width). Without
        images a trainable tower still runs once, on nothing, so that every rank's gradients exist.
        """
        weight = next(self.tower.parameters())
        if not images and not self.trainable:
            return weight.new_empty(0, self.width)
        batch = torch.stack(images) if images else weight.new_zeros(1, 3, self.image_size, self.image_size)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            pixels = (batch.float() / 127.5 - 1.0).to(weight.dtype)  # mean and std 0.5
            features = self.family.features(self.tower, pixels)  # (num_images, num_patches, hidden)
            features = shuffled(features) if self.pixel_shuffle else features
        features = features.flatten(0, 1)  # (num_images * tokens_per_image, width)
        return features if images else features[:0]

    @staticmethod
    def example_unit(config: ImageConfig, *, device: torch.device | str | None = None) -> Tensor:
        """Return a unit for rehearsals and counts of work: (3, image_size, image_size) uint8 without values."""
        return torch.empty(3, config.image_size, config.image_size, dtype=torch.uint8, device=device)


def shuffled(features: Tensor) -> Tensor:
    """Return one feature for two by two patches, the four end to end, in the order in which InternVL has them.

    Shapes: features (num_images, num_patches, hidden) of a square of patches; returns (num_images, num_patches/4,
    4 * hidden).
    """
    num_images, num_patches, hidden = features.shape
    half = round(num_patches**0.5) // 2
    squares = features.view(num_images, half, 2, half, 2, hidden)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(num_images, half * half, 4 * hidden)
