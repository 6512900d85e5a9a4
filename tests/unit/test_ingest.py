"""Ingestion: every kind of file to the documents that it holds, and every bad one to a rejection with its reason."""

import base64
import io
import json
import struct
import wave
import zlib
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pypdfium2 as pdfium
import pytest
import soxr
from PIL import Image
from small import png, save_tokenizer, tone

from megatron_mm.errors import DataError
from megatron_mm.ingest import account, kinds
from megatron_mm.ingest.audio import Resampled, read_audio
from megatron_mm.ingest.detect import detect
from megatron_mm.ingest.document import AudioSegment, ImageSegment, TextSegment
from megatron_mm.ingest.encode import encode_document
from megatron_mm.ingest.image import read_image
from megatron_mm.ingest.read import read_file
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, audio_frames, decode_flac
from megatron_mm.modalities.image.decode import decode_pixels
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer

SAMPLE_DATA = Path(__file__).parents[2] / "examples" / "sample_data"


def encode_image(pixels: np.ndarray, format: str, mode: str | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, format, **options)
    return buffer.getvalue()


def encode_audio(samples: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    """Encode (channels, num_samples) float32 as any format that FFmpeg writes."""
    buffer = io.BytesIO()
    layout = "mono" if len(samples) == 1 else "stereo"
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout=layout)
        resampler = av.AudioResampler(
            format=stream.format, layout=layout, rate=rate, frame_size=stream.frame_size or 1024
        )
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
        frame.sample_rate = rate
        for part in (*resampler.resample(frame), *resampler.resample(None)):
            for packet in stream.encode(part):
                output.mux(packet)
        for packet in stream.encode(None):
            output.mux(packet)
    return buffer.getvalue()


def encode_wav(samples: np.ndarray, rate: int = SAMPLE_RATE) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples.T * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def gradient() -> np.ndarray:
    """A picture whose corners differ: (48, 64, 3) uint8."""
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([rows * 5, columns * 3, np.full_like(rows, 40)], axis=2).astype(np.uint8)


def pixels_of(segment: ImageSegment) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(segment.data)).convert("RGB")).astype(int)


# Text and web pages


def test_text_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("First line\r\nzweite Zeile äöü\n".encode())
    documents, rejections = read_file(tmp_path / "a.txt")
    assert not rejections
    assert documents[0].segments == [TextSegment("First line\nzweite Zeile äöü\n")]
    assert documents[0].source == Source.TEXT


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marked_encodings_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_text("naïve text with a mark\n", encoding=encoding)
    assert read_file(tmp_path / "a.txt")[0][0].segments == [TextSegment("naïve text with a mark\n")]


def test_a_page_shows_text_and_images_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a b.png").write_bytes(png(rng))
    inline = base64.b64encode(png(rng)).decode()
    (tmp_path / "page.html").write_text(
        "<!doctype html><html><head><title>no</title><style>no</style></head><body><script>no()</script><!-- no -->"
        "<nav>no</nav><h1>A  <b>title</b></h1><p>before<img src='img/a%20b.png'>after</p><pre>kept\n  as is</pre>"
        f"<ul><li>one</li><li>two</li></ul><table><tr><th>a<th>b</tr><tr><td><p>1 </p><td>H<sub>2</sub>O</tr></table>"
        f"<table><tr><td><p>left</p><p>side</p><td>right</table><img src='data:image/png;base64,{inline}'>"
        "<img src='https://elsewhere.example/x.png'><img src='../outside.png'><p>end &amp; done</p></body></html>"
    )
    documents, rejections = read_file(tmp_path / "page.html")
    assert not rejections
    kinds = [type(segment).__name__ for segment in documents[0].segments]
    assert kinds == ["TextSegment", "ImageSegment", "TextSegment", "ImageSegment", "TextSegment"]
    texts = [segment.text for segment in documents[0].segments if isinstance(segment, TextSegment)]
    assert texts == [
        "A title\n\nbefore\n",
        "after\n\nkept\n  as is\n\none\n\ntwo\n\na\tb\n1\tH2O\n\nleft\n\nside\n\nright\n",
        "end & done\n",
    ]


def test_long_and_deep_pages_are_read_whole_or_rejected(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("<html><body><p>" + "word " * 2_200_000 + "end</p></body></html>")
    assert read_file(path)[0][0].segments[0].text.endswith("word end\n")
    path.write_text("<html><body>" + "<table><tr><td>" * 150 + "inner" + "</td></tr></table>" * 150 + "</body></html>")
    assert read_file(path)[0][0].segments == [TextSegment("inner\n")]
    path.write_text("<html><body>" + "<div>" * 100_000 + "inner")
    assert "nested too deeply" in read_file(path)[1][0].reason


def test_a_page_with_a_broken_image_is_kept_without_it(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "page.html").write_text("<html><body><p>text</p><img src='bad.png'><img src='gone.png'></body></html>")
    documents, rejections = read_file(tmp_path / "page.html")
    assert documents[0].segments == [TextSegment("text\n")]
    assert [rejection.path for rejection in rejections] == [
        f"{tmp_path}/page.html#bad.png",
        f"{tmp_path}/page.html#gone.png",
    ]


# JSON lines


def test_lines_may_hold_text_media_and_segments(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "a.png").write_bytes(png(rng))
    (tmp_path / "s.wav").write_bytes(encode_wav(tone(rng, 20_000)[None]))
    lines = [
        {"text": "only text"},
        {"image": "a.png", "text": "a caption"},
        {"audio": "s.wav", "text": "what is said"},
        {"segments": [{"text": "first"}, {"image": "a.png"}, {"text": "last"}]},
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    documents, rejections = read_file(tmp_path / "l.jsonl")
    assert not rejections
    kinds = [[type(segment).__name__[0] for segment in document.segments] for document in documents]
    assert kinds == [["T"], ["I", "T"], ["A", "T"], ["T", "I", "T"]]
    assert [document.source for document in documents] == [Source.TEXT, Source.IMAGE, Source.AUDIO, Source.IMAGE]


def test_a_bad_line_costs_only_itself(tmp_path: Path) -> None:
    lines = [
        '{"text": "good"}',
        "not json",
        '{"other": 1}',
        '{"text": 3}',
        "[1]",
        '{"image": "../../x.png"}',
        '{"text": "good"}',
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    documents, rejections = read_file(tmp_path / "l.jsonl")
    assert len(documents) == 2
    assert [rejection.path.rpartition(":")[2] for rejection in rejections] == ["2", "3", "4", "5", "6"]
    assert "outside the folder" in rejections[-1].reason


# Images


def test_plain_images_keep_their_bytes() -> None:
    for format, mode in (("JPEG", None), ("PNG", None), ("PNG", "L"), ("JPEG", "L")):
        data = encode_image(gradient(), format, mode)
        assert read_image(data).data == data


@pytest.mark.parametrize(
    ("format", "mode", "tolerance"),
    [("BMP", None, 0), ("TIFF", None, 0), ("GIF", None, 40), ("WEBP", None, 30), ("PNG", "P", 60), ("TIFF", "CMYK", 4)],
)
def test_other_encodings_become_plain(format: str, mode: str | None, tolerance: int) -> None:
    segment = read_image(encode_image(gradient(), format, mode))
    with Image.open(io.BytesIO(segment.data)) as image:
        assert image.format in ("PNG", "JPEG")
        assert image.mode in ("RGB", "L")
    assert np.abs(pixels_of(segment) - gradient().astype(int)).max() <= tolerance


def test_transparency_is_composited_over_white() -> None:
    layer = np.dstack([gradient(), np.zeros((48, 64), np.uint8)])
    layer[:24, :, 3] = 255
    pixels = pixels_of(read_image(encode_image(layer, "PNG")))
    np.testing.assert_array_equal(pixels[:24], gradient()[:24])
    assert (pixels[24:] == 255).all()


def test_16_bit_grey_is_scaled() -> None:
    ramp = (np.arange(64 * 48).reshape(48, 64) * 21).astype(np.uint16)
    pixels = pixels_of(read_image(encode_image(ramp, "PNG")))
    assert np.abs(pixels[..., 0] - ramp / 257).max() <= 1


def test_16_bit_colour_is_scaled() -> None:
    deep = gradient().astype(np.uint16) * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    coded = [struct.pack(">I", len(data)) + name + data for name, data in chunks]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(part + struct.pack(">I", zlib.crc32(part[4:])) for part in coded)
    segment = read_image(data)
    assert segment.data != data, "torchvision would give its 16 bits"
    assert np.abs(pixels_of(segment) - gradient().astype(int)).max() <= 1


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.fromarray(np.full((48, 64, 3), level, np.uint8)) for level in (200, 10)]
    for format in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
        assert np.abs(pixels_of(read_image(buffer.getvalue())) - 200).max() <= 2
        assert decode_pixels(read_image(buffer.getvalue()).data, 224).float().mean() > 190


def test_an_image_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    segment = read_image(encode_image(gradient(), "PNG", exif=exif))
    np.testing.assert_array_equal(pixels_of(segment), np.rot90(gradient(), -1))


def test_decoding_squashes_to_the_encoder_size() -> None:
    pixels = decode_pixels(encode_image(gradient(), "PNG"), 224)
    assert pixels.shape == (3, 224, 224)
    expected = Image.fromarray(gradient()).resize((224, 224), Image.Resampling.BICUBIC)
    assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected)).max() <= 1
    assert decode_pixels(encode_image(gradient(), "PNG", "L"), 224).shape == (3, 224, 224)


# Sound


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("wav", "pcm_s16le", 44_100),
        ("wav", "pcm_u8", 8_000),
        ("wav", "pcm_f32le", 48_000),
        ("flac", "flac", 16_000),
        ("mp3", "libmp3lame", 44_100),
        ("ogg", "libopus", 48_000),
        ("webm", "libopus", 48_000),
        ("ipod", "aac", 44_100),
    ],
)
def test_every_sound_format_becomes_16_khz_mono(container: str, codec: str, rate: int) -> None:
    seconds = 1.5
    time = np.arange(int(seconds * rate)) / rate
    wave_form = (0.4 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
    segment = read_audio(encode_audio(np.stack([wave_form, wave_form]), rate, container, codec))
    samples = decode_flac(segment.data)
    assert len(samples) == segment.num_samples
    assert segment.num_samples == pytest.approx(seconds * SAMPLE_RATE, abs=2_500)  # encoders pad at both ends
    spectrum = np.abs(np.fft.rfft(samples[4_000:20_000]))
    assert np.argmax(spectrum) == 440
    assert np.abs(samples[4_000:20_000]).max() == pytest.approx(0.4, abs=0.05)


def test_16_khz_mono_is_kept_to_the_bit() -> None:
    samples = tone(np.random.default_rng(0), 20_000)
    segment = read_audio(encode_wav(samples[None]))
    assert np.abs(decode_flac(segment.data) - (samples * 32767).astype(np.int16) / 32768).max() <= 1.01 / 32768


def test_resampling_does_not_alias() -> None:
    rate = 44_100
    whistle = (0.5 * np.sin(2 * np.pi * 10_000 * np.arange(2 * rate) / rate)).astype(np.float32)
    samples = decode_flac(read_audio(encode_wav(whistle[None], rate)).data)
    assert np.abs(samples[2_000:-2_000]).max() < 1e-4  # 10 kHz cannot be in 16 kHz sound, nor come back as 6 kHz


# PDF


def make_pdf(path: Path, pages: list[list[tuple]]) -> Path:
    """Write a PDF: pages of ('text', x, y, string) and ('image', x, y, width, height, JPEG)."""
    document = pdfium.PdfDocument.new()
    font = pdfium.PdfFont.load_standard(document, "Helvetica")
    for items in pages:
        page = document.new_page(595, 842)
        for kind, x, y, *rest in items:
            if kind == "text":
                text = pdfium.raw.FPDFPageObj_CreateTextObj(document, font, 12.0)
                encoded = (rest[0] + "\0").encode("utf-16-le")
                pdfium.raw.FPDFText_SetText(text, ctypes_string(encoded))
                pdfium.raw.FPDFPageObj_Transform(text, 1, 0, 0, 1, x, y)
                pdfium.raw.FPDFPage_InsertObject(page, text)
            else:
                width, height, jpeg = rest
                image = pdfium.PdfImage.new(document)
                image.load_jpeg(io.BytesIO(jpeg), inline=True)
                image.set_matrix(pdfium.PdfMatrix(width, 0, 0, height, x, y))
                page.insert_obj(image)
        page.gen_content()
    document.save(path)
    return path


def ctypes_string(data: bytes):
    import ctypes

    return ctypes.cast(ctypes.create_string_buffer(data), ctypes.POINTER(ctypes.c_ushort))


def test_a_pdf_interleaves_text_and_images(tmp_path: Path) -> None:
    jpeg = encode_image(gradient(), "JPEG")
    first = [
        ("text", 72, 760, "Above the figure."),
        ("text", 72, 500, "Below the figure."),
        ("image", 72, 550, 200, 150, jpeg),
    ]
    second = [("text", 72, 760, "On the second page."), ("image", 72, 600, 80, 60, jpeg)]
    documents, rejections = read_file(make_pdf(tmp_path / "a.pdf", [first, second]))
    assert not rejections
    assert documents[0].source == Source.PDF
    before, image, after = documents[0].segments  # the same picture on page two is kept once
    assert before == TextSegment("Above the figure.\n")
    assert image == ImageSegment(jpeg)
    assert after == TextSegment("Below the figure.\nOn the second page.\n")


def test_two_columns_written_row_by_row_are_read_by_column(tmp_path: Path) -> None:
    rows = [
        item
        for number in range(12)
        for item in (
            ("text", 60, 740 - 20 * number, f"left line {number} of the page"),
            ("text", 320, 740 - 20 * number, f"right line {number} of the page"),
        )
    ]
    documents, _ = read_file(make_pdf(tmp_path / "a.pdf", [rows]))
    text = documents[0].segments[0].text
    order = [text.index(f"{side} line {number} ") for side in ("left", "right") for number in range(12)]
    assert order == sorted(order)


def test_lines_of_a_paragraph_are_joined(tmp_path: Path) -> None:
    lines = [
        ("text", 72, 700, "A paragraph goes on"),
        ("text", 72, 686, "over two lines."),
        ("text", 72, 640, "Another one."),
    ]
    documents, _ = read_file(make_pdf(tmp_path / "a.pdf", [lines]))
    assert documents[0].segments == [TextSegment("A paragraph goes on over two lines.\nAnother one.\n")]


def draw(page: pdfium.PdfPage, left: float, bottom: float, width: float, height: float) -> None:
    """Fill a red rectangle of a page."""
    path = pdfium.raw.FPDFPageObj_CreateNewRect(left, bottom, width, height)
    pdfium.raw.FPDFPageObj_SetFillColor(path, 255, 0, 0, 255)
    pdfium.raw.FPDFPath_SetDrawMode(path, pdfium.raw.FPDF_FILLMODE_WINDING, 0)
    pdfium.raw.FPDFPage_InsertObject(page, path)


def stroke(page: pdfium.PdfPage, *points: tuple[float, float]) -> None:
    """Draw a blue line through points of a page."""
    path = pdfium.raw.FPDFPageObj_CreateNewPath(*points[0])
    for point in points[1:]:
        pdfium.raw.FPDFPath_LineTo(path, *point)
    pdfium.raw.FPDFPageObj_SetStrokeColor(path, 0, 0, 255, 255)
    pdfium.raw.FPDFPageObj_SetStrokeWidth(path, 2.0)
    pdfium.raw.FPDFPath_SetDrawMode(path, 0, 1)
    pdfium.raw.FPDFPage_InsertObject(page, path)


def redrawn(path: Path, draw_on: Callable[[pdfium.PdfPage], None], *, rotation: int = 0) -> list:
    """Return the segments of a PDF of one page after something is drawn on it and it is turned."""
    document = pdfium.PdfDocument(path)
    page = document[0]
    draw_on(page)
    page.gen_content()
    page.set_rotation(rotation)
    document.save(path.with_suffix(".drawn.pdf"))
    ((read,), rejections) = read_file(path.with_suffix(".drawn.pdf"))
    assert not rejections
    return list(read.segments)


def draw_plot(page: pdfium.PdfPage) -> None:
    stroke(page, (340, 500), (340, 600))
    stroke(page, (340, 500), (500, 500))
    stroke(page, (345, 505), (380, 560), (420, 530), (490, 590))


def column(x: float, first: int, last: int) -> list[tuple]:
    return [("text", x, 760 - 20 * row, f"line {row} of column {x} of text") for row in range(first, last)]


def test_a_drawn_plot_is_an_image_in_its_column_with_its_labels(tmp_path: Path) -> None:
    labels = [("text", 326, 500, "0"), ("text", 326, 592, "9"), ("text", 390, 484, "weeks")]
    page = [*column(60, 0, 20), *column(320, 0, 7), *labels, *column(320, 15, 20)]
    before, plot, after = redrawn(make_pdf(tmp_path / "a.pdf", [page]), draw_plot)
    assert [before.text.count(f"column {x}") for x in (60, 320)] == [20, 7]
    assert [after.text.count(f"column {x}") for x in (60, 320)] == [0, 5]
    assert "weeks" not in before.text + after.text
    pixels = pixels_of(plot).astype(int)
    assert 1.2 < pixels.shape[1] / pixels.shape[0] < 1.7
    is_blue, is_black = pixels[..., 2] > pixels[..., 0] + 100, pixels.max(-1) < 60
    assert is_blue.mean() > 0.01 and is_black.mean() > 0.001  # lines and labels


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_drawn_plot_is_cut_out_as_the_page_shows_it(tmp_path: Path, rotation: int) -> None:
    path = make_pdf(tmp_path / "a.pdf", [[("text", 60, 760, "Some text above the plot.")]])
    upright, turned = (
        next(pixels_of(part) for part in redrawn(path, draw_plot, rotation=angle) if isinstance(part, ImageSegment))
        for angle in (0, rotation)
    )
    expected = np.rot90(upright, -rotation // 90).astype(int)
    assert turned.shape == expected.shape
    assert np.abs(turned - expected).mean() < 4  # smoothing and JPEG


def draw_table(page: pdfium.PdfPage) -> None:
    """Draw the borders of a table, a shaded row, an underline, a frame around the page and a rounded box."""
    for y in (690, 710, 730, 750, 770):
        stroke(page, (60, y), (300, y))
    for x in (60, 140, 220, 300):
        stroke(page, (x, 690), (x, 770))
    draw(page, 60, 750, 240, 20)
    stroke(page, (60, 597), (200, 597))
    stroke(page, (20, 20), (575, 20), (575, 822), (20, 822), (20, 20))
    corners = [(60, 490), (55, 495), (55, 525), (60, 530), (295, 530), (300, 525), (300, 495), (295, 490), (60, 490)]
    stroke(page, *corners)


def test_tables_underlines_and_boxes_around_text_are_no_figures(tmp_path: Path) -> None:
    cells = [("text", 70 + 80 * column, 695 + 20 * row, f"{row}{column}") for row in range(4) for column in range(3)]
    texts = [("text", 60, 600, "An underlined heading"), ("text", 65, 505, "A line of text in a rounded box")]
    (only,) = redrawn(make_pdf(tmp_path / "a.pdf", [[*cells, *texts]]), draw_table)
    assert all(text in only.text for text in ("00", "32", "heading", "rounded box"))


def test_drawings_on_a_huge_page_cost_no_more_than_on_another(tmp_path: Path) -> None:
    document = pdfium.PdfDocument(make_pdf(tmp_path / "a.pdf", [[("text", 60, 760, "Some text.")]]))
    document[0].set_mediabox(0, 0, 900_000, 900_000)
    document.save(tmp_path / "huge.pdf")

    def draw_two(page: pdfium.PdfPage) -> None:
        stroke(page, (100_000, 400_000), (500_000, 600_000), (100_000, 800_000))
        stroke(page, (100_000, 100_000), (300_000, 100_100), (800_000, 100_000))  # too thin for a picture of it

    (figure,) = (part for part in redrawn(tmp_path / "huge.pdf", draw_two) if isinstance(part, ImageSegment))
    assert abs(np.array(pixels_of(figure).shape[:2]) - 1024).max() <= 2


def test_more_figures_than_the_limit_are_one_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mm.ingest.figures.MAX_FIGURES", 3)
    path = make_pdf(tmp_path / "a.pdf", [[("text", 60, 760, "Some text above them all.")]])

    def draw_row(page: pdfium.PdfPage, count: int) -> None:
        for x in range(60, 60 + 100 * count, 100):
            stroke(page, (x, 500), (x + 30 + x // 10, 520), (x, 540))

    few, many = (redrawn(path, lambda page, count=count: draw_row(page, count))[1:] for count in (3, 4))
    assert len(few) == 3
    assert len(many) == 1
    assert pixels_of(many[0]).shape[1] > 2 * max(pixels_of(one).shape[1] for one in few)


def test_a_photograph_in_a_drawn_frame_keeps_its_bytes(tmp_path: Path) -> None:
    jpeg = encode_image(gradient(), "JPEG")
    page = [("text", 72, 760, "Above the photograph."), ("image", 72, 500, 200, 150, jpeg)]
    corners = [(72, 500), (68, 504), (68, 646), (72, 652), (272, 652), (276, 648), (276, 504), (272, 500), (72, 500)]
    segments = redrawn(make_pdf(tmp_path / "a.pdf", [page]), lambda page: stroke(page, *corners))
    assert segments == [TextSegment("Above the photograph.\n"), ImageSegment(jpeg)]


def test_a_page_without_text_is_a_picture_of_itself(tmp_path: Path) -> None:
    document = pdfium.PdfDocument.new()
    page = document.new_page(400, 800)
    draw(page, 0, 400, 200, 400)
    page.gen_content()
    document.save(tmp_path / "drawing.pdf")
    scan = make_pdf(tmp_path / "scan.pdf", [[("image", 0, 0, 595, 842, encode_image(gradient(), "JPEG"))]])
    (drawing,) = read_file(tmp_path / "drawing.pdf")[0][0].segments
    pixels = pixels_of(drawing)
    assert pixels.shape == (1024, 512, 3)
    np.testing.assert_allclose(pixels[100, 50], [255, 0, 0], atol=4)
    np.testing.assert_allclose(pixels[[600, 100], [50, 400]], 255, atol=4)
    (whole,) = read_file(scan)[0][0].segments
    assert max(pixels_of(whole).shape) == 1024


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_images_come_as_the_page_shows_them(tmp_path: Path, rotation: int) -> None:
    jpeg = encode_image(gradient(), "JPEG", quality=95)
    plain = make_pdf(tmp_path / "a.pdf", [[("text", 72, 760, "Some text."), ("image", 72, 500, 64, 48, jpeg)]])
    document = pdfium.PdfDocument(plain)
    document[0].set_rotation(rotation)
    document.save(tmp_path / "turned.pdf")
    images = [part for part in read_file(tmp_path / "turned.pdf")[0][0].segments if isinstance(part, ImageSegment)]
    expected = np.rot90(gradient(), -rotation // 90).astype(int)
    assert np.abs(pixels_of(images[0]) - expected).mean() < 4  # JPEG, once or twice


def test_a_mirrored_image_is_mirrored(tmp_path: Path) -> None:
    jpeg = encode_image(gradient(), "JPEG", quality=95)
    path = make_pdf(tmp_path / "a.pdf", [[("text", 72, 760, "Some text."), ("image", 200, 500, -64, 48, jpeg)]])
    images = [part for part in read_file(path)[0][0].segments if isinstance(part, ImageSegment)]
    assert np.abs(pixels_of(images[0]) - gradient()[:, ::-1].astype(int)).mean() < 4


def test_pages_beyond_the_limit_are_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_mm.ingest.pdf.MAX_PAGES", 1)
    path = make_pdf(tmp_path / "a.pdf", [[("text", 72, 760, f"Page {number}.")] for number in (1, 2)])
    documents, rejections = read_file(path)
    assert documents[0].segments == [TextSegment("Page 1.\n")]
    assert rejections[0].reason == "it has 2 pages: those after 1 are left out"


# Bad input of every kind


def truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.fixture
def good(tmp_path: Path) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    pdf = make_pdf(tmp_path / "good.pdf", [[("text", 72, 700, "Some text.")]]).read_bytes()
    return {
        "txt": b"some text\n",
        "html": b"<html><body>some text</body></html>",
        "jsonl": b'{"text": "some text"}\n',
        "jpg": encode_image(gradient(), "JPEG"),
        "png": png(rng),
        "webp": encode_image(gradient(), "WEBP"),
        "wav": encode_wav(tone(rng, 40_000)[None]),
        "flac": encode_audio(tone(rng, 40_000)[None], SAMPLE_RATE, "flac", "flac"),
        "mp3": encode_audio(tone(rng, 40_000)[None], SAMPLE_RATE, "mp3", "libmp3lame"),
        "ogg": encode_audio(tone(rng, 40_000)[None], SAMPLE_RATE, "ogg", "libopus"),
        "pdf": pdf,
    }


def reason_of(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    documents, rejections = read_file(path)
    assert not documents
    assert rejections, f"{path.name} was accepted without a document"
    assert str(path) in rejections[0].path
    return rejections[0].reason


def test_the_good_ones_are_read(good: dict[str, bytes], tmp_path: Path) -> None:
    for suffix, data in good.items():
        (tmp_path / f"file.{suffix}").write_bytes(data)
        documents, rejections = read_file(tmp_path / f"file.{suffix}")
        assert len(documents) == 1, suffix
        assert not rejections, suffix


def test_an_empty_file_of_every_kind_is_rejected(good: dict[str, bytes], tmp_path: Path) -> None:
    for suffix in good:
        assert reason_of(tmp_path / f"empty.{suffix}", b"") == "the file is empty"


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "wav", "flac", "pdf", "jsonl"])
def test_a_truncated_file_is_rejected(good: dict[str, bytes], tmp_path: Path, suffix: str) -> None:
    reason = reason_of(tmp_path / f"cut.{suffix}", truncated(good[suffix]))
    assert any(word in reason for word in ("damaged", "cut off", "cannot be read", "not JSON"))


def test_noise_named_as_any_kind_is_rejected(good: dict[str, bytes], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, 5_000).astype(np.uint8).tobytes()
    for suffix in good:
        assert reason_of(tmp_path / f"noise.{suffix}", noise)


def test_a_damaged_body_behind_a_good_header_is_rejected(good: dict[str, bytes], tmp_path: Path) -> None:
    for suffix in ("jpg", "png", "flac", "pdf"):
        data = good[suffix][:60] + bytes(len(good[suffix]) - 60)
        assert reason_of(tmp_path / f"zeros.{suffix}", data)


@pytest.mark.parametrize(
    ("name", "content"), [("jpg", "html"), ("txt", "png"), ("pdf", "jpg"), ("wav", "pdf"), ("png", "wav")]
)
def test_a_mislabelled_file_is_rejected_or_trusted(
    good: dict[str, bytes], tmp_path: Path, name: str, content: str
) -> None:
    path = tmp_path / f"wrong.{name}"
    assert "but its content is" in reason_of(path, good[content])
    documents, rejections = read_file(path, trust_content=True)
    assert len(documents) == 1
    assert not rejections


def test_what_holds_no_text_is_rejected(tmp_path: Path) -> None:
    assert "it is no text" in reason_of(tmp_path / "bytes.txt", b"\xff\xff\xff")
    (tmp_path / "blank.txt").write_bytes(b" \n\t\n ")
    with account.collected() as counted:
        assert read_file(tmp_path / "blank.txt") == ([], [])
    assert counted == {account.INPUTS: {"text": 1}, account.OTHERS: {"files of white space": 1}}
    assert "nothing to see" in reason_of(tmp_path / "blank.html", b"<html><body><script>x</script></body></html>")


def test_what_is_too_large_or_too_small_is_rejected(tmp_path: Path) -> None:
    for side in (9_000, 20_000):
        Image.new("1", (side, side)).save(tmp_path / "bomb.png")
        assert "the image is too large" in read_file(tmp_path / "bomb.png")[1][0].reason
    assert "nothing to see" in reason_of(tmp_path / "dot.png", encode_image(gradient()[:1, :1], "PNG"))
    assert "too few for one frame" in reason_of(tmp_path / "click.wav", encode_wav(np.zeros((1, 300))))


def test_an_encrypted_pdf_is_rejected(tmp_path: Path) -> None:
    encrypted = (
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj 2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\n"
        b"3 0 obj<</Filter/Standard/V 2/R 3/Length 128/P -44/O<" + b"00" * 32 + b">/U<" + b"11" * 32 + b">>>endobj\n"
        b"trailer<</Root 1 0 R/Encrypt 3 0 R/ID[<00><00>]>>\n%%EOF\n"
    )
    assert "cannot be read" in reason_of(tmp_path / "secret.pdf", encrypted)


# Encoding


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


def test_a_document_becomes_text_ids_and_runs_of_placeholders(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "a.png").write_bytes(png(rng))
    (tmp_path / "s.wav").write_bytes(encode_wav(tone(rng, 40_000)[None]))
    line = {"segments": [{"text": "the <|image|>"}, {"image": "a.png"}, {"audio": "s.wav"}, {"text": "hill"}]}
    (tmp_path / "l.jsonl").write_text(json.dumps(line))
    ((document,), _) = read_file(tmp_path / "l.jsonl")
    encoded = encode_document(document, tokenizer)
    ids = tokenizer.special_ids
    text, image, audio = tokenizer.encode("the <|image|>"), encoded.media[0], encoded.media[1]
    frames = 49 + 49 + audio_frames(8_000)
    expected = [*text, ids["image_start"], *[ids["image"]] * 196, ids["image_end"]]
    expected += [ids["audio_start"], *[ids["audio"]] * frames, ids["audio_end"], *tokenizer.encode("hill")]
    assert encoded.tokens.tolist() == [*expected, ids["end_of_text"]]
    assert (image.modality, image.token_offset, image.num_tokens) == ("image", len(text) + 1, 196)
    assert (audio.modality, audio.num_tokens) == ("audio", frames)


def test_a_long_recording_is_cut_between_seconds(tokenizer: TextTokenizer) -> None:
    from megatron_mm.ingest.document import Document

    samples = tone(np.random.default_rng(0), 16_000 * 5 + 9_000)
    segment = read_audio(encode_wav(samples[None]))
    encoded = encode_document(Document([segment], Source.AUDIO), tokenizer, max_audio_seconds=2)
    assert [item.num_tokens for item in encoded.media] == [98, 98, 49 + audio_frames(9_000)]
    clips = np.concatenate([decode_flac(item.data) for item in encoded.media])
    np.testing.assert_allclose(clips, decode_flac(segment.data), atol=1.01 / 32768)


def test_frames_follow_wav2vec2() -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    extractor = Wav2Vec2Model(Wav2Vec2Config(num_hidden_layers=1, hidden_size=32, num_attention_heads=2))
    for num_samples in (16_000, 15_999, 8_000, 720, 719, 400, 399):
        assert audio_frames(num_samples) == max(0, int(extractor._get_feat_extract_output_lengths(num_samples)))


def test_errors_of_media_are_data_errors() -> None:
    for read in (read_image, read_audio):
        with pytest.raises(DataError):
            read(b"neither")
    assert isinstance(read_audio(encode_wav(np.zeros((1, 500)))), AudioSegment)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a lake\n",
            "  Über den See\n",
            "2 boats\n",
            "# Title\n\ntext\n",
            "",
            " \n",
            "P1\n2 2\n0 1 1 0\n",
            "WARC/1.0\r\n",
        ),
        *(
            '{"text": "a"}\n{"text": "b"}\n',
            "{\\rtf1 a}",
            "%PDF-1.4\n",
            "<html><body>a</body></html>",
            "%!PS-Adobe-3.0\n",
        ),
        *(
            "/* XPM */\nstatic char *a[] = {",
            "a\0b",
            "a\x1b[0m",
            "From a@b.c Mon\n\n",
            "Subject: a\nFrom: b@c.d\n\ne\n",
        ),
        *("name,size\na,1\n", "import os\nos.getcwd()\n", "ID3 is a mark\n", "a\x7f", "\ufeffa lake\n"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".csv", ".json", ".xml"])
def test_short_prose_is_what_libmagic_and_the_rest_would_say(
    tmp_path: Path, text: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(text, newline="")

    def said() -> object:
        try:
            return detect(path)
        except DataError as error:
            return str(error)

    short = said()
    monkeypatch.setattr("megatron_mm.ingest.detect._is_prose", lambda path: False)
    # libmagic takes any text that begins with the mark of an MP3 for one.
    assert short == (kinds.TEXT if text.startswith("ID3 is") else said())


@pytest.mark.parametrize("name", ["big.bin", "big.txt", "big.xml", "big", "big.gz"])
def test_a_file_that_is_too_large_is_not_read_to_find_that_out(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(10 * 2**30)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read"))
    documents, (rejection,) = read_file(tmp_path / name)
    assert not documents
    assert "10,737,418,240 bytes" in rejection.reason or "its content is application/octet-stream" in rejection.reason


@pytest.mark.parametrize(("seconds", "more"), [(5, None), (15, 1)])
def test_a_long_recording_is_given_time(seconds: int, more: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr("megatron_mm.ingest.audio.LONG_SECONDS", 10.0)
    monkeypatch.setattr("megatron_mm.ingest.audio.restart_limits", given.append)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, 44_100, 0, "NONE", ""))
        file.writeframes(bytes(2 * 44_100 * seconds))
    assert read_audio(buffer.getvalue()).num_samples == seconds * SAMPLE_RATE
    assert given == ([] if more is None else [more])


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("count", [1, 399, 44_100, 100_003])
def test_sound_that_is_resampled_in_parts_is_as_resampled_at_once(rate: int, count: int) -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, count).astype(np.float32)
    parts = Resampled()
    parts.rate = rate
    for start in range(0, count, 1_152):
        parts.add(samples[start : start + 1_152])
    np.testing.assert_array_equal(parts.finish(), soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ"))
