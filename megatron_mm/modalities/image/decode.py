"""From the bytes of an image to the pixels that its encoder takes."""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from megatron_mm.modalities import decoder
from megatron_mm.modalities.decoder import Shown
from megatron_mm.modalities.image.spec import ImageGeometry


class Decoder(decoder.Decoder):
    """Images squashed to their square: (3, image_size, image_size) uint8. One unit each."""

    library, items = "torchvision", "images"
    section: ImageGeometry

    def reference(self, data: bytes) -> Tensor | None:
        """Return an image squashed to its square, by torchvision, or by Pillow if that refuses; None if both do."""
        try:
            return decode_pixels(data, self.section.image_size)
        except (RuntimeError, ValueError):
            return _pillow_pixels(data, self.section.image_size)

    def cut(self, item: Tensor) -> list[Tensor]:
        """Return the one unit that an image is."""
        return [item]

    def blank(self, num_tokens: int) -> list[Tensor]:
        """Return middle grey."""
        size = self.section.image_size
        return [torch.full((3, size, size), 128, dtype=torch.uint8)]

    def num_tokens(self, units: Sequence[Tensor]) -> int:
        """Return the tokens that the encoder makes of `units`."""
        return self.section.tokens_per_image * len(units)

    def show(self, unit: Tensor) -> Shown:
        """Return the pixels that the encoder gets."""
        return Shown(unit.permute(1, 2, 0).numpy(), "")


def dali_decoder(section: ImageGeometry, *, device_id: int | None) -> decoder.Dali:
    """Return DALI's decoder of images: on the GPU where there is one. Raises ImportError without DALI."""
    from megatron_mm.modalities import dali

    def build() -> dali.Pipeline:
        return _pipeline("cpu" if device_id is None else "mixed", section.image_size, device_id=device_id)

    @dali.pipeline
    def _pipeline(device: str, size: int) -> object:
        # Shards hold upright images; the size is given whole, so that no rounding of DALI's decides the geometry.
        pixels = dali.fn.decoders.image(
            dali.encoded(), device=device, output_type=dali.types.RGB, adjust_orientation=False
        )
        return dali.fn.resize(pixels, size=(size, size), interp_type=dali.types.INTERP_CUBIC, antialias=True)

    def to_tensor(output: tuple[np.ndarray, ...]) -> Tensor:
        return torch.from_numpy(output[0]).permute(2, 0, 1).contiguous()

    return dali.DaliDecoder(build, to_tensor, on_gpu=device_id is not None)


def decode_pixels(data: bytes, size: int) -> Tensor:
    """Return an image squashed to size x size, (3, size, size) uint8: bicubic with antialiasing, on 8-bit values.

    Within 1 of 255 of Pillow, so of timm. In white noise that is enlarged or shrunk by less than a tenth, a value in
    100,000 is off by 2: torch rounds the filter's weights to 16 bits, Pillow to 22, in each of the two passes. Pillow's
    own resize would be exact there, at twice the time.
    """
    pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    _, height, width = pixels.shape
    # Each pass rounds to 8 bits, so their order shows. Pillow 13 takes the rows first, as torchvision does, unless far
    # more lines than columns go (a rule found by trial over sizes): then the lines go here first as well.
    if height - size > 2 * max(0, width - size):
        pixels = resize(pixels, [size, width], InterpolationMode.BICUBIC, antialias=True)
    return resize(pixels, [size, size], InterpolationMode.BICUBIC, antialias=True)


def _pillow_pixels(data: bytes, size: int) -> Tensor | None:
    try:
        with Image.open(io.BytesIO(data)) as image:
            squashed = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1).contiguous()
