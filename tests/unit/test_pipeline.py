"""The preprocessing tool: the same shards from any number of workers, every input accounted for, nothing half done."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from corpora import Serial
from launch import run_until_end
from small import png, save_tokenizer, sentence

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest import account, pipeline, records, work_items
from megatron_mm.ingest.fields import DEFAULTS, MEDIA_NAMES, OTHER_FIELDS
from megatron_mm.ingest.find import find_files
from megatron_mm.ingest.lines import encode_documents, encode_lines
from megatron_mm.ingest.pipeline import preprocess, read_texts
from megatron_mm.ingest.plan import Share
from megatron_mm.ingest.records import read_lines
from megatron_mm.ingest.report import Report, merge_reports
from megatron_mm.ingest.work_items import Options
from megatron_mm.ingest.workers import Limits, Workers
from megatron_mm.shards import ShardReader, merge, open_shards, writer
from megatron_mm.shards.writer import CheckedFile
from megatron_mm.tokenizer import HARD_TEXTS, TextTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
OUTPUTS = {"p.bin", "p.idx", "p.crc", "p.media.bin", "p.media.idx", "p.json", "p.tokenizer", "p.rejected.jsonl"}
OUTPUTS |= {"p.origin.parquet", "p.report.json"}


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder of good files of several kinds, and a tokenizer beside it."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "in"
    (folder / "deep" / ".hidden").mkdir(parents=True)
    save_tokenizer(tmp_path / "tokenizer.json")
    for number in range(6):
        (folder / f"{number}.txt").write_text(sentence(rng, 50))
    lines = "".join(json.dumps({"text": sentence(rng, 20)}) + "\n" for _ in range(500))
    (folder / "deep" / "lines.jsonl").write_text(lines)
    (folder / "deep" / "photo.png").write_bytes(png(rng))
    (folder / "deep" / "photo.txt").write_text("a red house by the lake\n")
    (folder / "deep" / "alone.png").write_bytes(png(rng))
    (folder / "deep" / ".hidden" / "secret.txt").write_text("not for you")
    return folder


def run(inputs: Path, prefix: Path, tokenizer: Path | None = None, **options) -> Report:
    """Preprocess one path with the tokenizer that lies beside it."""
    tokenizer = tokenizer or inputs.parent / "tokenizer.json"
    return preprocess([str(inputs)], output_prefix=str(prefix), tokenizer_path=str(tokenizer), **options)


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shards_do_not_depend_on_the_workers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_items, "LINES_BYTES", 4_000)
    reports = [run(corpus, tmp_path / str(workers) / "p", workers=workers) for workers in (1, 3)]
    assert reports[0] == reports[1]
    assert reports[0].num_inputs > 10, "the lines are cut into ranges"
    assert outputs(tmp_path / "1") == outputs(tmp_path / "3")
    assert outputs(tmp_path / "1").keys() == OUTPUTS
    assert reports[0].counts.documents == 6 + 500 + 2


def test_a_caption_follows_its_image(corpus: Path, tmp_path: Path) -> None:
    (corpus / "deep" / "lines.jsonl").unlink()
    report = run(corpus / "deep", tmp_path / "p", tmp_path / "tokenizer.json")
    assert (report.counts.documents, report.counts.media) == (2, {"image": 2})
    alone, captioned = (ShardReader(tmp_path / "p").tokens(number).tolist() for number in (0, 1))
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    assert captioned == [*alone[:-1], *tokenizer.encode("a red house by the lake\n"), alone[-1]]


def test_bad_inputs_end_the_run_unless_they_are_skipped(corpus: Path, tmp_path: Path) -> None:
    (corpus / "7.txt").write_bytes(b"")
    (corpus / "9.png").write_bytes(b"GIF89a")
    (corpus / "8.txt").write_bytes(b"\xff\xff\xff")
    with pytest.raises(DataError, match=r"8\.txt: .*Mend it, or leave out what cannot be read with --bad-input skip"):
        run(corpus, tmp_path / "out" / "p")
    assert outputs(tmp_path / "out") == {}
    report = run(corpus, tmp_path / "out" / "p", skip_bad=True)
    assert report.counts.documents == 508
    listed = [json.loads(line) for line in (tmp_path / "out" / "p.rejected.jsonl").read_text().splitlines()]
    assert [Path(entry["path"]).name for entry in listed] == ["8.txt", "9.png"]
    assert all(entry["reason"] for entry in listed)


def test_every_line_is_accounted_for(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_items, "LINES_BYTES", 3_000)
    path = corpus / "deep" / "lines.jsonl"
    lines = path.read_text().splitlines()
    bad = [7, 130, 131, 499]
    for number in bad:
        lines[number] = lines[number][:-5]
    path.write_text("\n".join(lines))
    report = run(corpus, tmp_path / "out" / "p", skip_bad=True, workers=2)
    assert report.counts.documents == 508 - len(bad)
    assert [rejection.path for rejection in report.rejections] == [f"{path}:{number + 1}" for number in bad]


def test_a_reader_that_loses_a_document_ends_the_run_whatever_is_skipped(
    corpus: Path, tmp_path: Path, monkeypatch
) -> None:
    real = pipeline.read_work
    monkeypatch.setattr(pipeline, "Workers", Serial)
    monkeypatch.setattr(pipeline, "read_work", lambda item, options: (real(item, options)[0][1:], []))
    with pytest.raises(AssertionError, match="1 inputs are not 0 documents, 0 rejected and 0 that are no documents"):
        run(corpus, tmp_path / "out" / "p", skip_bad=True)
    assert not list((tmp_path / "out").glob("*.json"))


def test_nothing_to_read_is_said(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: --input takes files and folders"):
        run(tmp_path / "none", tmp_path / "p")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no files under"):
        find_files([str(tmp_path / "empty")])
    (tmp_path / "empty" / "x.txt").touch()
    with pytest.raises(DataError, match=r"none of the 1 files gave a document \(set aside: an empty file 1\)"):
        run(tmp_path / "empty", tmp_path / "p", skip_bad=True)


def test_a_reader_that_dies_takes_only_its_input(corpus: Path, tmp_path: Path) -> None:
    # A name that the worker is told to die at stands for a parser that crashes the process.
    (corpus / "3.txt").write_text("die here")
    options = DyingOptions()
    report = run(corpus, tmp_path / "out" / "p", skip_bad=True, workers=2, options=options)
    assert [Path(rejection.path).name for rejection in report.rejections] == ["3.txt"]
    assert report.rejections[0].reason == "the process that read it died (SIGKILL)"
    assert report.counts.documents == 507


class DyingOptions(Options):
    """Options whose arrival in a worker makes it die at the text 'die here'."""

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        real = pipeline.read_work

        def read(item, options):
            if item.path.read_bytes() == b"die here":
                os.kill(os.getpid(), signal.SIGKILL)
            return real(item, options)

        pipeline.read_work = read


def nested_forms(depth: int = 9, width: int = 10) -> bytes:
    """A PDF of 2 kB that draws one form width ** depth times."""
    streams = [b"/F Do " * width] * depth + [b"0 0 1 1 re f"]
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"<</Type/Pages/Kids[3 0 R]/Count 1>>"]
    objects.append(b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Contents 4 0 R/Resources<</XObject<</F 5 0 R>>>>>>")
    for number, stream in enumerate(streams, start=4):
        form = b"/Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</XObject<</F %d 0 R>>>>" % (number + 1)
        objects.append(b"<<%s/Length %d>>stream\n%s\nendstream" % (form, len(stream), stream))
    body = b"".join(b"%d 0 obj\n%s\nendobj\n" % (number, content) for number, content in enumerate(objects, start=1))
    return b"%PDF-1.7\n" + body + b"trailer<</Root 1 0 R>>\n%%EOF\n"


def test_a_file_that_explodes_in_its_parser_is_a_rejection(tmp_path: Path) -> None:
    (tmp_path / "bomb.pdf").write_bytes(nested_forms())
    (tmp_path / "good.pdf").write_bytes(nested_forms(depth=1))
    legacy = Path(__file__).parent / "legacy_office" / "memo.doc"
    items = [work_items.WorkItem(path) for path in (tmp_path / "bomb.pdf", tmp_path / "good.pdf", legacy)]
    limits = Limits(wall_seconds=30.0, cpu_seconds=2, memory_gib=0.5)
    with Workers(1, make_reader, limits=limits, split=work_items.cut_work) as workers:
        (_, bomb), (_, (documents, rejections)), (_, (memos, _)) = workers.run(items)
    assert any(words in bomb.reason for words in ("GiB of memory", "died", "CPU time"))
    assert len(documents) == len(memos) == 1, rejections


def make_reader():
    return lambda item: work_items.read_work(item, work_items.DEFAULTS)


def run_until_killed(corpus: Path, prefix: Path, *, events: int, delay: float) -> int:
    """Run in a process that is killed `delay` seconds after so many writes, syncs and renames; return its status."""
    return run_until_end(run_and_die, corpus, prefix, events, delay, work_items.LINES_BYTES, writer.COMMIT_BYTES)


def run_and_die(corpus: Path, prefix: Path, events: int, delay: float, lines_bytes: int, commit_bytes: int) -> None:
    remaining = [events]

    def count(function):
        def counted(*arguments, **options):
            remaining[0] -= 1
            if remaining[0] == 0:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return function(*arguments, **options)

        return counted

    work_items.LINES_BYTES, writer.COMMIT_BYTES = lines_bytes, commit_bytes
    os.fsync, os.replace, CheckedFile.write = count(os.fsync), count(os.replace), count(CheckedFile.write)
    pipeline.Workers = Serial
    run(corpus, prefix, skip_bad=True)
    os._exit(0)  # before the timer, if it has been started


def test_runs_killed_at_20_random_moments_end_in_the_bytes_of_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work_items, "LINES_BYTES", 20_000)
    monkeypatch.setattr(writer, "COMMIT_BYTES", 30_000)
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    rng = np.random.default_rng(0)
    (corpus / "8.txt").write_bytes(b"\xff\xff\xff")
    lines = [json.dumps({"text": sentence(rng, 200)}) + ("," if number % 97 == 0 else "") for number in range(2_000)]
    (corpus / "long.jsonl").write_text("\n".join(lines[:1_000]))
    (corpus / "packed.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[1_000:]).encode()))
    prefix = tmp_path / "out" / "p"
    kills, finished, resumed = 0, 0, set()
    while kills < 20:
        status = run_until_killed(corpus, prefix, events=int(rng.integers(1, 120)), delay=float(rng.uniform(0, 0.004)))
        assert status in (0, -signal.SIGKILL)
        finished, kills = finished + (status == 0), kills + (status != 0)
        journal = Path(f"{prefix}.journal.partial")
        resumed.add(len(journal.read_bytes().splitlines()) if journal.exists() else 0)
        if not Path(f"{prefix}.json").exists():
            with pytest.raises(DataError, match="is missing"):
                ShardReader(prefix)
    assert len(resumed) > 5, "the runs are killed at different moments of their work"
    assert finished <= 3, "most runs are killed"
    report = run(corpus, prefix, skip_bad=True)
    assert run(corpus, tmp_path / "alone" / "p", skip_bad=True) == report
    assert outputs(tmp_path / "out") == outputs(tmp_path / "alone")
    assert outputs(tmp_path / "out").keys() == OUTPUTS
    assert report.counts.rejected == 1 + 21


def test_what_was_begun_with_other_inputs_is_not_gone_on_with(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "COMMIT_BYTES", 1)
    assert run_until_killed(corpus, tmp_path / "out" / "p", events=40, delay=0.0) == -signal.SIGKILL
    (corpus / "0.txt").write_text("something else")
    run(corpus, tmp_path / "out" / "p")
    run(corpus, tmp_path / "alone" / "p")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "alone")


def test_the_workers_of_a_killed_tool_leave_and_the_next_run_ends_it(corpus: Path, tmp_path: Path) -> None:
    (corpus / "long.jsonl").write_text("".join(json.dumps({"text": "lake " * 200}) + "\n" for _ in range(20_000)))
    command = [sys.executable, TOOL, "--input", corpus, "--output-prefix", tmp_path / "out" / "p"]
    command += ["--tokenizer", tmp_path / "tokenizer.json", "--workers", "2"]
    tool = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    tokens = tmp_path / "out" / "p.bin.partial"
    while not (tokens.exists() and tokens.stat().st_size) and tool.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    tool.kill()
    tool.wait()
    assert_group_ends(tool.pid)
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "20508 documents" in finished.stdout
    ShardReader(tmp_path / "out" / "p").verify()
    assert outputs(tmp_path / "out").keys() == OUTPUTS


@pytest.mark.parametrize("tasks", [1, 3, 11])
def test_the_shares_of_an_array_are_the_whole(corpus: Path, tmp_path: Path, monkeypatch, tasks: int) -> None:
    monkeypatch.setattr(work_items, "LINES_BYTES", 9_000)
    monkeypatch.setattr(pipeline, "Workers", Serial)
    run(corpus, tmp_path / "whole")
    for task in range(tasks):
        run(corpus, tmp_path / "p", share=Share(task, tasks))
    parts = sorted(path.with_suffix("") for path in tmp_path.glob("p-*.json") if ".report" not in path.name)
    if tasks > 1:
        merge(tmp_path / "p", list(map(str, parts)))
        assert merge_reports(str(tmp_path / "p"), list(map(str, parts))) == tasks
        together, alone = (json.loads((tmp_path / f"{name}.report.json").read_text()) for name in ("p", "whole"))
        assert [together[key] for key in ("files", "counts", "account")] == [
            alone[key] for key in ("files", "counts", "account")
        ]
    shards, (whole,) = open_shards([str(tmp_path / "p")]), open_shards([str(tmp_path / "whole")])
    assert len(shards) == tasks
    tokens = [shard.tokens(number).tolist() for shard in shards for number in range(shard.num_documents)]
    assert tokens == [whole.tokens(number).tolist() for number in range(whole.num_documents)]


LINES = [
    *(
        '{"text": "plain"}',
        '{"text": "ünïcödé \\u00e9\\ud83d\\ude00 \\\\ \\n"}',
        ' {"a": [1, {"b": null}], "text": " x "} ',
        "",
        "  ",
    ),
    *(
        '{"text": ""}',
        '{"text": "  "}',
        '{"text": null}',
        '{"text": 3}',
        '{"txt": "a"}',
        "[]",
        '"text"',
        "3",
        "{",
        "nul",
        "{}{}",
    ),
    *(
        '{"text": "half \\ud800 pair"}',
        '{"text": "a", "text": "b"}',
        '{"text": "n", "n": NaN}',
        '{"text": "x", "i": 1e999}',
    ),
    *(
        '{"text": "zero \\u0000"}',
        '{"text": "i", "i": 123456789012345678901234567890}',
        '\ufeff{"text": "marked"}',
        '{"text": "cr"}\r',
    ),
    *(
        '{"segments": [{"text": "one "}, {"text": "two"}]}',
        '{"image": "none.png", "text": "x"}',
        '{"segments": 3}',
        '{"text": "\t"}',
    ),
]
"""Lines of every kind that JSON and its readers disagree on."""


def test_the_short_way_reads_lines_as_the_long_one(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(
        b"\n".join([line.encode() for line in LINES] + [b'{"text": "\xff"}', b'{"text": "\0"}', b'{"text": "end"}'])
    )
    tokenizer = TextTokenizer(tmp_path / "tokenizer.json")
    whole = work_items.WorkItem(path, start=0, stop=path.stat().st_size)
    documents, rejected = read_lines(path)
    names = ["x"] * len(documents)
    expected, failed = encode_documents(documents, tokenizer, work_items.DEFAULTS, names=names, file=str(path))
    batch, rejections = encode_lines(whole, tokenizer, work_items.DEFAULTS)
    np.testing.assert_array_equal(batch.tokens, expected.tokens)
    np.testing.assert_array_equal(batch.lengths, expected.lengths)
    assert batch.origins.to_line() == expected.origins.to_line()
    assert len(batch.lengths) > 8 and len(rejections) > 12
    assert [rejection for rejection in rejections if "surrogate" not in rejection.reason] == rejected
    assert len(rejections) == len(rejected) + len(failed)
    assert {"segments", *MEDIA_NAMES} <= OTHER_FIELDS, "a line with media takes the long way"


def test_a_tokenizer_that_starts_to_differ_ends_the_run(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pipeline, "Workers", Serial)
    monkeypatch.setattr(TextTokenizer, "_agrees", lambda self, fast, text: text in HARD_TEXTS)
    with pytest.raises(DataError, match="give different ids for .* Use --tokenizer-engine reference"):
        run(corpus, tmp_path / "out" / "p", skip_bad=True)
    run(corpus, tmp_path / "out" / "p", skip_bad=True, engine="reference")


def test_text_alone_needs_neither_torch_nor_readers_of_media(corpus: Path, tmp_path: Path) -> None:
    imported = "import sys, megatron_mm.ingest.pipeline; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", imported], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "av", "PIL", "pypdfium2", "lxml", "transformers"} & set(modules)


def assert_group_ends(group: int) -> None:
    """Pass when no process of the group is left: the workers of a killed run leave by themselves."""
    deadline = time.monotonic() + 20
    while True:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "the workers of a killed run go on"
        time.sleep(0.1)


def test_texts_come_in_a_fixed_order(corpus: Path) -> None:
    texts = list(read_texts([str(corpus)]))
    assert texts == list(read_texts([str(corpus)]))
    assert len(texts) == 6 + 500 + 1


ROWS = [
    *({"text": "plain"}, {"text": "two\nlines\r\nend", "url": "https://a.b", "score": 0.5}, {"text": "x", "date": 3}),
    *({"text": "  "}, {"text": ""}, {"text": None}, {"txt": "a"}, {"text": "a", "note": "photo.jpg"}),
    *({"content": "other", "text": None}, {"text": "a", "image": None}, {"text": "a", "thumb": b"\x89PNG"}),
    *({"text": "a", "meta": {"license": "MIT"}}, {"text": "a", "tags": ["b"]}, {"question": "q", "answer": "a"}),
]
"""Rows of every kind that the short way might read otherwise."""


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_read_the_short_way_as_the_long_one(row: dict, tmp_path: Path) -> None:
    raws = [records.Raw("here", row, 4)]
    found = []
    for short in (False, True):
        with account.collected() as counted:
            documents, rejections = records.read_records(raws, tmp_path, DEFAULTS, kind="Parquet", short=short)
        found.append((documents, [(one.path, one.reason) for one in rejections], counted))
    assert found[0] == found[1]
    assert len(found[0][0]) + len(found[0][1]) == 1


GROUPS = {
    "groups of ten": (100, 4, range(0, 101, 10), [20, 50, 70]),
    "one group": (100, 4, (0, 100), [25, 50, 75]),
    "groups that are no cuts": (100, 5, (0, 2, 100), [20, 40, 60, 80]),
    "two groups": (100, 2, (0, 58, 100), [58]),
    "no rows": (0, 3, (0,), []),
    "more parts than rows": (3, 9, (0, 3), [1, 2]),
}
"""Rows, parts, where groups begin, and where the rows are cut."""


@pytest.mark.parametrize("name", GROUPS)
def test_rows_are_cut_where_groups_begin(name: str) -> None:
    rows, count, groups, expected = GROUPS[name]
    work = work_items.WorkItem(Path("a.parquet"), start=0, stop=rows, size=997)
    parts = work_items._cut_rows(work, count, groups=groups)
    assert [part.start for part in parts] == [0, *expected]
    assert [part.stop for part in parts] == [*expected, rows]
    assert sum(part.size for part in parts) == 997
