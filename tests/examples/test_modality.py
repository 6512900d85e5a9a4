"""Another modality is one folder, one entry of the tuple and a reader of its files: nothing else is touched.

The folder `sensor` here is copied into a copy of the package, as docs/extending.md says, and goes the whole way: files,
shards, training in two layouts, resume, rehearsal, export, generation.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from house import EXAMPLES, ROOT, House
from small import SMALL, save_tokenizer, sentence
from torch.distributed.checkpoint import FileSystemReader

ENCODERS = tuple(f"{name}.{key}" for name in ("image", "audio") for key in ("trainable=true", "pretrained=random"))
SETTINGS = (
    *SMALL,
    *ENCODERS,
    "training.steps=4",
    "data.seq_len=128",
    "training.global_batch_size=4",
    "model.vocab_size=324",
)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    house = House.build(tmp_path_factory.mktemp("house"))
    house.add("sensor", "modalities/sensor")
    house.add("sensor/reader.py", "ingest/sensor.py")
    house.change(
        "modalities/__init__.py",
        "MODALITIES: tuple[Modality, ...] = (IMAGE, AUDIO)",
        "from megatron_mm.modalities.sensor.spec import SENSOR\n\n"
        "MODALITIES: tuple[Modality, ...] = (IMAGE, AUDIO, SENSOR)",
    )
    line = (
        'SENSOR = Kind("sensor readings", Source.OTHER, (".readings",), reader="sensor.read_sensor", textual=True)\n\n'
    )
    house.change("ingest/kinds.py", "KINDS = tuple(", line + "KINDS = tuple(")
    return house


@pytest.fixture(scope="module")
def shards(house: House) -> Path:
    """Shards of recordings between texts."""
    rng = np.random.default_rng(0)
    files = house.folder / "files"
    files.mkdir()
    for number in range(24):
        readings = rng.normal(size=(int(rng.integers(3, 60)), 3))
        np.savetxt(files / f"{number}.readings", readings, delimiter=",")
        (files / f"{number}.txt").write_text(sentence(rng, int(rng.integers(5, 60))))
    tokenizer = save_tokenizer(house.folder / "tokenizer.json")
    prefix = house.folder / "shards" / "train"
    said = house.tool(
        "preprocess_data", "--input", str(files), "--output-prefix", str(prefix), "--tokenizer", str(tokenizer)
    )
    assert "media items: sensor 24" in said, said
    return prefix


def settings(shards: Path, run: str, *more: str) -> list[str]:
    return [*SETTINGS, f"data.train=[{shards}]", "data.validation=[]", f"run_dir={shards.parent / run}", *more]


def steps(shards: Path, run: str) -> list[dict]:
    lines = (shards.parent / run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "grad_norm" in record]


@pytest.fixture(scope="module")
def tensor(house: House, shards: Path) -> list[dict]:
    """What four steps of two tensor ranks measure."""
    house.train(*settings(shards, "tensor", "parallel.tp=2", "checkpoint.interval=1", "checkpoint.keep=9"), ranks=2)
    return steps(shards, "tensor")


def test_no_file_outside_its_folder_names_it(house: House) -> None:
    added = {"modalities/sensor", "ingest/sensor.py"}
    naming = set()
    for path in (house.folder / "megatron_mm").rglob("*.py"):
        place = str(path.relative_to(house.folder / "megatron_mm"))
        if not place.startswith(tuple(added)) and re.search("sensor|SENSOR", path.read_text()):
            naming.add(place)
    assert naming == {"modalities/__init__.py", "ingest/kinds.py"}
    for path in (ROOT / "megatron_mm").rglob("*.py"):
        assert "sensor" not in path.read_text().lower().split(), path


def test_it_trains_in_two_layouts_with_equal_gradients(house: House, shards: Path, tensor: list[dict]) -> None:
    assert len(tensor) == 4 and tensor[-1]["sensor_tokens"] > 0
    data = settings(shards, "data", "parallel.pp=2", "checkpoint.interval=1", "checkpoint.keep=9")
    house.train(*data, ranks=2)
    for one, other in zip(tensor, steps(shards, "data"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    one, other = (first_moments(shards.parent / run) for run in ("tensor", "data"))
    own = [name for name in one if "embedding.sensor." in name]
    assert any(name.endswith("encoder.tower.linear_1.weight") for name in own)
    assert all(one[name].any() for name in own if name.endswith("weight"))
    for name, moment in one.items():
        torch.testing.assert_close(moment, other[name], rtol=1e-4, atol=1e-7)


def first_moments(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return AdamW's first moments after one step, a tenth of the clipped gradient, of every tensor."""
    path = run_dir / "checkpoints" / "step_00000001"
    described = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(own.size, dtype=own.properties.dtype)
        for name, own in described.items()
        if name.startswith("optimizer.state.exp_avg.")
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def test_it_resumes_in_another_layout(house: House, shards: Path, tensor: list[dict]) -> None:
    house.train(*settings(shards, "resumed", "training.stop_after=2", "checkpoint.interval=1"))
    said = house.train(*settings(shards, "resumed", "parallel.tp=2", "checkpoint.interval=1"), ranks=2)
    assert "start at step 2 of 4" in said, said
    for one, other in zip(tensor, steps(shards, "resumed"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_it_is_rehearsed_and_counted(house: House, shards: Path) -> None:
    said = house.tool("rehearse", "tiny", *settings(shards, "rehearsed"), "--world-size", "2", "--ranks", "0")
    assert "sensor.encoder" in said, said


def test_it_is_exported_and_generates(house: House, shards: Path, tensor: list[dict]) -> None:
    checkpoint, out = shards.parent / "tensor" / "checkpoints" / "step_00000004", shards.parent / "export"
    house.tool("convert_checkpoint", "to-hf", str(checkpoint), str(out), "--full", "--gate")
    config = json.loads((out / "full" / "config.json").read_text())
    assert config["sensor_config"]["model_type"] == "sensor_mlp"
    assert (out / "full" / "sensor_megatron_mm.py").read_text() == (EXAMPLES / "sensor" / "exported.py").read_text()
    readings = house.folder / "files" / "0.readings"
    said = house.tool(
        "generate",
        str(out / "full"),
        "--text",
        "the lake",
        "--file",
        str(readings),
        "--max-new-tokens",
        "16",
        "--temperature",
        "1",
    )
    assert said.strip()


def test_shards_for_another_window_are_refused(house: House, shards: Path) -> None:
    said = house.run("-m", "megatron_mm.train", "tiny", *settings(shards, "other", "sensor.window=5"), fails=True)
    assert "was made for sensor.window=2, and the model has sensor.window=5" in said
