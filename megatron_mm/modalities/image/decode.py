"""From the bytes of an image to the pixels that its encoder takes."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from megatron_mm.modalities import decoder
from megatron_mm.modalities.decoder import Shown
from megatron_mm.modalities.image.spec import ImageGeometry, tile_grid


class Decoder(decoder.Decoder):
    """Images as squares of (3, image_size, image_size) uint8: one that it is squashed to, or its tiles."""

    library, items = "torchvision", "images"
    section: ImageGeometry

    def reference(self, data: bytes) -> Tensor | None:
        """Return the squares of an image, by torchvision, or by Pillow if that refuses; None if both do.

        Shapes: (num_squares, 3, image_size, image_size) uint8.
        """
        try:
            return squares(read_pixels(data), self.section)
        except (RuntimeError, ValueError):
            return _pillow_squares(data, self.section)

    def cut(self, item: Tensor) -> list[Tensor]:
        """Return the squares of an image, each of which is a unit."""
        return list(item.unbind())

    def blank(self, num_tokens: int) -> list[Tensor]:
        """Return middle grey."""
        size, number = self.section.image_size, num_tokens // self.section.tokens_per_image
        return self.cut(torch.full((number, 3, size, size), 128, dtype=torch.uint8))

    def num_tokens(self, units: Sequence[Tensor]) -> int:
        """Return the tokens that the encoder makes of `units`."""
        return self.section.tokens_per_image * len(units)

    def show(self, unit: Tensor) -> Shown:
        """Return the pixels that the encoder gets."""
        return Shown(unit.permute(1, 2, 0).numpy(), "")


def dali_decoder(section: ImageGeometry, *, device_id: int | None) -> decoder.Dali:
    """Return DALI's decoder of images: on the GPU where there is one. Raises ImportError without DALI.

    With tiles, whose grid depends on the image, DALI decodes only; they are cut on the CPU as the reference does.
    """
    from megatron_mm.modalities import dali

    def build() -> dali.Pipeline:
        return _pipeline("cpu" if device_id is None else "mixed", section.image_size, device_id=device_id)

    @dali.pipeline
    def _pipeline(device: str, size: int) -> object:
        # Shards hold upright images; the size is given whole, so that no rounding of DALI's decides the geometry.
        pixels = dali.fn.decoders.image(
            dali.encoded(), device=device, output_type=dali.types.RGB, adjust_orientation=False
        )
        if section.tiles > 1:
            return pixels
        return dali.fn.resize(pixels, size=(size, size), interp_type=dali.types.INTERP_CUBIC, antialias=True)

    def to_tensor(output: tuple[np.ndarray, ...]) -> Tensor:
        pixels = torch.from_numpy(output[0]).permute(2, 0, 1).contiguous()
        return squares(pixels, section) if section.tiles > 1 else pixels[None]

    return dali.DaliDecoder(build, to_tensor, on_gpu=device_id is not None)


def read_pixels(data: bytes) -> Tensor:
    """Return an image as it is stored, (3, height, width) uint8. Raises RuntimeError or ValueError if it is damaged."""
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def decode_pixels(data: bytes, size: int) -> Tensor:
    """Return an image squashed to size x size, (3, size, size) uint8."""
    return squash(read_pixels(data), size, size)


def squares(pixels: Tensor, section: ImageGeometry) -> Tensor:
    """Return the squares that an image, (3, height, width) uint8, becomes: (num_squares, 3, size, size) uint8."""
    _, height, width = pixels.shape
    return _cut(width, height, section, lambda columns, lines: squash(pixels, columns, lines))


def squash(pixels: Tensor, columns: int, lines: int) -> Tensor:
    """Return an image squashed to (3, lines, columns) uint8: bicubic with antialiasing, on 8-bit values.

    Within 1 of 255 of Pillow, so of timm. In white noise that is enlarged or shrunk by less than a tenth, a value in
    100,000 is off by 2: torch rounds the filter's weights to 16 bits, Pillow to 22, in each of the two passes. Pillow's
    own resize would be exact there, at twice the time.
    """
    _, height, width = pixels.shape
    # Each pass rounds to 8 bits, so their order shows. Pillow 13 takes the rows first, as torchvision does, unless far
    # more lines than columns go (a rule found by trial over sizes): then the lines go here first as well.
    if height - lines > 2 * max(0, width - columns):
        pixels = resize(pixels, [lines, width], InterpolationMode.BICUBIC, antialias=True)
    return resize(pixels, [lines, columns], InterpolationMode.BICUBIC, antialias=True)


def _pillow_squares(data: bytes, section: ImageGeometry) -> Tensor | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            whole = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None

    def squashed(columns: int, lines: int) -> Tensor:
        pixels = np.array(whole.resize((columns, lines), Image.Resampling.BICUBIC))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    return _cut(*whole.size, section, squashed)


def _cut(width: int, height: int, section: ImageGeometry, squashed: Callable[[int, int], Tensor]) -> Tensor:
    """Return the tiles of an image, row by row, and behind several of them the whole image in one square.

    `squashed` gives the image squashed to so many columns and lines. Shapes: returns (num_squares, 3, size, size).
    """
    size, (columns, rows) = section.image_size, tile_grid(width, height, section)
    canvas = squashed(columns * size, rows * size).reshape(3, rows, size, columns, size)
    tiles = canvas.permute(1, 3, 0, 2, 4).reshape(rows * columns, 3, size, size)
    return tiles if len(tiles) == 1 else torch.cat([tiles, squashed(size, size)[None]])
