"""Generation over an export: the cache changes nothing, a batch is its prompts, text streams, and misuse is named."""

import io
import json
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import run_alone, run_ranks
from PIL import Image
from small import png, small_config, tone
from test_export import WRONG_MAPS, save_and_run
from transformers import AutoProcessor

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf import weight_map
from megatron_mm.hf.export import KINDS, export
from megatron_mm.hf.gate import LIMIT, Gate
from megatron_mm.hf.generate import Sampling, Speaker, generate, model_inputs, opened
from megatron_mm.ingest.document import AudioSegment, Document, ImageSegment, TextSegment
from megatron_mm.ingest.read import read_file
from megatron_mm.modalities.audio.spec import decode_flac, encode_flac
from megatron_mm.shards import stored_tokenizer
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer
from megatron_mm.training import checkpoints

LENGTH = 8
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model whose weights are noise."""
    config = small_config(shards, tmp_path_factory.mktemp("saved"), "training.global_batch_size=4")
    run_ranks(1, save_and_run, config, [1])
    return checkpoints.newest(config)


@pytest.fixture(scope="module")
def exports(saved: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "out"
    export(saved, out)
    return out


def test_the_tokenizer_goes_with_shards_checkpoint_and_export(saved: Path, exports: Path, shards: Path) -> None:
    original = (shards.parent / "tokenizer.json").read_bytes()
    assert stored_tokenizer(str(shards)) == original
    assert (saved / "tokenizer.json").read_bytes() == original
    for kind in KINDS:
        assert (exports / kind / "tokenizer.json").read_text() == TextTokenizer(saved / "tokenizer.json").to_json()


def export_through_gate(checkpoint: Path, out: Path, wrong: str | None) -> str:
    """Export a checkpoint with the gate, perhaps with a wrong map, and return a model card, or why there is none."""
    if wrong is not None:
        right = weight_map.decoder
        weight_map.decoder = lambda *a, **k: iter(WRONG_MAPS[wrong](list(right(*a, **k))))
    try:
        export(checkpoint, out, gate=Gate(checkpoint).compare)
    except DataError as error:
        return str(error)
    return (out / "full" / "README.md").read_text()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gate_puts_its_figures_into_the_card(precision: str, saved: Path, shards: Path, tmp_path: Path) -> None:
    if precision == "bf16":  # the sums with type embeddings are rounded as in training
        config = small_config(shards, tmp_path, "training.global_batch_size=4", "training.precision=bf16")
        run_ranks(1, save_and_run, config, [1])
        saved = checkpoints.newest(config)
    card = run_alone(export_through_gate, saved, tmp_path / "out", None)
    found = re.search(r"largest difference of a logit .* FP32 \| (\S+) \(limit 1e-04\)", card)
    assert 0.0 < float(found[1]) < LIMIT
    assert "positions of images, sound, text" in card
    assert "num_layers: 6" in card  # the run's configuration


def test_the_gate_lets_no_wrong_export_through(saved: Path, tmp_path: Path) -> None:
    assert "The export is wrong" in run_alone(export_through_gate, saved, tmp_path / "out", "heads")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def speaker(exports: Path) -> Iterator[Speaker]:
    with opened(exports / "full") as loaded:
        yield loaded


def prompts() -> list[Document]:
    rng = np.random.default_rng(0)
    text, other = TextSegment("the tall bird "), TextSegment("a hill")
    sound = AudioSegment(encode_flac(tone(rng, 20_000)), 20_000)
    image = ImageSegment(png(rng))
    made = [[text], [image, other], [other, sound, text, image]]
    return [Document(segments, Source.TEXT) for segments in made]


def recomputed(speaker: Speaker, prompt: Document) -> str:
    """Take the most probable token of the whole text again and again, without a cache."""
    inputs = model_inputs(speaker, [prompt])
    ids, special = speaker.tokenizer.special_ids, []
    for _ in range(LENGTH):
        with torch.no_grad():
            logits = speaker.model(**inputs).logits[0, -1]
        logits[[number for role, number in ids.items() if role != "end_of_text"]] = -torch.inf
        token = logits.argmax().view(1, 1)
        if token == ids["end_of_text"]:
            break
        special.append(int(token))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return speaker.tokenizer.decode(special)


def test_greedy_text_is_that_of_a_model_without_cache_alone_or_in_a_batch(speaker: Speaker) -> None:
    expected = [recomputed(speaker, prompt) for prompt in prompts()]
    assert len(set(expected)) == len(expected)
    sampling = Sampling(max_new_tokens=LENGTH)
    assert [generate(speaker, [prompt], sampling=sampling)[0] for prompt in prompts()] == expected
    assert generate(speaker, prompts(), sampling=sampling) == expected


def test_text_streams_and_a_seed_repeats_it(speaker: Speaker) -> None:
    pieces: list[str] = []
    sampling = Sampling(max_new_tokens=LENGTH, temperature=1.5, top_k=50, top_p=0.95, seed=3)
    (text,) = generate(speaker, prompts()[1:2], sampling=sampling, on_text=pieces.append)
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert generate(speaker, prompts()[1:2], sampling=sampling) == [text]
    others = {generate(speaker, prompts()[1:2], sampling=Sampling(LENGTH, 1.5, seed=seed))[0] for seed in range(4)}
    assert len(others) > 1


@pytest.mark.parametrize("kind", ["image", "full"])
def test_the_processor_of_an_export_gives_the_inputs_of_training(kind: str, exports: Path, speaker: Speaker) -> None:
    prompt = prompts()[1 if kind == "image" else 2]
    expected = model_inputs(speaker, [prompt])
    text, images, clips = "", [], []
    for segment in prompt.segments:
        if isinstance(segment, TextSegment):
            text += segment.text
        elif isinstance(segment, ImageSegment):
            images.append(Image.open(io.BytesIO(segment.data)))
            text += "<|image|>"
        else:
            clips.append(decode_flac(segment.data))
            text += "<|audio|>"
    processor = AutoProcessor.from_pretrained(exports / kind, trust_remote_code=kind == "full")
    media = {"images": images} | ({"audio": clips} if clips else {})
    found = processor(text=[text], **media, return_tensors="pt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = 2.1 / 127.5 if name == "pixel_values" else 0.0  # another resize: 2 of 255 levels
        torch.testing.assert_close(found[name], value, rtol=0.0, atol=tolerance)


def test_the_processor_reads_a_pdf_as_training_does(exports: Path) -> None:
    path = ROOT / "examples/sample_data/train/papers/prtec-extended-abstract.pdf"
    processor = AutoProcessor.from_pretrained(exports / "full", trust_remote_code=True)
    read = processor.read_file(path)
    segments = read_file(path)[0][0].segments
    assert [segment.text for segment in segments if isinstance(segment, TextSegment)] == [
        part for part in read["text"].split("<|image|>") if part
    ]
    assert len(read["images"]) == read["text"].count("<|image|>") > 0


def test_misuse_is_named(speaker: Speaker, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        generate(speaker, [Document([], Source.TEXT)])
    deaf = Speaker(speaker.model, speaker.tokenizer, {})
    with pytest.raises(DataError, match="takes no image"):
        generate(deaf, prompts()[1:2])
    mute = shutil.copytree(saved, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    manifest = json.loads((mute / "manifest.json").read_text())
    del manifest["bytes"]["tokenizer.json"]
    (mute / "manifest.json").write_text(json.dumps(manifest))
    (mute / "COMMITTED").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="--tokenizer"), opened(mute):
        pass
    with pytest.raises(ConfigError, match="neither an export"), opened(tmp_path):
        pass


def test_a_tokenizer_for_what_brings_its_own_is_refused(exports: Path, saved: Path) -> None:
    own = saved / "tokenizer.json"
    with (
        pytest.raises(ConfigError, match="is an export, which brings its own"),
        opened(exports / "text", tokenizer_path=own),
    ):
        pass


def test_more_than_a_training_sequence_is_said(speaker: Speaker, caplog: pytest.LogCaptureFixture) -> None:
    generate(speaker, [Document([TextSegment("hill " * 300)], Source.TEXT)], sampling=Sampling(max_new_tokens=1))
    assert "and 1 new ones are more than the 256 of a training sequence" in caplog.text
    caplog.clear()
    generate(speaker, prompts()[:1], sampling=Sampling(max_new_tokens=1))
    assert not caplog.text


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
        ({"temperature": -1.0}, "--temperature -1.0"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_p": 0.0}, "--top-p 0.0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
    ],
)
def test_sampling_that_cannot_be_is_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Sampling(**wrong)


def test_the_folder_above_an_export_is_told_from_it(exports: Path) -> None:
    with pytest.raises(ConfigError, match=f"Did you mean {exports / 'text'}"), opened(exports):
        pass


@pytest.mark.parametrize(("damage", "said"), [("cut short", "is not what was written"), ("missing", "is missing")])
def test_a_damaged_export_is_named(damage: str, said: str, exports: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exports / "text", tmp_path / "text")
    (shard,) = folder.glob("*.safetensors")
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(DataError, match=rf"{shard.name} {said}"), opened(folder):
        pass


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--text", "a", "--batch-size", "0"], "--batch-size 0"),
        (["--jsonl", "prompts.jsonl", "--text", "a"], "leave --text and --file out"),
        (["--jsonl", "prompts.jsonl"], "--jsonl prompts.jsonl is no file"),
        (["--file", "absent.jpg"], "absent.jpg does not exist"),
        (["--file", "tests"], "tests is a folder"),
        ([], "give a prompt"),
    ],
)
def test_the_tool_names_what_it_cannot_do(given: list[str], said: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["generate.py", "no_model", *given])
    assert runpy.run_path(str(ROOT / "tools" / "generate.py"))["main"]() == 2
    assert said in capsys.readouterr().err


def test_a_binary_file_called_text_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "notes.txt").write_bytes(np.random.default_rng(0).bytes(4096))
    monkeypatch.setattr(sys, "argv", ["generate.py", "no_model", "--file", str(tmp_path / "notes.txt")])
    assert runpy.run_path(str(ROOT / "tools" / "generate.py"))["main"]() == 3
    assert "notes.txt: its content is application/octet-stream, which is not" in capsys.readouterr().err
