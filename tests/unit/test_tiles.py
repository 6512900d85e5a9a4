"""Tiles of images: grid and pixels are those of InternVL's processor, and shards know what they were cut for."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import save_tokenizer, seal, write_shards
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor, get_optimal_tiled_canvas

from megatron_mm import config as configs
from megatron_mm.data.media import make_decoders
from megatron_mm.data.rendering import render_page
from megatron_mm.errors import DataError
from megatron_mm.ingest.document import Document, ImageSegment
from megatron_mm.ingest.encode import encode_document
from megatron_mm.ingest.lines import encode_documents
from megatron_mm.ingest.work_items import Options
from megatron_mm.modalities import default_geometries
from megatron_mm.modalities.image import decode
from megatron_mm.modalities.image.hf import EXPORTS, tiling
from megatron_mm.modalities.image.spec import IMAGE, ImageGeometry, tile_grid
from megatron_mm.shards import ShardReader
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer

PHOTOS = Path(__file__).parents[2] / "examples" / "sample_data" / "train" / "photos"
SIX = ImageGeometry(tiles=6)


@pytest.mark.parametrize(("size", "tiles"), [(224, 1), (224, 4), (448, 6), (448, 12), (32, 7)])
def test_the_grid_is_that_of_transformers(size: int, tiles: int) -> None:
    rng, geometry, seen = np.random.default_rng(0), ImageGeometry(image_size=size, tiles=tiles), set()
    sizes = rng.integers(1, 3000, (500, 2)).tolist()
    # Of the same aspect ratio as a grid, small and large: where the number of pixels decides.
    sizes += [
        (columns * side, rows * side) for columns in range(1, 5) for rows in range(1, 5) for side in range(8, 900, 60)
    ]
    for width, height in sizes:
        found = tile_grid(width, height, geometry)
        assert found == get_optimal_tiled_canvas((height, width), (size, size), 1, tiles)
        seen.add(found)
    assert len(seen) > min(tiles - 1, 5)


def photo(columns: int, lines: int) -> bytes:
    """Return a photograph, squashed, as a PNG."""
    buffer = io.BytesIO()
    with Image.open(PHOTOS / "raccoon.jpg") as image:
        image.convert("RGB").resize((columns, lines), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def decoder_of(kind: str, *settings: str) -> decode.Decoder:
    config = configs.load("tiny", [f"data.decoder={kind}", *settings])
    return make_decoders(config, has_gpu=False)["image"]


@pytest.mark.parametrize("kind", ["reference", "dali"])
@pytest.mark.parametrize(("size", "squares"), [((300, 300), 1), ((900, 300), 4), ((400, 800), 3), ((700, 460), 7)])
def test_pixels_are_those_of_internvl(kind: str, size: tuple[int, int], squares: int) -> None:
    decoder, data = decoder_of(kind, "image.tiles=6"), photo(*size)
    (units,) = decoder.decode([data])
    options = {key: value for key, value in tiling(decoder.section).items() if key != "image_processor_type"}
    processor = GotOcr2ImageProcessor(**options | {"do_normalize": False, "do_rescale": False})
    found = processor(Image.open(io.BytesIO(data)), return_tensors="pt")
    assert found["num_patches"].tolist() == [squares]
    assert {(unit.dtype, unit.shape) for unit in units} == {(torch.uint8, (3, 224, 224))}
    difference = (torch.stack(units).int() - found["pixel_values"].int()).abs()
    assert difference.max() <= 2
    num_tokens = IMAGE.num_tokens(ImageSegment(data), decoder.section)
    assert num_tokens == decoder.num_tokens(units) == 196 * squares
    assert IMAGE.unit_lengths(num_tokens, decoder.section) == [196] * squares


def test_what_torchvision_refuses_is_cut_too() -> None:
    decoder, buffer = decoder_of("reference", "image.tiles=6"), io.BytesIO()
    with Image.open(io.BytesIO(photo(900, 300))) as image:
        image.save(buffer, "TIFF")
        expected = decoder.units(photo(900, 300))
    found = decoder.units(buffer.getvalue())
    assert (torch.stack(found).int() - torch.stack(expected).int()).abs().max() <= 2


def test_only_numbers_of_tiles_that_a_grid_has_are_possible() -> None:
    possible = [number for number in range(12) if IMAGE.unit_lengths(196 * number, SIX)]
    assert possible == [1, 3, 4, 5, 6, 7]
    assert not IMAGE.unit_lengths(196 * 3 + 1, SIX)
    assert [number for number in range(4) if IMAGE.unit_lengths(196 * number, ImageGeometry())] == [1]
    blank = decode.Decoder(SIX).blank(196 * 4)
    assert [unit.shape for unit in blank] == [(3, 224, 224)] * 4
    assert decode.Decoder(SIX).num_tokens(blank) == 196 * 4


def test_an_image_without_a_size_is_a_rejection(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(save_tokenizer(tmp_path / "tokenizer.json"))
    documents = [Document([ImageSegment(data)], Source.IMAGE) for data in (b"nonsense", photo(900, 300))]
    options = Options(geometries=default_geometries() | {"image": SIX})
    names = ["here, document 1", "here, document 2"]
    batch, rejections = encode_documents(documents, tokenizer, options, names=names, file="here")
    assert [(number, item.num_tokens) for number, item in batch.media] == [(0, 196 * 4)]
    (rejection,) = rejections
    assert rejection.path == "here, document 1"
    assert rejection.reason == "an image of 8 bytes has no size that can be read, which its tiles depend on"


def test_a_page_shows_every_tile(tmp_path: Path) -> None:
    tokenizer = TextTokenizer(save_tokenizer(tmp_path / "tokenizer.json"))
    geometries = default_geometries() | {"image": SIX}
    document = encode_document(
        Document([ImageSegment(photo(900, 300))], Source.IMAGE), tokenizer, geometries=geometries
    )
    page = render_page([("one", document)], tokenizer, decoders={"image": decode.Decoder(SIX)})
    assert page.count("data:image/png") == 4


def test_shards_record_tiles_and_those_without_were_squashed(tmp_path: Path) -> None:
    geometries = default_geometries() | {"image": SIX}
    tiled = ShardReader(write_shards(tmp_path, "tiled", geometries=geometries, image_sizes=[(900, 300)]))
    assert tiled.geometries["image"].tiles == 6
    assert 196 * 4 in tiled.media(int(tiled.has_media().argmax()))["num_tokens"]
    with pytest.raises(DataError, match="made for image.tiles=6, and this run has image.tiles=1"):
        tiled.check_geometries(default_geometries(), whose="this run")
    manifest = Path(f"{write_shards(tmp_path, 'old')}.json")
    recorded = json.loads(manifest.read_text())
    del recorded["modalities"]["image"]["tiles"]
    manifest.write_text(json.dumps(recorded))
    seal(tmp_path / "old", version=1)
    ShardReader(tmp_path / "old").check_geometries(default_geometries(), whose="this run")


def test_a_folder_of_other_tiles_is_named() -> None:
    one, four, six = (configs.load("tiny", [f"image.tiles={tiles}"]).image for tiles in (1, 4, 6))
    tower = {"vision_config": IMAGE.family(one).description(one)}
    assert EXPORTS.unlike(tower | EXPORTS.config(four), one) == ["image_tiles=4, ours has 1"]
    assert EXPORTS.unlike(tower | EXPORTS.config(four), six) == ["image_tiles=4, ours has 6"]
    # A folder that says nothing of tiles, as InternVL's own, leaves them to the run.
    assert [EXPORTS.unlike(tower, section) for section in (one, four)] == [[], []]
