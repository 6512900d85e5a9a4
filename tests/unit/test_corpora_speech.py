"""Sets of speech as their publishers ship them: recordings, and their words in lists, tables and manifests."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from corpora import flac, read_corpus, tar, write

from megatron_mm.errors import DataError
from megatron_mm.ingest import account
from megatron_mm.ingest.audio import read_audio
from megatron_mm.ingest.find import find_files
from megatron_mm.ingest.plan import EVERYTHING, WorkPlan
from megatron_mm.ingest.timed import cut_out
from megatron_mm.ingest.transcripts import read_cues
from megatron_mm.ingest.work_items import DEFAULTS, read_work
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, decode_flac, encode_flac


def lines(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def sphere(seconds: float) -> bytes:
    """A recording in NIST's SPHERE."""
    samples = decode_flac(flac(seconds))
    head = (
        f"NIST_1A\n   1024\nsample_count -i {len(samples)}\nsample_n_bytes -i 2\nchannel_count -i 1\n"
        f"sample_byte_format -s2 01\nsample_rate -i {SAMPLE_RATE}\nsample_coding -s3 pcm\nend_head\n"
    )
    return head.encode().ljust(1024) + (samples * 32767).astype("<i2").tobytes()


# Long recordings with segments


def gigaspeech(*paths: str) -> str:
    def segment(start: float, stop: float, words: str) -> dict:
        return {"sid": "S0", "speaker": "N/A", "begin_time": start, "end_time": stop, "text_tn": words}

    segments = [
        segment(0.5, 1.4, "AS THEY'RE LEAVING <COMMA> CAN KASH PULL ZAHRA ASIDE <QUESTIONMARK>"),
        segment(1.5, 1.8, "<MUSIC>"),
        segment(2.2, 2.9, "YES <PERIOD>"),
    ]
    audios = [{"title": "N/A", "url": f"https://e/{path}", "path": path, "segments": segments} for path in paths]
    return json.dumps({"dataset": "GigaSpeech", "language": "EN", "audios": audios})


def test_gigaspeech_is_a_recording_with_its_words_where_they_are_said(tmp_path: Path) -> None:
    path = "audio/podcast/P0000/POD0000000001.flac"
    write(tmp_path, {"GigaSpeech.json": gigaspeech(path), path: flac(4)})
    corpus = read_corpus(tmp_path)
    first = "AS THEY'RE LEAVING, CAN KASH PULL ZAHRA ASIDE?\n"
    assert corpus.shapes == [["<audio 2>", first, "<audio 1>", "YES.\n", "<audio 1>"]]
    assert corpus.account[account.NOT_KEPT] == {"parts of recordings without words (<MUSIC>)": 1}
    assert corpus.documents[0].origin.url == f"https://e/{path}"
    assert corpus.files["read with others"] == 1


def test_a_recording_that_gigaspeech_lists_and_is_not_there_is_a_rejection(tmp_path: Path) -> None:
    write(tmp_path, {"x/list.json": gigaspeech("audio/a.flac", "audio/b.flac"), "x/audio/b.flac": flac(4)})
    corpus = read_corpus(tmp_path)
    assert len(corpus.documents) == 1
    assert corpus.reasons == ["path 'audio/a.flac': it is not there"]


def test_lists_of_recordings_reach_the_processes_that_read_them(tmp_path: Path) -> None:
    write(tmp_path / "a", {"GigaSpeech.json": gigaspeech("a.flac"), "a.flac": flac(4)})
    write(tmp_path / "b", {"wav.scp": "u1 u1.flac\n", "text": "u1 HELLO\n", "u1.flac": flac(1)})
    write(tmp_path / "c", voxpopuli("2009", "2010"))
    for item in WorkPlan(find_files([str(tmp_path)]), EVERYTHING).work():
        sent = pickle.loads(pickle.dumps(item))
        assert sent == item
        assert read_work(sent, DEFAULTS)[0] == read_work(item, DEFAULTS)[0] != []


def test_records_may_say_when_words_are_said(tmp_path: Path) -> None:
    segments = [{"start": 0.0, "end": 0.8, "text": "one"}, {"start": 1.2, "end": 1.9, "text": "two"}]
    write(tmp_path, {"a.jsonl": lines({"audio": "a.flac", "segments": segments}), "a.flac": flac(2.5)})
    assert read_corpus(tmp_path).shapes == [["<audio 1>", "one\n", "<audio 1>", "two\n", "<audio 0.5>"]]


def test_a_long_recording_keeps_its_few_words_in_their_places(tmp_path: Path) -> None:
    silence = encode_flac(np.zeros(600 * SAMPLE_RATE, np.float32))
    vtt = "WEBVTT\n\n00:00:01.000 --> 00:00:02.000\nhello\n\n00:05:00.000 --> 00:05:01.500\nhalf way\n\n"
    vtt += "00:09:58.000 --> 00:09:59.000\ngoodbye\n"
    whisper = {"text": "hello half way goodbye", "segments": [{"id": 0, "start": 1.0, "end": 2.0, "text": " hello"}]}
    write(tmp_path, {"ep.flac": silence, "ep.vtt": vtt, "ep.json": json.dumps(whisper), "ep.txt": "hello half way\n"})
    corpus = read_corpus(tmp_path)
    first, second, third = ["<audio 2>", "hello\n"], ["<audio 300>", "half way\n"], ["<audio 297>", "goodbye\n"]
    assert corpus.shapes == [[*first, *second, *third, "<audio 1>"]]
    assert corpus.account[account.NOT_KEPT] == {
        "another text of the same medium (.json)": 1,
        "another text of the same medium (.txt)": 1,
    }


# Manifests


def test_manifests_cut_recordings_as_they_say(tmp_path: Path) -> None:
    manifest = lines(
        {"audio_filepath": "a.flac", "duration": 1.5, "text": "from the start"},
        {"audio_filepath": "a.flac", "offset": 1.5, "duration": 1.25, "text": "then this"},
        {"audio_filepath": "a.flac", "offset": 2.0, "duration": None, "text": "to the end"},
        {"audio_filepath": "a.flac", "duration": 4.001, "text": "all of it"},
    )
    write(tmp_path, {"train_manifest.json": manifest, "a.flac": flac(4)})
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [
        ["<audio 1.5>", "from the start"],
        ["<audio 1.25>", "then this"],
        ["<audio 2>", "to the end"],
        ["<audio 4>", "all of it"],
    ]
    whole = decode_flac(flac(4))
    np.testing.assert_allclose(decode_flac(corpus.documents[1].segments[0].data), whole[24_000:44_000], atol=1e-4)
    assert account.NOT_USED not in corpus.account


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        ({"duration": 9.0}, "it ends after 2.00 seconds, and 0 to 9 are asked for"),
        ({"offset": 2.5}, "it ends after 2.00 seconds, and 2.5 to inf are asked for"),
        ({"offset": -1.0, "duration": 1.0}, "-1.0 is no number of seconds"),
        ({"duration": "2"}, "'2' is no number of seconds"),
        ({"duration": 0.001}, "0 to 0.001 seconds are too few for one frame"),
    ],
)
def test_what_a_recording_does_not_hold_is_a_rejection(tmp_path: Path, cut: dict, reason: str) -> None:
    record = {"audio_filepath": "a.flac", "text": "words", **cut}
    write(tmp_path, {"m.jsonl": lines(record), "a.flac": flac(2)})
    assert read_corpus(tmp_path).reasons == [reason]


def test_a_manifest_of_whole_recordings_needs_no_duration(tmp_path: Path) -> None:
    write(tmp_path, {"m.jsonl": lines({"audio_filepath": "wavs/a.flac", "text": "words"}), "wavs/a.flac": flac(2)})
    assert read_corpus(tmp_path).shapes == [["<audio 2>", "words"]]


def test_cutting_nothing_keeps_the_samples() -> None:
    recording = read_audio(flac(1.3))
    assert cut_out(recording, None, None).num_samples == recording.num_samples
    with pytest.raises(DataError, match="no number of seconds"):
        cut_out(recording, float("nan"), None)


# Tables and lists


def voxpopuli(*folders: str) -> dict[str, bytes | str]:
    ids = [f"20090112-0900-PLENARY-{number}-en" for number in range(len(folders))]
    rows = "".join(f"{name}\tSo it is {name.split('-')[3]}.\tso it is\t12\n" for name in ids)
    files = {f"{folder}/{name}.flac": flac(1) for folder, name in zip(folders, ids)}
    return {"asr_train.tsv": f"id\traw_text\tnormalized_text\tspeaker_id\n{rows}", **files}


@pytest.mark.parametrize("folders", [("2009", "2010", "2011"), ("a/part_0", "a/part_1"), ("train", "train")])
def test_voxpopuli_finds_its_recordings_in_several_folders(tmp_path: Path, folders: tuple[str, ...]) -> None:
    write(tmp_path / "en", voxpopuli(*folders))
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<audio 1>", f"So it is {number}."] for number in range(len(folders))]
    assert corpus.files["read with others"] == len(folders)


@pytest.mark.parametrize("above", ["", "audio/"])
def test_recordings_of_later_rows_may_lie_in_other_folders_than_the_first(tmp_path: Path, above: str) -> None:
    folders = [f"{above}2009"] * 80 + [f"{above}2010"] * 3
    corpus = read_corpus(write(tmp_path, voxpopuli(*folders)))
    assert len(corpus.documents) == 83
    assert not corpus.rejections


def test_multilingual_librispeech_is_read_by_its_transcripts(tmp_path: Path) -> None:
    ids = ["4800_10003_000000", "4800_10003_000001", "5001_2_000000"]
    files: dict[str, bytes | str] = {
        "train/transcripts.txt": "".join(f"{name}\tes war einmal {name[:4]}\n" for name in ids),
        "train/segments.txt": "".join(f"{name}\thttp://www.archive.org/x/{name}.mp3\t401.7\t417.5\n" for name in ids),
    }
    for name in ids:
        files[f"train/audio/{name.split('_')[0]}/{name.split('_')[1]}/{name}.flac"] = flac(1)
    corpus = read_corpus(write(tmp_path, files))
    assert corpus.shapes == [["<audio 1>", f"es war einmal {name[:4]}"] for name in ids]
    assert not corpus.rejections
    assert sum(corpus.files["set aside"].values()) == 1


def test_folders_may_be_named_from_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, voxpopuli("2009", "2010", "2011"))
    monkeypatch.chdir(tmp_path)
    assert [len(shape) for shape in read_corpus(Path(".")).shapes] == [2, 2, 2]


def test_of_two_files_of_one_name_neither_is_guessed(tmp_path: Path) -> None:
    write(tmp_path, {**voxpopuli("2009", "2010", "2011"), "2012/20090112-0900-PLENARY-1-en.flac": flac(1)})
    corpus = read_corpus(tmp_path)
    assert corpus.reasons == ["id '20090112-0900-PLENARY-1-en': it is not there"]
    assert sorted(map(len, corpus.shapes)) == [1, 1, 2, 2]


def test_libritts_takes_the_original_words(tmp_path: Path) -> None:
    names = ["84_121550_000007_000000", "84_121550_000008_000000"]
    files: dict[str, bytes | str] = {}
    for name in names:
        files |= {f"{name}.flac": flac(1), f"{name}.normalized.txt": "mister b", f"{name}.original.txt": "Mr. B"}
    write(tmp_path / "84" / "121550", files)
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<audio 1>", "Mr. B"]] * 2
    assert corpus.account[account.NOT_KEPT] == {"another text of the same medium (.txt)": 2}


def test_libritts_with_its_tables_says_nothing_twice(tmp_path: Path) -> None:
    names = ["84_121550_000007_000000", "84_121550_000008_000000"]
    files: dict[str, bytes | str] = {"84_121550.trans.tsv": "".join(f"{name}\tMr. B\tmister b\n" for name in names)}
    files["84_121550.book.tsv"] = "".join(f"{name}\tMr. B\tmister b\t0\t5\n" for name in names)
    for name in names:
        files |= {f"{name}.flac": flac(1), f"{name}.normalized.txt": "mister b", f"{name}.original.txt": "Mr. B"}
    write(tmp_path, files)
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<audio 1>", "Mr. B"]] * 2
    assert not corpus.rejections


# NIST's forms


STM = """;; comment
Talk 1 Speaker 0.00 0.90 <o,f0,male> to begin with
Talk 1 inter_segment_gap 0.90 1.20 <o,,> ignore_time_segment_in_scoring
Talk 1 Speaker 1.20 1.80 <NA,x> and <unk> so on
"""


def test_tedlium_lays_the_words_of_stm_into_recordings_of_sphere(tmp_path: Path) -> None:
    write(tmp_path, {"train/sph/Talk.sph": sphere(2.5), "train/stm/Talk.stm": STM})
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<audio 1>", "to begin with\n", "<audio 1>", "and <unk> so on\n", "<audio 0.5>"]]
    assert corpus.account[account.NOT_KEPT] == {"parts of recordings without words (ignore_time_segment_in_scoring)": 1}


def test_a_line_that_is_no_segment_names_its_number(tmp_path: Path) -> None:
    (tmp_path / "x.stm").write_text(STM + "Talk 1 Speaker\n")
    with pytest.raises(DataError, match="line 5 is no segment"):
        read_cues(tmp_path / "x.stm")


# Kaldi


def test_a_kaldi_folder_pairs_recordings_and_words(tmp_path: Path) -> None:
    files = {
        "wav.scp": "u1 wav/u1.flac\nu2 wav/u2.flac\n",
        "text": "u1 HELLO THERE\nu2 AGAIN\nu3 NOBODY SAYS THIS\n",
        "utt2spk": "u1 s1\nu2 s1\n",
        "spk2utt": "s1 u1 u2\n",
    }
    write(tmp_path, {f"data/train/{name}": data for name, data in files.items()})
    write(tmp_path, {"wav/u1.flac": flac(1), "wav/u2.flac": flac(2)})
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<audio 1>", "HELLO THERE"], ["<audio 2>", "AGAIN"]]
    assert "utterance without a recording" in corpus.reasons[0]
    assert corpus.files["set aside"] == {"a list of a Kaldi folder that holds no words": 2}
    assert corpus.files["read with others"] == 3


def test_a_kaldi_folder_with_segments_lays_words_into_recordings(tmp_path: Path) -> None:
    files = {
        "wav.scp": f"talk {tmp_path}/talk.flac\n",
        "segments": "u1 talk 0.0 0.9\nu2 talk 1.1 1.7\n",
        "text": "u1 HELLO\nu2 AGAIN\n",
        "talk.flac": flac(2),
    }
    write(tmp_path, files)
    assert read_corpus(tmp_path).shapes == [["<audio 1>", "HELLO\n", "<audio 1>", "AGAIN\n"]]


def test_commands_of_kaldi_are_not_run(tmp_path: Path) -> None:
    write(tmp_path, {"wav.scp": "u1 touch /tmp/x |\n", "text": "u1 HELLO\n", "utt2spk": "u1 s\n"})
    corpus = read_corpus(tmp_path)
    assert not corpus.documents
    assert "what commands write, and none is run" in corpus.reasons[0]


def test_webdataset_of_speech_is_a_document_a_sample(tmp_path: Path) -> None:
    members = {"a.flac": flac(1), "a.json": b'{"text": "hello"}', "b.flac": flac(2), "b.txt": b"again"}
    (tmp_path / "0.tar").write_bytes(tar(members))
    assert read_corpus(tmp_path).shapes == [["<audio 1>", "hello"], ["<audio 2>", "again"]]
