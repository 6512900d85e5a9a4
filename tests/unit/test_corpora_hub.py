"""Sets as they lie on the Hugging Face hub: folders of media, declared columns, conversations, tars."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from corpora import flac, read_corpus, tar, write
from small import png

from megatron_mm.ingest import account
from megatron_mm.ingest.features import declared_media
from megatron_mm.ingest.find import HIDDEN

RNG = np.random.default_rng(0)
PICTURE, OTHER = png(RNG), png(RNG)


def jsonl(*records: dict) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def parquet(path: Path, columns: dict[str, list], features: dict | None = None) -> Path:
    table = pa.table(columns)
    if features is not None:
        said = {"info": {"features": features}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(said)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table, path)
    return path


# Folders of media


def test_file_names_of_metadata_are_media_by_their_suffix(tmp_path: Path) -> None:
    records = [{"file_name": "a.png", "text": "a heron"}, {"file_name": "b/c.flac", "sentence": "it calls"}]
    write(tmp_path, {"train/metadata.jsonl": jsonl(*records), "train/a.png": PICTURE, "train/b/c.flac": flac(1)})
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<image>", "a heron"], ["<audio 1>", "it calls"]]
    assert corpus.files["read with others"] == 2


def test_lists_of_file_names_are_read_in_their_order(tmp_path: Path) -> None:
    record = {"image_file_names": ["a.png", "b.png"], "text": "two herons"}
    write(tmp_path, {"metadata.jsonl": jsonl(record, record), "a.png": PICTURE, "b.png": OTHER})
    assert read_corpus(tmp_path).shapes == [["<image>", "<image>", "two herons"]] * 2


def test_the_name_of_a_file_that_is_no_medium_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path, {"code.jsonl": jsonl({"file_name": "src/main.py", "content": "import os"})})
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["import os"]]
    assert corpus.account[account.NOT_USED] == {"file_name": 1}


def test_a_medium_that_metadata_names_and_is_not_there_is_a_rejection(tmp_path: Path) -> None:
    write(tmp_path, {"metadata.jsonl": jsonl({"file_name": "a.png", "text": "a"}, {"file_name": "z.png", "text": "z"})})
    (tmp_path / "a.png").write_bytes(PICTURE)
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<image>", "a"]]
    assert corpus.reasons == ["file_name 'z.png': it is not there"]


# Columns that are declared


def test_columns_declared_to_be_media_are_read_whatever_their_names(tmp_path: Path) -> None:
    shots = [{"bytes": PICTURE, "path": None}, {"bytes": OTHER, "path": "b.png"}]
    columns = {"text": ["one", "two"], "screen": shots, "voice": [{"bytes": flac(1), "path": None}] * 2}
    features = {"text": {"_type": "Value"}, "screen": {"_type": "Image"}, "voice": {"_type": "Audio"}}
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", columns, features)
    assert read_corpus(tmp_path).shapes == [["<image>", "<audio 1>", "one"], ["<image>", "<audio 1>", "two"]]


def test_undeclared_columns_of_other_names_are_refused_and_not_lost(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"text": ["one"], "screen": [{"bytes": PICTURE, "path": None}]})
    corpus = read_corpus(tmp_path)
    assert not corpus.documents
    assert "'screen' holds media" in corpus.reasons[0]


def test_declared_images_take_their_places_in_a_conversation(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "what <image> is this?"}, {"from": "gpt", "value": "a bird"}]
    columns = {"messages": [turns], "picture": [[{"bytes": PICTURE, "path": None}]]}
    parquet(tmp_path / "a.parquet", columns, {"picture": {"_type": "List", "feature": {"_type": "Image"}}})
    assert read_corpus(tmp_path).shapes == [["User: what ", "<image>", " is this?\nAssistant: a bird\n"]]


@pytest.mark.parametrize(
    "feature",
    [
        {"_type": "Image"},
        [{"_type": "Image"}],
        {"_type": "Sequence", "feature": {"_type": "Image"}},
        {"_type": "LargeList", "feature": {"_type": "Image", "decode": True}},
    ],
)
def test_media_are_declared_in_each_form_of_a_list(feature: object) -> None:
    features = {"shot": feature, "label": {"_type": "ClassLabel"}, "rows": [{"x": {"_type": "Image"}}]}
    assert declared_media({b"huggingface": json.dumps({"info": {"features": features}}).encode()}) == {"shot": "image"}


@pytest.mark.parametrize("said", [b"", b"{", b"[]", b"null", b'{"info": null}', b'{"info": {"features": []}}'])
def test_other_metadata_declares_nothing(said: bytes) -> None:
    assert declared_media({b"huggingface": said}) == {}
    assert declared_media(None) == {}


# Conversations about images


def test_llava_reads_a_json_array_and_the_images_that_it_names(tmp_path: Path) -> None:
    def entry(image: str) -> dict:
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bird."}]
        return {"id": image, "image": f"coco/train/{image}", "conversations": turns}

    text_only = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    files = {"llava.json": json.dumps([entry("a.png"), entry("missing.png"), text_only], indent=1)}
    write(tmp_path, {**files, "coco/train/a.png": PICTURE, "coco/train/unused.png": OTHER})
    corpus = read_corpus(tmp_path)
    asked = ["User: ", "<image>", "What is it?\nAssistant: A bird.\n"]
    assert corpus.shapes == [["<image>"], asked, ["User: Hi\nAssistant: Hello\n"]]
    assert corpus.reasons == ["image 'coco/train/missing.png': it is not there"]
    assert corpus.rejections[0].path == f"{tmp_path}/llava.json[1]"
    assert corpus.files["read with others"] == 1


def test_llava_may_name_images_from_a_folder_beside_its_list(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": "reeds"}]
    entry = {"id": "004539375", "image": "00453/004539375.png", "conversations": turns}
    write(tmp_path, {"blip_laion_cc_sbu_558k.json": json.dumps([entry]), "images/00453/004539375.png": PICTURE})
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["User: Describe it.\n", "<image>", "Assistant: reeds\n"]]
    assert corpus.files["read with others"] == 1


def test_json_lines_named_json_are_read_with_the_images_that_they_name(tmp_path: Path) -> None:
    write(tmp_path, {"train.json": jsonl(*({"image": f"{one}.png", "text": one} for one in "ab"))})
    write(tmp_path, {"a.png": PICTURE, "b.png": OTHER})
    assert read_corpus(tmp_path).shapes == [["<image>", "a"], ["<image>", "b"]]


def test_the_cauldron_reads_turns_after_their_images(tmp_path: Path) -> None:
    turns = [{"user": "What?", "assistant": "A map.", "source": "x"}, {"user": "Where?", "assistant": "There."}]
    columns = {"images": [[{"bytes": PICTURE, "path": None}]], "texts": [turns]}
    parquet(tmp_path / "vqa" / "train-00000.parquet", columns)
    said = "User: What?\nAssistant: A map.\nUser: Where?\nAssistant: There.\n"
    assert read_corpus(tmp_path).shapes == [["<image>", said]]


def test_sharegpt_in_an_array_is_a_conversation_each(tmp_path: Path) -> None:
    turns = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]
    write(tmp_path, {"sharegpt.json": json.dumps([{"id": 1, "conversations": turns}] * 2)})
    assert read_corpus(tmp_path).shapes == [["System: Be kind.\nUser: Hi\nAssistant: Yes\n"]] * 2


def test_more_marks_than_images_are_a_rejection(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "<image> <image>"}, {"role": "assistant", "content": "no"}]
    parquet(tmp_path / "a.parquet", {"messages": [turns], "images": [[{"bytes": PICTURE, "path": None}]]})
    assert read_corpus(tmp_path).reasons == ["messages has 2 <image>, and the record 1 of that kind"]


# Tars


@pytest.mark.parametrize("hidden", [(), (".nv-meta/dataset.yaml", ".nv-meta/split.yaml")])
def test_webdataset_in_a_repository_gives_a_document_a_sample(tmp_path: Path, hidden: tuple[str, ...]) -> None:
    sample = {"000.png": PICTURE, "000.json": b'{"caption": "a heron", "id": 3}', "001.png": OTHER, "001.txt": b"reeds"}
    write(tmp_path, {"data/train-0000.tar": tar(sample), "README.md": "# a set", **dict.fromkeys(hidden, "x: 1")})
    corpus = read_corpus(tmp_path)
    assert sorted(corpus.shapes) == [["# a set"], ["<image>", "a heron"], ["<image>", "reeds"]]
    assert corpus.files["passed over"] == ({HIDDEN: len(hidden)} if hidden else {})


def test_sets_of_mosaicml_streaming_are_refused_by_name(tmp_path: Path) -> None:
    index = {"shards": [{"raw_data": {"basename": "shard.00000.mds"}}], "version": 2}
    write(tmp_path, {"train/index.json": json.dumps(index), "train/shard.00000.mds": b"\1\0\0\0" * 9})
    corpus = read_corpus(tmp_path)
    assert not corpus.documents
    assert "MosaicML Streaming (MDS)" in corpus.reasons[0]
    assert corpus.files["set aside"] == {"a file of a MosaicML Streaming (MDS) set, which is refused": 1}
