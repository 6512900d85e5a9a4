"""Decoding: DALI, the reference and timm's transform agree, and one bad item costs only itself."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import tone

from megatron_mm import config as configs
from megatron_mm import modalities
from megatron_mm.data.media import make_decoders, reference_decoders
from megatron_mm.errors import ConfigError
from megatron_mm.ingest.image import read_image
from megatron_mm.modalities import default_geometries
from megatron_mm.modalities.audio.decode import cut_chunks
from megatron_mm.modalities.audio.spec import encode_flac
from megatron_mm.modalities.dali import BATCH_SIZE
from megatron_mm.modalities.decoder import Decoder
from megatron_mm.modalities.image.decode import decode_pixels

PHOTOS = Path(__file__).parents[2] / "examples" / "sample_data" / "train" / "photos"


Decoders = dict[str, Decoder]


def decoders_of(kind: str, *, has_gpu: bool = False) -> Decoders:
    return make_decoders(configs.load("tiny", [f"data.decoder={kind}"]), has_gpu=has_gpu)


@pytest.fixture(scope="module", params=["reference", "dali"])
def decoders(request: pytest.FixtureRequest) -> Decoders:
    return decoders_of(request.param)


def images_of(decoders: Decoders, encoded: list[bytes]) -> list[torch.Tensor | None]:
    """The one unit that each image is."""
    return [units if units is None else units[0] for units in decoders["image"].decode(encoded)]


def waveforms_of(decoders: Decoders, encoded: list[bytes]) -> list[torch.Tensor | None]:
    """The units of each recording end to end."""
    return [units if units is None else torch.cat(units) for units in decoders["audio"].decode(encoded)]


def save(pixels: np.ndarray, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    """Images as shards hold them: photographs and all the plain encodings, of odd sizes."""
    photo = np.asarray(Image.open(PHOTOS / "raccoon.jpg"))
    names = ("raccoon.jpg", "cat-face.png", "pink-tulips.webp")
    return [
        *(read_image((PHOTOS / name).read_bytes()).data for name in names),
        save(photo[..., 0], "PNG"),
        save(photo[..., 0], "JPEG"),
        save(photo, "JPEG", progressive=True),
        save(photo[:37, :301], "PNG"),
        save(photo[:300, :250], "JPEG", subsampling=0),
    ]


def timm_pixels(data: bytes) -> np.ndarray:
    """What timm's evaluation transform does with crop_mode=squash, before it normalises: Pillow's bicubic resize."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)


def test_pixels_are_those_of_timm(decoders: Decoders, encoded: list[bytes]) -> None:
    # The reference repeats Pillow's two 8-bit passes to 1 level; DALI rounds once, so overshoot at edges is cut once.
    mean, most = (0.3, 1) if decoders["image"].name == "torchvision" else (0.5, 8)
    for data, pixels in zip(encoded, images_of(decoders, encoded), strict=True):
        assert pixels is not None
        assert (pixels.shape, pixels.dtype) == ((3, 224, 224), torch.uint8)
        difference = np.abs(pixels.numpy().astype(int) - timm_pixels(data))
        assert difference.mean() <= mean
        assert difference.max() <= most


@pytest.mark.parametrize("size", [(300, 376), (300, 377), (200, 224), (200, 225), (100, 900), (900, 100), (399, 600)])
def test_the_reference_rounds_in_the_order_of_pillow(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    data = save(pixels, "PNG")
    difference = np.abs(decode_pixels(data, 224).numpy().astype(int) - timm_pixels(data))
    # Coefficients are rounded to other bits: of noise that is enlarged a value in 100,000 is off by 2, not by 5 to 20.
    assert difference.max() <= 2 and (difference > 1).sum() <= 3


def test_shrinking_does_not_alias(decoders: Decoders) -> None:
    stripes = np.zeros((900, 900, 3), np.uint8)
    stripes[:, ::2] = 255
    checks = np.zeros((900, 900, 3), np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    for pixels in images_of(decoders, [save(stripes, "PNG"), save(checks, "PNG")]):
        inner = pixels[:, 4:-4, 4:-4].float()  # what is finer than a pixel is its mean; nothing else comes of it
        assert (inner - 127.5).abs().max() <= 3


def test_sound_is_decoded_to_the_bit(decoders: Decoders) -> None:
    rng = np.random.default_rng(0)
    clips = [tone(rng, length) for length in (16_000, 40_001, 500)]
    for clip, waveform in zip(clips, waveforms_of(decoders, [encode_flac(clip) for clip in clips]), strict=True):
        np.testing.assert_array_equal(waveform.numpy(), (clip.clip(-1, 1) * 32767).round() / np.float32(32768))


def test_a_bad_item_costs_only_itself(decoders: Decoders, encoded: list[bytes]) -> None:
    good = [images_of(decoders, [data])[0] for data in encoded]
    bad = [encoded[0][:3_000], b"nonsense", b"", encoded[1][:200]]
    mixed = images_of(decoders, [bad[0], encoded[0], bad[1], bad[2], *encoded[1:], bad[3]])
    assert [mixed[index] is None for index in (0, 2, 3, -1)] == [True] * 4
    for image, expected in zip([mixed[1], *mixed[4:-1]], good, strict=True):
        torch.testing.assert_close(image, expected, atol=0, rtol=0)
    flac = encode_flac(tone(np.random.default_rng(0), 20_000))
    waveforms = waveforms_of(decoders, [flac, b"nonsense", b"", flac])
    assert [waveform is None for waveform in waveforms] == [False, True, True, False]
    assert torch.equal(waveforms[0], waveforms[3])


def test_batches_of_any_size_are_decoded(decoders: Decoders, encoded: list[bytes]) -> None:
    assert images_of(decoders, []) == []
    assert waveforms_of(decoders, []) == []
    images = images_of(decoders, [encoded[6]] * (BATCH_SIZE + 3))
    assert len(images) == BATCH_SIZE + 3
    assert all(torch.equal(image, images[0]) for image in images)


def test_what_dali_refuses_goes_the_reference_way(encoded: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    gif = save(np.asarray(Image.open(PHOTOS / "raccoon.jpg"))[:64, :64], "GIF")
    with caplog.at_level(logging.WARNING):
        first, second = images_of(decoders_of("dali"), [encoded[0], gif])
    assert first is not None
    assert torch.equal(second, images_of(decoders_of("reference"), [gif])[0])
    assert "DALI refuses 1 of 2 images: torchvision decodes them" in caplog.text


def test_the_knob_decides() -> None:
    names = {"reference": ["torchvision", "FFmpeg"], "dali": ["DALI on the CPU"] * 2}
    for kind, has_gpu, expected in (
        ("auto", False, "reference"),
        ("reference", True, "reference"),
        ("dali", False, "dali"),
    ):
        found = [decoder.name for decoder in decoders_of(kind, has_gpu=has_gpu).values()]
        assert found == names[expected]


def test_dali_that_is_not_there_is_not_replaced_in_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "megatron_mm.modalities.dali", None)
    monkeypatch.delattr(modalities, "dali", raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ConfigError, match="data.decoder=dali needs DALI"):
        decoders_of("dali")
    assert decoders_of("auto", has_gpu=True)["image"].name == "torchvision"
    assert "DALI is not installed" in caplog.text


def test_chunks_are_seconds_and_a_blank_has_the_tokens_of_its_item() -> None:
    waveform, geometries = torch.arange(36_000, dtype=torch.float32), default_geometries()
    chunks = cut_chunks(waveform, 16_000, normalize=False)
    assert [chunk.numel() for chunk in chunks] == [16_000, 16_000, 4_000]
    normalized = torch.cat(cut_chunks(waveform, 16_000, normalize=True))
    assert normalized.mean().abs() < 1e-4
    assert normalized.std() == pytest.approx(1.0, abs=1e-3)
    image, audio = reference_decoders(geometries).values()
    for num_tokens in (1, 48, 49, 50, 97, 98, 120, 147):
        assert audio.num_tokens(audio.blank(num_tokens)) == num_tokens
    assert [unit.shape for unit in image.blank(196)] == [(3, 224, 224)]
