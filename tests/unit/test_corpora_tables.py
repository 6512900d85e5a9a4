"""Tables of media as their publishers ship them: several captions an image, addresses alone, annotations."""

import json
from pathlib import Path

import numpy as np
import pytest
from corpora import flac, read_corpus, write
from small import png

from megatron_mm.ingest import account, table_rows
from megatron_mm.ingest.fields import Fields, Part
from megatron_mm.ingest.table_rows import Table

RNG = np.random.default_rng(0)
PICTURE, OTHER = png(RNG), png(RNG)
JOINED = "rows of tables that were joined to an earlier one of the same file"


def test_flickr30k_gives_an_image_all_of_its_captions(tmp_path: Path) -> None:
    rows = ["image_name| comment_number| comment"]
    rows += [f"{name}.png| {number}| {name} says, {number} ." for name in "ab" for number in range(3)]
    write(tmp_path, {"results.csv": "\n".join(rows) + "\n"})
    write(tmp_path, {"flickr30k_images/a.png": PICTURE, "flickr30k_images/b.png": OTHER})
    corpus = read_corpus(tmp_path)
    expected = [[f"{name} says, {number} ." for number in range(3)] for name in "ab"]
    assert corpus.shapes == [["<image>", "\n".join(texts)] for texts in expected]
    assert corpus.account[account.OTHERS] == {JOINED: 4}
    assert corpus.account[account.INPUTS]["rows of tables"] == 6


def test_flickr8k_is_the_same_in_csv_whatever_the_order_of_rows(tmp_path: Path) -> None:
    said = 'image,caption\na.png,"one, two"\nb.png,three\na.png,four\na.png,"one, two"\n'
    write(tmp_path, {"captions.txt": said, "Images/a.png": PICTURE, "Images/b.png": OTHER})
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<image>", "one, two\nfour"], ["<image>", "three"]]
    assert [document.origin.start for document in corpus.documents] == [0, 1]


def test_a_bad_row_is_named_by_its_place_in_the_table(tmp_path: Path) -> None:
    said = "file,text\n" + "".join(f"{name},{name}\n" for name in ("a.png", "a.png", "gone.png", "b.png"))
    write(tmp_path, {"t.csv": said, "a.png": PICTURE, "b.png": OTHER})
    corpus = read_corpus(tmp_path)
    assert [one.path for one in corpus.rejections] == [f"{tmp_path}/t.csv, row 3"]
    assert len(corpus.documents) == 2


def test_rows_of_one_recording_are_one_document(tmp_path: Path) -> None:
    write(tmp_path, {"t.tsv": "path\tsentence\na.flac\tone\na.flac\ttwo\n", "a.flac": flac(1)})
    assert read_corpus(tmp_path).shapes == [["<audio 1>", "one\ntwo"]]


def test_joining_rows_gives_what_comparing_all_of_them_gives(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(f"{rng.integers(5)}.png", f"text {rng.integers(8)}") for _ in range(60)]
    path = tmp_path / "t.csv"
    path.write_text("file,text\n" + "".join(f"{name},{text}\n" for name, text in rows))
    fields = Fields(name="table", parts=[Part(image=["file"]), Part(text=["text"])])
    joined = table_rows.read_rows(path, Table(fields, tmp_path, ",", has_quotes=True, joined_by="file"))
    expected: list[tuple[str, list[str]]] = []
    for name, _ in rows:
        if name not in [other for other, _ in expected]:
            expected.append((name, [other for own, other in rows if own == name]))
    got = [(row.cells["file"], row.cells["text"]) for row in joined]
    assert got == [(name, list(dict.fromkeys(texts))) for name, texts in expected]
    assert sum(row.joined + 1 for row in joined) == len(rows)


@pytest.mark.parametrize(
    "table",
    [
        ("Train_GCC-training.tsv", "a man in a boat\thttp://e.com/a.jpg?w=60\ntwo reeds\thttps://e.com/b.png\n"),
        ("cc12m.tsv", "https://e.com/x/a.jpg\ta man in a boat\nhttps://e.com/c\tx y\nhttps://e.com/d.webp\ty z\n"),
        ("sbu.csv", "image_url,caption\nhttp://e.com/1,one bird\nhttp://e.com/2,two birds\n"),
    ],
)
def test_tables_of_addresses_of_images_are_refused(tmp_path: Path, table: tuple[str, str]) -> None:
    write(tmp_path, {table[0]: table[1]})
    corpus = read_corpus(tmp_path)
    assert not corpus.documents
    assert "addresses of images and not the images" in corpus.reasons[0]


@pytest.mark.parametrize(
    "table",
    [
        ("links.tsv", "A page\thttps://e.com/a\nAnother\thttps://e.com/b.html\n"),
        ("notes.csv", "when,what\nMay,see https://e.com/a.jpg\nJune,nothing\n"),
        ("prose.txt", "a line\nhttps://e.com/a.jpg\nanother line\n"),
    ],
)
def test_other_tables_with_addresses_are_text(tmp_path: Path, table: tuple[str, str]) -> None:
    write(tmp_path, {table[0]: table[1]})
    assert read_corpus(tmp_path).shapes == [[table[1]]]


def test_lists_of_media_without_text_are_set_aside(tmp_path: Path) -> None:
    write(tmp_path, {"labels.csv": "a.png,3\nb.png,7\n", "a.png": PICTURE, "b.png": OTHER})
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<image>"]] * 2
    assert corpus.files["set aside"] == {"a list of media without their text": 1}


def coco(annotation: dict) -> str:
    images = [{"license": 4, "file_name": "000000000009.png", "id": 9, "height": 30, "width": 40}]
    said = {"info": {"year": 2017}, "licenses": [], "images": images}
    return json.dumps({**said, "annotations": [{"image_id": 9, "id": 1, **annotation}] if annotation else []})


def test_annotations_of_coco_that_are_no_captions_are_set_aside(tmp_path: Path) -> None:
    files = {
        "captions_train2017": coco({"caption": "A heron."}),
        "instances_train2017": coco({"bbox": [1, 2, 3, 4], "category_id": 1, "segmentation": [[1, 2]]}),
        "person_keypoints_train2017": coco({"keypoints": [0, 0, 0], "num_keypoints": 0}),
        "panoptic_train2017": coco({"segments_info": [], "file_name": "000000000009.png"}),
        "image_info_test2017": coco({}),
    }
    write(tmp_path, {f"annotations/{name}.json": data for name, data in files.items()})
    write(tmp_path, {"train2017/000000000009.png": PICTURE})
    corpus = read_corpus(tmp_path)
    assert corpus.shapes == [["<image>", "A heron."]]
    assert corpus.files["set aside"] == {"COCO's annotations that are no captions": 4}
