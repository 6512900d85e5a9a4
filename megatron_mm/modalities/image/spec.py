"""What an image is to shards and settings: its size in pixels, in patches and in tokens."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from megatron_mm.modalities.modality import EncoderSection, Geometry, Modality
from megatron_mm.settings import PositiveInt, divisors


class ImageGeometry(Geometry):
    """How an image becomes tokens: it is squashed to a square, one token a patch or one for four of them."""

    image_size: PositiveInt = 224
    """Side of the square, in pixels, that every image is squashed to."""
    patch_size: PositiveInt = 16
    """Side of a patch, in pixels."""
    pixel_shuffle: bool = False
    """Make one token of each two by two patches, four times as wide, as InternVL does; false: one token a patch."""

    @property
    def tokens_per_image(self) -> int:
        """Decoder tokens of one image: one a patch, or a fourth of that."""
        return self.patches_a_side**2 // (4 if self.pixel_shuffle else 1)

    @property
    def patches_a_side(self) -> int:
        """Patches in a row of an image, and in a column."""
        return self.image_size // self.patch_size


class ImageConfig(ImageGeometry, EncoderSection):
    """The image encoder, over patches, and its projector."""

    encoder: str = "vit"
    """Family of the encoder, a file of modalities/image/towers: vit; siglip2, which exports as the full folder only."""
    num_layers: PositiveInt
    """Encoder layers."""
    hidden_size: PositiveInt
    """Width of the encoder and of its features."""
    ffn_hidden_size: PositiveInt
    """Width of the encoder's MLP."""
    num_attention_heads: PositiveInt
    """Attention heads of the encoder."""
    class_token: bool = True
    """Whether vit has a class token beside the patches. Without one, it exports as the full folder only."""
    pretrained: str | None = Field(None, min_length=1)
    """File of timm (vit) or Hugging Face (vit, siglip2) that a new run's encoder starts from, or `random` for random
    weights, to be trained. null takes the encoder of training.start_from; without that, a run does not start."""

    def failures(self, name: str) -> Iterator[str]:
        """Yield what is wrong with the settings, which the user knows as `name`.*, and how to mend it."""
        yield from super().failures(name)
        if self.hidden_size % self.num_attention_heads:
            yield (
                f"{name}.num_attention_heads={self.num_attention_heads} does not divide "
                f"{name}.hidden_size={self.hidden_size}. Use one of {divisors(self.hidden_size)}."
            )
        if self.image_size % self.patch_size:
            yield (
                f"{name}.patch_size={self.patch_size} does not divide {name}.image_size={self.image_size}: patches "
                f"cover the image. Use one of {divisors(self.image_size)}."
            )
        if self.pixel_shuffle and self.patches_a_side % 2:
            yield (
                f"{name}.pixel_shuffle makes one of two by two patches, and {name}.image_size={self.image_size} with "
                f"{name}.patch_size={self.patch_size} are {self.patches_a_side} a side: make it an even number."
            )
        if not self.class_token and self.encoder != "vit":
            yield f"{name}.class_token=false is a setting of {name}.encoder=vit: {self.encoder} leaves no choice."


class ImageModality(Modality):
    """Images in a plain encoding: upright, 8-bit RGB or grey, without transparency."""

    name, kind = "image", 1
    geometry, section = ImageGeometry, ImageConfig
    unit, pretrained_files = "image", "VIT_FILE"

    def num_tokens(self, item: Any, geometry: ImageGeometry) -> int:
        """Return the placeholders of an image."""
        return geometry.tokens_per_image

    def unit_lengths(self, num_tokens: int, geometry: ImageGeometry) -> list[int]:
        """Return the tokens of the one unit that an image is."""
        return [num_tokens] if num_tokens == geometry.tokens_per_image else []

    def unit_tokens(self, geometry: ImageGeometry) -> int:
        """Return the tokens of an image."""
        return geometry.tokens_per_image

    def unit_positions(self, geometry: ImageGeometry) -> int:
        """Return the positions of an image with its start and end token."""
        return geometry.tokens_per_image + 2


IMAGE = ImageModality()
