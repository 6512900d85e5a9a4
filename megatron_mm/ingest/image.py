"""Images of any encoding to one plain form that every decoder reads alike."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import pillow_heif
from PIL import Image, ImageOps, UnidentifiedImageError

from megatron_mm.errors import DataError
from megatron_mm.ingest.document import ImageSegment, Rejection, Segment

MAX_PIXELS = 64_000_000
"""Larger images are refused from their header, before anything is decoded."""
MIN_SIDE = 8
"""The fewest pixels of a side of an image."""
pillow_heif.register_heif_opener()

PLAIN = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")}
"""Format and mode of images whose bytes are stored as they are, if they are upright."""
JPEG_QUALITY = 95


class TooSmall(DataError):
    """An image holds nothing to see: it is a rule, a bullet or a tracking pixel."""


def read_image(data: bytes) -> ImageSegment:
    """Return the image in `data` upright, in 8-bit RGB or grey, composited over white.

    A plain JPEG or PNG keeps its bytes; anything else is encoded again (JPEG from lossy formats, PNG otherwise). Of
    an animation the first frame is taken. Raises DataError if the image is damaged or too large, TooSmall of what is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                if image.format == "EPS":  # Pillow starts Ghostscript for it
                    raise DataError("it is PostScript, a program, which is not run")
                _check_size(image)
                # Pillow shows 8 bits of a 16-bit RGB PNG, other decoders all 16. Loading forgets the tiles.
                is_deep = any(";16" in str(tile.args) for tile in image.tile)
                image.load()
                return ImageSegment(data if _is_plain(image) and not is_deep else _encode_plain(image))
    except UnidentifiedImageError:
        raise DataError("it is not an image that can be read") from None
    except Image.DecompressionBombError as error:
        raise DataError(f"the image is too large: {error}") from error
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise DataError(f"the image is damaged: {error}") from error


def read_image_file(path: Path) -> tuple[list[Segment], list[Rejection]]:
    """Return the image in a file. Raises DataError as `read_image`."""
    return [read_image(path.read_bytes())], []


def encode_pixels(pixels: Image.Image) -> ImageSegment:
    """Return a bitmap that a document held as an image segment. Raises DataError if it is too large or too small."""
    _check_size(pixels)
    return ImageSegment(_encode_plain(pixels, lossy=True))


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"the image is too large: {width} x {height} pixels, of which {MAX_PIXELS:,} are decoded")
    if min(width, height) < MIN_SIDE:
        raise TooSmall(f"the image has {width} x {height} pixels; below {MIN_SIDE} there is nothing to see")


def _is_plain(image: Image.Image) -> bool:
    upright = image.getexif().get(0x0112, 1) == 1
    return (image.format, image.mode) in PLAIN and upright and "transparency" not in image.info


def _encode_plain(image: Image.Image, *, lossy: bool | None = None) -> bytes:
    lossy = image.format in ("JPEG", "WEBP", "MPO") if lossy is None else lossy
    image = _to_8_bit(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    image = image if image.mode == "L" else image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY) if lossy else image.save(buffer, "PNG")
    return buffer.getvalue()


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits; Pillow's own conversion saturates it to white."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float32)
    top = 65535.0 if image.mode.startswith("I") else max(float(values.max()), 1.0)
    return Image.fromarray((values / top * 255.0).clip(0, 255).round().astype(np.uint8))
