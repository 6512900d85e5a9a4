"""Whenever the power is cut, what has its name is whole: the old or, from the moment that it is said to be, the new."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disk import Disk, Judge
from small import documents, save_tokenizer

from megatron_mm.checkpoint.format import OWNER, Fence, commit, name_of, remove_old, step_of, whole_ones
from megatron_mm.checkpoint.verify import find_damage
from megatron_mm.errors import DataError
from megatron_mm.ingest.encode import encode_document
from megatron_mm.shards import EncodedBatch, EncodedDocument, Origins, ShardReader, ShardWriter, TokenizerInfo
from megatron_mm.storage import publish_folder, replacing
from megatron_mm.tokenizer import TextTokenizer

REJECTED = {"path": "a.pdf", "reason": "is empty"}
OLD, NEW = b"what was there before", b"what takes its place, and is longer"


def write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def replace_file(root: Path) -> None:
    write(root / "file", NEW)


def is_old_or_new_file(folder: Path, done: bool) -> bool:
    return (folder / "file").read_bytes() in ([NEW] if done else [OLD, NEW])


def publish(root: Path) -> None:
    partial = root / "new.partial"
    (partial / "inner").mkdir(parents=True)
    for name in ("a", "b", "inner/c"):
        (partial / name).write_bytes(NEW)
    publish_folder(partial, root / "new")


def is_whole_folder_or_none(folder: Path, done: bool) -> bool:
    if not (folder / "new").exists():
        return not done
    files = [path for path in (folder / "new").rglob("*") if path.is_file()]
    return len(files) == 3 and all(path.read_bytes() == NEW for path in files)


def commit_step(root: Path, step: int) -> None:
    folder = root / "run"
    partial = folder / f"{name_of(step)}.partial"
    partial.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (partial / name).write_bytes(name.encode() * step)
    fence = Fence(folder, (folder / OWNER).read_text())
    commit(partial, folder / name_of(step), hashes={}, facts={"step": step}, fence=fence)


def begin_run(root: Path) -> None:
    Fence.take(root / "run")


def has_an_owner_or_none(folder: Path, done: bool) -> bool:
    owner = folder / "run" / OWNER
    return bool(owner.read_text()) if owner.exists() else not done


def commit_first_step(root: Path) -> None:
    begin_run(root)
    commit_step(root, 1)


def commit_second_step(root: Path) -> None:
    """Commit a step, and let the one before go."""
    commit_step(root, 2)
    assert remove_old(root / "run", keep=1, keep_every=0) == []


def has_one_step_and_no_damaged_one(folder: Path, done: bool) -> bool:
    found = whole_ones(folder / "run")
    steps = [step_of(path) for path in found]
    return bool(steps) and not any(find_damage(path) for path in found) and (not done or steps == [2])


@functools.cache
def encoded() -> tuple[TokenizerInfo, bytes, list[EncodedDocument]]:
    with tempfile.TemporaryDirectory() as folder:
        path = save_tokenizer(Path(folder) / "tokenizer.json")
        tokenizer, content = TextTokenizer(path), Path(path).read_bytes()
    return tokenizer.info, content, [encode_document(document, tokenizer) for document in documents()]


def write_shards(root: Path, *, copies: int = 1) -> None:
    tokenizer, content, made = encoded()
    with ShardWriter(root / "shards" / "train", tokenizer=tokenizer, tokenizer_content=content) as writer:
        writer.add_rejection(REJECTED)
        batch = EncodedBatch.of([document for document in made if document.media][:1] * copies)
        writer.add_batch(replace(batch, origins=Origins(copies, "a file")))


def are_whole_shards_or_none(folder: Path, done: bool) -> bool:
    prefix = folder / "shards" / "train"
    if not prefix.with_suffix(".json").exists():
        return not done
    try:
        reader = ShardReader(prefix)
        reader.verify()
        tokenizer, rejected = (prefix.with_suffix(part).read_bytes() for part in (".tokenizer", ".rejected.jsonl"))
    except (DataError, OSError):
        return False
    beside = tokenizer == encoded()[1] and json.loads(rejected or b"{}") == REJECTED
    return beside and (not done or reader.num_documents == 1)


CASES: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any], Callable[[Path, bool], bool]]] = {
    "a file that replaces another": (lambda root: write(root / "file", OLD), replace_file, is_old_or_new_file),
    "a folder": (lambda root: None, publish, is_whole_folder_or_none),
    "a new run": (lambda root: None, begin_run, has_an_owner_or_none),
    "a step in place of another": (commit_first_step, commit_second_step, has_one_step_and_no_damaged_one),
    "shards in place of others": (lambda root: write_shards(root, copies=2), write_shards, are_whole_shards_or_none),
}
"""What is there before, what is done, and what must hold of each state that a power cut leaves."""


def follow(case: str, folder: Path, *, ignored: Collection[int] = ()) -> Disk:
    """Do what a case does in `folder`, anew, and return the disk that was followed."""
    before, action, _ = CASES[case]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before(folder)
    disk = Disk(folder, ignored=ignored)
    disk.during(lambda: action(folder))
    return disk


@pytest.mark.parametrize("case", CASES)
def test_a_power_cut_leaves_the_old_or_the_new_and_each_sync_is_needed(case: str, memory_folder: Path) -> None:
    judge = Judge(memory_folder / "left", CASES[case][2])
    disk = follow(case, memory_folder / "root")
    assert not list(judge.bad(disk))
    # The shards' folder is synced after each name: one of these would do for several.
    often = tuple(number for number, name in enumerate(disk.syncs) if name == "root/shards")
    for ignored in {often if number in often else (number,) for number in range(len(disk.syncs))}:
        bad = judge.bad(follow(case, memory_folder / "root", ignored=ignored))
        assert next(bad, None) is not None, f"of the syncs {disk.syncs}, {ignored} are for nothing"
