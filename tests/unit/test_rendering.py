"""What the model sees of a document, on a terminal and on a page: every token and every media item, at its place."""

import base64
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small import png, save_tokenizer, tone

from megatron_mm.data.media import reference_decoders
from megatron_mm.data.rendering import cut_document, render_page, render_text, runs
from megatron_mm.ingest.document import AudioSegment, Document, ImageSegment, TextSegment
from megatron_mm.ingest.encode import encode_document
from megatron_mm.modalities import default_geometries
from megatron_mm.modalities.audio.spec import encode_flac
from megatron_mm.modalities.image.decode import decode_pixels
from megatron_mm.shards import EncodedDocument, MediaItem, ShardReader, ShardWriter
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "inspect_data.py"
DECODERS = reference_decoders(default_geometries())
PICTURE = png(np.random.default_rng(0))
TEXTS = ("before <b> & 漢字 \U0001f600 ", " after\nthe end")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"))


@pytest.fixture(scope="module")
def document(tokenizer: TextTokenizer) -> EncodedDocument:
    sound = AudioSegment(encode_flac(tone(np.random.default_rng(0), 24_000)), 24_000)
    segments = [TextSegment(TEXTS[0]), ImageSegment(PICTURE), sound, TextSegment(TEXTS[1])]
    return encode_document(Document(segments, Source.IMAGE), tokenizer)


def test_runs_cover_every_token_once(document: EncodedDocument, tokenizer: TextTokenizer) -> None:
    found = list(runs(document, tokenizer))
    assert [run.position for run in found] == np.cumsum([0, *(run.num_tokens for run in found[:-1])]).tolist()
    assert sum(run.num_tokens for run in found) == len(document.tokens)
    assert [run.media for run in found if run.media is not None] == list(document.media)
    assert "".join(run.text for run in found if not run.is_special) == "".join(TEXTS)


def test_a_terminal_gets_the_text_and_a_line_for_each_item(document: EncodedDocument, tokenizer: TextTokenizer) -> None:
    text = render_text(document, tokenizer)
    first = document.media[0].token_offset
    assert f"[image, {len(PICTURE):,} bytes, tokens {first} to {first + 196} (196)]" in text
    assert "after\nthe end" in text
    assert "269 are placeholders: 1 image, 1 audio" in text.replace("\n", " ")


def test_a_page_shows_what_the_encoders_get(document: EncodedDocument, tokenizer: TextTokenizer) -> None:
    page = render_page([("a <title>", document)], tokenizer, decoders=DECODERS)
    assert "a &lt;title&gt;" in page
    assert "http" not in page, "the page is whole in itself"
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 1 + 2, "an image, and two chunks of sound"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))))
    np.testing.assert_array_equal(shown, decode_pixels(PICTURE, 224).permute(1, 2, 0).numpy())
    assert base64.b64encode(document.media[1].data).decode() in page
    spans = re.sub(r"<figure>.*?</figcaption></figure>", "", page, flags=re.DOTALL)
    text = re.sub(r"<[^>]+>", "", spans.partition('<div class="tokens">')[2])
    assert "before &lt;b&gt; &amp; 漢字 \U0001f600" in text
    broken = EncodedDocument(document.tokens, document.source, [MediaItem("image", b"no", 30, 196)])
    assert "cannot be decoded" in render_page([("", broken)], tokenizer, decoders=DECODERS)


def test_the_tool_shows_files_documents_and_samples(
    document: EncodedDocument, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "p", tokenizer=tokenizer.info) as writer:
        writer.add(document)
    shard = ShardReader(tmp_path / "p")
    assert render_text(shard.document(0), tokenizer) == render_text(document, tokenizer)
    first = document.media[0].token_offset
    piece = cut_document(document, first - 1, first + 196)
    assert len(piece.media) == 1
    save_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("a text to see\n")
    command = [sys.executable, TOOL, "--tokenizer", tmp_path / "tokenizer.json"]
    shards = ["--shards", tmp_path / "p", "--sample", "0", "--seq-len", "1024", "--html", tmp_path / "p.html"]
    shown = subprocess.run([*command, "--input", tmp_path / "a.txt"], capture_output=True, text=True, check=True)
    assert "a text to see" in shown.stdout
    subprocess.run([*command, *shards], check=True)
    assert (tmp_path / "p.html").read_text().count("<audio") == 1
