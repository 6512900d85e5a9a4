"""The preprocessing tool: the same shards from any number of workers, every input accounted for, nothing half done."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small import png, save_tokenizer, sentence

from megatron_mm.errors import DataError
from megatron_mm.ingest import pipeline, work
from megatron_mm.ingest.pipeline import Options, find_files, preprocess, read_texts
from megatron_mm.shards import ShardReader
from megatron_mm.tokenizer import TextTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
OUTPUTS = {"p.bin", "p.idx", "p.media.bin", "p.media.idx", "p.json", "p.rejected.jsonl"}


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


def run(inputs: Path, prefix: Path, tokenizer: Path | None = None, **options) -> pipeline.Report:
    """Preprocess one path with the tokenizer that lies beside it."""
    tokenizer = tokenizer or inputs.parent / "tokenizer.json"
    return preprocess([str(inputs)], output_prefix=str(prefix), tokenizer_path=str(tokenizer), **options)


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_shards_do_not_depend_on_the_workers(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "LINES_BYTES", 4_000)
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
    (corpus / "9.png").write_bytes(b"")
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
    monkeypatch.setattr(work, "LINES_BYTES", 3_000)
    path = corpus / "deep" / "lines.jsonl"
    lines = path.read_text().splitlines()
    bad = [7, 130, 131, 499]
    for number in bad:
        lines[number] = lines[number][:-5]
    path.write_text("\n".join(lines))
    report = run(corpus, tmp_path / "out" / "p", skip_bad=True, workers=2)
    assert report.counts.documents == 508 - len(bad)
    assert [rejection.path for rejection in report.rejections] == [f"{path}:{number + 1}" for number in bad]


def test_nothing_to_read_is_said(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist: --input takes files and folders"):
        run(tmp_path / "none", tmp_path / "p")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no files under"):
        find_files([str(tmp_path / "empty")])
    (tmp_path / "empty" / "x.txt").touch()
    with pytest.raises(DataError, match="none of the 1 inputs gave a document"):
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


def test_a_run_killed_at_any_moment_leaves_no_shards_to_be_read(corpus: Path, tmp_path: Path) -> None:
    (corpus / "long.jsonl").write_text("".join(json.dumps({"text": "lake " * 200}) + "\n" for _ in range(20_000)))
    command = [sys.executable, TOOL, "--input", corpus, "--output-prefix", tmp_path / "out" / "p"]
    command += ["--tokenizer", tmp_path / "tokenizer.json", "--workers", "2"]
    for delay in (0.5, 2.0, 3.0):
        tool = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        time.sleep(delay)
        tool.kill()
        tool.wait()
        assert_group_ends(tool.pid)
        assert not [path for path in (tmp_path / "out").glob("*") if not path.name.endswith(".partial")]
        with pytest.raises(DataError, match="is missing"):
            ShardReader(tmp_path / "out" / "p")
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "20508 documents" in finished.stdout
    ShardReader(tmp_path / "out" / "p").verify()
    assert outputs(tmp_path / "out").keys() == OUTPUTS


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
