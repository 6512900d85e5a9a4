"""Another file type is one file, its reader, and one line."""

import json

from house import House
from small import save_tokenizer

LINE = 'SUBTITLES = Kind("subtitles", Source.TEXT, (".srt",), reader="subtitles.read_subtitles", textual=True)\n\n'
CUES = "1\r\n00:00:01,000 --> 00:00:02,500\r\nthe lake\r\n\r\n2\r\n00:00:03,000 --> 00:00:04,000\r\nand the hill\r\n"


def test_subtitles_are_read(tmp_path) -> None:
    house = House.build(tmp_path / "house")
    house.add("subtitles.py", "ingest/subtitles.py")
    house.change("ingest/kinds.py", "KINDS = tuple(", LINE + "KINDS = tuple(")
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.srt").write_bytes(CUES.encode())
    (files / "b.srt").write_text("no cue at all\n")
    tokenizer = str(save_tokenizer(tmp_path / "tokenizer.json"))
    shown = house.tool("inspect_data", "--input", str(files / "a.srt"), "--tokenizer", tokenizer)
    assert "the lake\nand the hill" in shown and "-->" not in shown
    prefix = tmp_path / "shards" / "p"
    arguments = ("--input", str(files), "--output-prefix", str(prefix), "--tokenizer", tokenizer)
    said = house.tool("preprocess_data", *arguments, "--bad-input", "skip")
    assert "1 documents" in said
    (rejected,) = map(json.loads, (tmp_path / "shards" / "p.rejected.jsonl").read_text().splitlines())
    assert rejected["path"].endswith("b.srt") and "it holds no cue" in rejected["reason"]
