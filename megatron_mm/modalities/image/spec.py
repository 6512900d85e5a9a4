"""What an image is to shards and settings: its size in pixels, in patches and in tokens."""

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pydantic import Field

from megatron_mm.errors import DataError
from megatron_mm.modalities.modality import EncoderSection, Geometry, Modality
from megatron_mm.settings import PositiveInt, divisors


class ImageGeometry(Geometry):
    """How an image becomes tokens: it is squashed to a square, or cut into several, of one token a patch or four."""

    image_size: PositiveInt = 224
    """Side of the square, in pixels, that every image, or each of its tiles, is squashed to."""
    patch_size: PositiveInt = 16
    """Side of a patch, in pixels."""
    pixel_shuffle: bool = False
    """Make one token of each two by two patches, four times as wide, as InternVL does; false: one token a patch."""
    tiles: PositiveInt = 1
    """Most squares that an image is cut into, in the grid of the nearest aspect ratio, as InternVL's processor does;
    where there are several, the whole image follows them as one more. 1: every image is squashed to one square."""

    @property
    def tokens_per_image(self) -> int:
        """Decoder tokens of one square, an image or a tile of it: one a patch, or a fourth of that."""
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
    unit = "image"

    def num_tokens(self, item: Any, geometry: ImageGeometry) -> int:
        """Return the placeholders of an image. Raises DataError if its size decides, and cannot be read."""
        if geometry.tiles == 1:
            return geometry.tokens_per_image
        columns, rows = tile_grid(*_size(item.data), geometry)
        return geometry.tokens_per_image * _num_units(columns * rows)

    def unit_lengths(self, num_tokens: int, geometry: ImageGeometry) -> list[int]:
        """Return the tokens of each square that an image of `num_tokens` is cut into."""
        possible = {_num_units(tiles) for tiles in range(1, geometry.tiles + 1)}
        number, rest = divmod(num_tokens, geometry.tokens_per_image)
        return [geometry.tokens_per_image] * number if number in possible and not rest else []

    def unit_tokens(self, geometry: ImageGeometry) -> int:
        """Return the tokens of a square."""
        return geometry.tokens_per_image

    def unit_positions(self, geometry: ImageGeometry) -> int:
        """Return the positions of an image with its start and end token, which many tiles share."""
        return geometry.tokens_per_image + (2 if geometry.tiles == 1 else 0)


IMAGE = ImageModality()


@lru_cache(maxsize=1024)
def tile_grid(width: int, height: int, geometry: ImageGeometry) -> tuple[int, int]:
    """Return the columns and rows of tiles that an image of `width` x `height` pixels is cut into.

    It is the grid of the nearest aspect ratio. Of two that are as near, the larger one is taken where the image has
    more than half of its pixels: the choice of transformers' GotOcr2ImageProcessor, which is InternVL's.
    """
    sides = range(1, geometry.tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if columns * rows <= geometry.tiles]
    best, least = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        fills = width * height > 0.5 * geometry.image_size**2 * columns * rows
        if distance < least or (distance == least and fills):
            best, least = (columns, rows), distance
    return best


def _num_units(tiles: int) -> int:
    """Return the squares of an image of so many tiles: with more than one, the whole image is one more."""
    return tiles + (tiles > 1)


def _size(data: bytes) -> tuple[int, int]:
    """Return the width and height that the header of an image says. Raises DataError if there is none."""
    from PIL import Image  # runs over text are spared it

    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"an image of {len(data)} bytes has no size that can be read, which its tiles depend on"
        ) from error
