"""Lay the sample data out as the publishers of large corpora do: what examples/mixture.sh begins with.

    python examples/make_corpora.py build/corpora

Writes six small corpora: common_crawl/ (a WARC.gz of the web pages), laion/ (what img2dataset leaves: a tar of images
with captions, its table and its statistics), librispeech/ (FLAC files and lists of their words), podcast/ (one long
recording of all speech, with a WebVTT of what is said when), papers/ (PDFs) and c4/ (the prose as gzipped JSON lines).
"""

import argparse
import gzip
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from megatron_mm import endings
from megatron_mm.ingest.audio import read_audio
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, decode_flac, encode_flac
from megatron_mm.storage import replacing

SAMPLE = Path(__file__).parent / "sample_data" / "train"
LICENCE = "see examples/sample_data/LICENSES"
PAUSE_SECONDS = 1
PASSAGE_CHARACTERS = 6_000
"""The prose is cut at paragraphs into passages of about so many, as a crawl has pages."""


def main() -> int:
    """Read the command line and write the corpora."""
    parser = endings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the corpora go")
    return endings.run(lambda: make(parser.parse_args().folder))


def make(folder: Path) -> None:
    """Write all corpora below a folder."""
    makers = (common_crawl, laion, librispeech, podcast, papers, c4)
    for maker in tqdm(makers, desc="corpora", unit="corpus"):
        target = folder / maker.__name__
        target.mkdir(parents=True, exist_ok=True)
        maker(target)


def common_crawl(folder: Path) -> None:
    """Write the web pages as a WARC.gz: a gzip member a record, as Common Crawl ships them."""
    with replacing(folder / "CC-MAIN-20260101000000-00000.warc.gz") as file:
        file.write(gzip.compress(record("warcinfo", b"software: megatron_mm examples\r\n")))
        for number, page in enumerate(sorted((SAMPLE / "web").glob("*.html"))):
            url = f"https://example.org/{page.name}"
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=UTF-8\r\n\r\n"
            file.write(gzip.compress(record("request", b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", url, number)))
            file.write(gzip.compress(record("response", head + page.read_bytes(), url, number)))


def record(kind: str, body: bytes, url: str = "", number: int = 0) -> bytes:
    """Return a WARC record (ISO 28500)."""
    types = {"warcinfo": "application/warc-fields"}
    lines = [
        "WARC/1.0",
        f"WARC-Type: {kind}",
        f"WARC-Record-ID: <urn:uuid:00000000-0000-0000-0000-{number:012d}>",
        "WARC-Date: 2026-01-01T00:00:00Z",
        *([f"WARC-Target-URI: {url}"] if url else []),
        f"Content-Type: {types.get(kind, f'application/http; msgtype={kind}')}",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body + b"\r\n\r\n"


def laion(folder: Path) -> None:
    """Write the captioned photographs as img2dataset does; one download of its table has failed."""
    rows = []
    with replacing(folder / "00000.tar") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for number, photo in enumerate(sorted((SAMPLE / "photos").glob("*.jpg"))):
            caption = photo.with_suffix(".txt").read_text().strip()
            url = f"https://example.org/{photo.name}"
            row = {"url": url, "caption": caption, "key": f"{number:09d}", "status": "success", "license": LICENCE}
            rows.append(row)
            for suffix, data in (
                ("jpg", photo.read_bytes()),
                ("txt", caption.encode()),
                ("json", json.dumps(row).encode()),
            ):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    failed = {"url": "https://example.org/gone.jpg", "caption": "a photograph that is gone", "key": f"{len(rows):09d}"}
    rows.append(failed | {"status": "failed_to_download", "license": LICENCE})
    with replacing(folder / "00000.parquet") as file:
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    with replacing(folder / "00000_stats.json") as file:
        file.write(json.dumps({"count": len(rows), "successes": len(rows) - 1, "failed_to_download": 1}).encode())


def speech() -> Iterator[tuple[np.ndarray, str]]:
    """Yield (samples at 16 kHz, words) of each recording."""
    for text in sorted((SAMPLE / "speech").glob("*.txt")):
        recording = next(path for path in sorted(text.parent.glob(f"{text.stem}.*")) if path != text)
        yield decode_flac(read_audio(recording.read_bytes()).data), text.read_text().strip()


def librispeech(folder: Path) -> None:
    """Write each recording as FLAC, and the words of a chapter in one list."""
    chapter = folder / "84" / "121123"
    chapter.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (samples, words) in enumerate(speech()):
        name = f"84-121123-{number:04d}"
        with replacing(chapter / f"{name}.flac") as file:
            file.write(encode_flac(samples))
        lines.append(f"{name} {words.upper()}\n")
    with replacing(chapter / "84-121123.trans.txt") as file:
        file.write("".join(lines).encode())


def podcast(folder: Path) -> None:
    """Write all recordings as one episode, and a WebVTT of when what is said."""
    parts, cues, seconds = [], [], 0.0
    for samples, words in speech():
        end = seconds + len(samples) / SAMPLE_RATE
        cues.append(f"{clock(seconds)} --> {clock(end)}\n{' '.join(words.split())}\n")
        parts += [samples, np.zeros(PAUSE_SECONDS * SAMPLE_RATE, np.float32)]
        seconds = end + PAUSE_SECONDS
    with replacing(folder / "episode-1.flac") as file:
        file.write(encode_flac(np.concatenate(parts)))
    with replacing(folder / "episode-1.vtt") as file:
        file.write(("WEBVTT\n\n" + "\n".join(cues)).encode())


def clock(seconds: float) -> str:
    """Return seconds as WebVTT writes them."""
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes) // 60:02d}:{int(minutes) % 60:02d}:{rest:06.3f}"


def papers(folder: Path) -> None:
    """Copy the PDFs."""
    for paper in sorted((SAMPLE / "papers").glob("*.pdf")):
        with replacing(folder / paper.name) as file:
            file.write(paper.read_bytes())


def c4(folder: Path) -> None:
    """Write the prose as C4 ships pages: gzipped JSON lines under the name .json.gz."""
    with replacing(folder / "c4-train.00000-of-00001.json.gz") as file, gzip.GzipFile(fileobj=file, mode="wb") as lines:
        for text in sorted((SAMPLE / "prose").glob("*.txt")):
            for number, passage in enumerate(passages(text.read_text())):
                url = f"https://example.org/{text.stem}/{number}"
                said = {"text": passage, "timestamp": "2026-01-01T00:00:00Z", "url": url}
                lines.write(json.dumps(said).encode() + b"\n")


def passages(text: str) -> Iterator[str]:
    """Yield a text in passages of whole paragraphs."""
    passage = ""
    for paragraph in text.split("\n\n"):
        passage += paragraph + "\n\n"
        if len(passage) >= PASSAGE_CHARACTERS:
            yield passage
            passage = ""
    if passage.strip():
        yield passage


if __name__ == "__main__":
    sys.exit(main())
