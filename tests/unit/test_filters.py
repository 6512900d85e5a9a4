"""Filters of preprocessing: what they leave out ends no run and is listed with its reason, however it was read."""

import json
from pathlib import Path

import pytest
from small import save_tokenizer

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest import work_items
from megatron_mm.ingest.pipeline import preprocess
from megatron_mm.ingest.work_items import Options
from megatron_mm.shards import ShardReader
from megatron_mm.tokenizer import TextTokenizer

ENGLISH = "The committee met on Tuesday and agreed that the report should be published before the end of the year."
GERMAN = "Der Ausschuss tagte am Dienstag und beschloss, den Bericht noch vor dem Ende des Jahres zu veröffentlichen."


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(work_items, "LINES_BYTES", 700)  # the lines are read as those of a large file
    save_tokenizer(tmp_path / "tokenizer.json")
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [ENGLISH, GERMAN, "ok", ENGLISH * 9, "12 34 " * 40]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    (folder / "b.txt").write_text(GERMAN)
    (folder / "c.txt").write_text(ENGLISH)
    return folder


def run(corpus: Path, options: Options) -> tuple[list[str], dict[str, str]]:
    """Return the texts that stay, and the reasons of the others."""
    prefix = corpus.parent / "out" / "p"
    tokenizer = corpus.parent / "tokenizer.json"
    report = preprocess([str(corpus)], output_prefix=str(prefix), tokenizer_path=str(tokenizer), options=options)
    reader, decode = ShardReader(prefix), TextTokenizer(tokenizer).decode
    assert report.counts.rejected == len(report.rejections)
    texts = [decode(reader.tokens(number)[:-1].tolist()) for number in range(reader.num_documents)]
    return texts, {Path(entry.path).name: entry.reason for entry in report.rejections}


def test_texts_of_other_languages_are_left_out(corpus: Path) -> None:
    texts, reasons = run(corpus, Options(languages=("en", "fr")))
    assert texts == [ENGLISH, "ok", ENGLISH * 9, "12 34 " * 40, ENGLISH]
    assert reasons == {"a.jsonl:2": "filter language: it is de", "b.txt": "filter language: it is de"}


def test_short_and_long_documents_are_left_out(corpus: Path) -> None:
    lengths = [len(TextTokenizer(corpus.parent / "tokenizer.json").encode(text)) + 1 for text in (ENGLISH, GERMAN)]
    texts, reasons = run(corpus, Options(min_tokens=min(lengths), max_tokens=max(lengths)))
    assert sorted(set(texts)) == sorted([ENGLISH, GERMAN]) and len(texts) == 4
    assert reasons.keys() == {"a.jsonl:3", "a.jsonl:4", "a.jsonl:5"}
    assert reasons["a.jsonl:3"].startswith("filter length: ") and "fewer than" in reasons["a.jsonl:3"]
    assert f"more than {max(lengths)}" in reasons["a.jsonl:4"]


def test_an_unknown_language_is_said(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"--languages xx: not known; use some of .*\bde\b"):
        run(corpus, Options(languages=("en", "xx")))


def test_filters_keep_the_documents_around_what_they_leave_out(corpus: Path) -> None:
    lines = [json.dumps({"text": text}) for text in (GERMAN, ENGLISH)]
    lines.insert(1, json.dumps({"segments": [{"text": ENGLISH}]}))
    (corpus / "a.jsonl").write_text("\n".join([*lines, "{broken"]))
    # What a filter finds hides nothing that is bad.
    with pytest.raises(DataError, match=r"a\.jsonl: line 4|a\.jsonl:4"):
        run(corpus, Options(languages=("en",)))
    (corpus / "a.jsonl").write_text("\n".join(lines))
    texts, reasons = run(corpus, Options(languages=("en",)))
    assert texts == [ENGLISH] * 3 and reasons.keys() == {"a.jsonl, document 1", "b.txt"}
