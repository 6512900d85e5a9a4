"""Encoders of other families and sizes: layouts agree, runs go on, exports are the training model and generate."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import run_ranks
from PIL import Image
from small import TRAINED, png, small_config, tone, write_shards
from test_checkpoint import spoil
from test_export import GATE, difference, exported, save_and_run
from test_layouts import assert_same_curve, curve
from transformers import AutoProcessor

from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.errors import ConfigError
from megatron_mm.hf.export import Options, export
from megatron_mm.hf.generate import Sampling, generate, model_inputs, opened
from megatron_mm.hf.load import import_folder
from megatron_mm.ingest.document import AudioSegment, Document, ImageSegment, TextSegment
from megatron_mm.modalities.audio.spec import encode_flac
from megatron_mm.source import Source
from megatron_mm.training import checkpoints
from megatron_mm.training.state import build_state
from megatron_mm.training.step import train_step

RANDOM = (*TRAINED, "image.pretrained=random", "audio.pretrained=random", "training.global_batch_size=4")
SETTINGS = {
    "siglip2-hubert": ("image.encoder=siglip2", "audio.encoder=hubert"),
    "no-class-token": (
        *("image.class_token=false", "image.image_size=64", "image.patch_size=8"),
        *("audio.encoder=hubert", "audio.form=lv60k", "audio.chunk_samples=8000"),
    ),
    "pixel-shuffle": ("image.image_size=96", "image.pixel_shuffle=true"),
    "tiles": ("image.image_size=64", "image.tiles=4"),
}
STOCK = {"pixel-shuffle", "tiles"}
"""Those that InternVL can have."""
SIZES = ((40, 30), (90, 30), (40, 80), (100, 100))
"""Images of one tile of 64 x 64, of three in a row, of two in a column, and of four."""


@pytest.fixture(scope="module", params=SETTINGS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two tensor ranks, with a checkpoint of noise and the logits that it computed."""
    folder = tmp_path_factory.mktemp(request.param)
    overrides = (*RANDOM, *SETTINGS[request.param])
    geometries = small_config("unused", "unused", *overrides).encoders
    shards = write_shards(folder / "shards", geometries=geometries, image_sizes=SIZES)
    config = small_config(shards, folder / "run", *overrides, "parallel.tp=2", "checkpoint.interval=1")
    logits = run_ranks(2, save_and_run, config, [1])[-1]
    return {"name": request.param, "config": config, "logits": {1: logits[0]}, "folder": folder}


def test_its_exports_give_the_logits_of_the_training_model(trained: dict[str, Any]) -> None:
    is_stock = trained["name"] in STOCK
    folder = exported(trained, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["full", *["image"] * is_stock, "text"]
    largest, media = difference(trained, 1, folder / "full")
    assert largest < GATE
    shown = {name for kinds in media for name in kinds}
    assert {"pixel_values", *["input_values"] * (not is_stock)} <= shown  # the stock one has the usual audio encoder
    if is_stock:
        largest, media = difference(trained, 1, folder / "image")
        assert largest < GATE
        assert frozenset({"pixel_values"}) in media
    else:
        path = checkpoints.newest(trained["config"])
        with pytest.raises(ConfigError, match=r"--image cannot be written: image\..*--full carries it"):
            export(path, trained["folder"] / "refused", options=Options(("image",)))


def test_its_export_generates_and_comes_back(trained: dict[str, Any]) -> None:
    folder, rng = exported(trained, 1) / "full", np.random.default_rng(0)
    recording = AudioSegment(encode_flac(tone(rng, 20_000)), 20_000)
    segments = [TextSegment("a hill "), ImageSegment(png(rng, 90, 30)), recording]
    with opened(folder) as speaker:
        own = trained["config"].encoders
        for name, section in speaker.sections.items():
            free = {"pretrained": None, "trainable": True}
            assert section.model_copy(update=free) == own[name].model_copy(update=free)
        (seen,) = generate(speaker, [Document(segments, Source.PDF)], sampling=Sampling(max_new_tokens=4))
        (blind,) = generate(speaker, [Document(segments[:1], Source.TEXT)], sampling=Sampling(max_new_tokens=4))
    assert seen != blind
    preset = checkpoints.newest(trained["config"]) / "config.yaml"
    start = trained["folder"] / "start"
    import_folder(folder, start, preset=str(preset), overrides=["parallel.tp=1"])
    out = trained["folder"] / "again"
    export(start, out, tokenizer_path=folder / "tokenizer.json", options=Options(("full",)))
    for file in sorted(folder.glob("*.safetensors")):
        assert file.read_bytes() == (out / "full" / file.name).read_bytes()
    shutil.rmtree(out)


def test_its_processors_give_the_inputs_of_training(trained: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    images = [png(rng, *size) for size in SIZES]
    segments = [part for data in images for part in (ImageSegment(data), TextSegment(" a hill "))]
    for kind in ("full", *["image"] * (trained["name"] in STOCK)):
        folder = exported(trained, 1) / kind
        with opened(folder) as speaker:
            expected = model_inputs(speaker, [Document(segments, Source.PDF)])
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=kind == "full")
        opened_images = [Image.open(io.BytesIO(data)) for data in images]
        found = processor(text=["<|image|> a hill " * len(images)], images=opened_images, return_tensors="pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            tolerance = 2.1 / 127.5 if name == "pixel_values" else 0.0  # another resize: 2 of 255 levels
            torch.testing.assert_close(found[name], value, rtol=0.0, atol=tolerance)
        counts = processor._get_num_multimodal_tokens(image_sizes=[size[::-1] for size in SIZES])
        ids = expected["input_ids"]
        placeholder = speaker.tokenizer.special_ids["image"]
        assert sum(counts["num_image_tokens"]) == int((ids == placeholder).sum()) + 2 * len(images)
        assert sum(counts["num_image_patches"]) == len(expected["pixel_values"])


def test_tensor_ranks_train_as_one_does(trained: dict[str, Any]) -> None:
    two = trained["config"]
    one = two.model_copy(update={"parallel": two.parallel.model_copy(update={"tp": 1})})
    (alone,) = run_ranks(1, curve, one, 2)
    for split in run_ranks(2, curve, two, 2):
        assert_same_curve(split, alone)


def gone_on(config: Config) -> float:
    """Return how far a step after a checkpoint is from the same step of the run that saved it."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    train_step(state, loader.step(0))
    checkpoints.save(state)
    train_step(state, loader.step(1))
    whole = {name: value.clone() for chunk in state.chunks for name, value in chunk.named_parameters()}
    spoil(state)
    checkpoints.load(state, checkpoints.newest(config))
    train_step(state, loader.step(1))
    rest = {name: value for chunk in state.chunks for name, value in chunk.named_parameters()}
    return max((rest[name] - value).abs().max().item() for name, value in whole.items())


def test_a_run_goes_on_as_if_undisturbed(trained: dict[str, Any], tmp_path: Path) -> None:
    config = trained["config"].model_copy(update={"run_dir": str(tmp_path)})
    assert run_ranks(2, gone_on, config) == [0.0, 0.0]
