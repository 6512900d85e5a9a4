"""A checkpoint of the code before modalities had folders of their own is resumed, started from and exported as ever.

tests/fixtures/run_before_modalities.tar.xz was made at commit 675cdad, on 4 ranks: shards of `small.write_shards`, and
`small_config(shards, run, *TRAINED, *layout("tp=2 pp=2"), "training.global_batch_size=4", "model.hidden_size=16",
"model.ffn_hidden_size=32", "model.num_layers=4", "audio.conv_channels=4", "parallel.loss_slot=false",
"parallel.embedding_slot=false")`; build_state, train_step for steps 0 and 1, and checkpoint.save. LOSSES are
`by_name(train_step(...).losses)` of the two steps after it, in the same process. The pretrained files and folders that
its config.yaml names are gone.
"""

import tarfile
from pathlib import Path

import pytest
from launch import run_alone, run_ranks
from small import layout

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.hf.export import KINDS, export
from megatron_mm.hf.gate import Gate
from megatron_mm.model.loss import by_name
from megatron_mm.training import checkpoints
from megatron_mm.training.initial_weights import check_start_from, load_initial_weights
from megatron_mm.training.state import build_state
from megatron_mm.training.step import train_step

RUN = Path(__file__).parent.parent / "fixtures" / "run_before_modalities.tar.xz"
LOSSES = [
    {
        "loss": 5.604588242644438,
        "loss/text": 5.603189644359407,
        "loss/image": 5.611842250823974,
        "loss/audio": 5.620247459411621,
        "loss/pdf": 5.629051653544108,
    },
    {
        "loss": 5.538884440648187,
        "loss/text": 5.5303559995986316,
        "loss/image": 5.584360405802727,
        "loss/pdf": 5.5567042350769045,
    },
]
"""Of steps 2 and 3, counted from 0."""
TOLERANCE = 1e-5
"""FP32 everywhere: only the order of sums differs between layouts."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run, in `run`, and the shards that it was trained on, `shards/train`."""
    with tarfile.open(RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def settings_of(folder: Path, *overrides: str) -> Config:
    """Return the settings of the run as its checkpoint has them, with its folders where they are now."""
    moved = (f"data.train=[{folder / 'shards' / 'train'}]", f"run_dir={folder / 'run'}")
    return configs.load(str(saved_in(folder) / "config.yaml"), [*moved, *overrides])


def saved_in(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "step_00000002"


def resume(config: Config) -> list[dict[str, float]]:
    """Go on from the newest checkpoint of a run, and return the losses of two steps by name."""
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    assert checkpoints.resume(state) is not None
    loader = Loader(config.data.train, config=config, mesh=mesh)
    return [by_name(train_step(state, loader.step(state.step)).losses) for _ in range(2)]


def start_anew(config: Config) -> dict[str, float]:
    """Start from the weights of another run, and return the losses of its step 2 by name."""
    mesh = meshes.cut(config)
    check_start_from(config, Path(config.training.start_from))
    state = build_state(config, mesh)
    load_initial_weights(state)
    return by_name(train_step(state, Loader(config.data.train, config=config, mesh=mesh).step(2)).losses)


@pytest.mark.parametrize(("text", "ranks"), [("tp=1 pp=1", 1), ("tp=1 pp=2", 2)])
def test_it_goes_on_as_the_code_that_saved_it_did(text: str, ranks: int, folder: Path) -> None:
    (losses, *_) = run_ranks(ranks, resume, settings_of(folder, *layout(text)))
    assert losses == [pytest.approx(expected, rel=TOLERANCE, abs=0.0) for expected in LOSSES]


def test_a_new_run_starts_from_its_weights(folder: Path) -> None:
    anew = (f"training.start_from={saved_in(folder)}", "image.pretrained=null", "audio.pretrained=null")
    config = settings_of(folder, *anew, f"run_dir={folder / 'anew'}", *layout("tp=1 pp=1"))
    (losses,) = run_ranks(1, start_anew, config)
    assert losses == pytest.approx(LOSSES[0], rel=TOLERANCE, abs=0.0)


def export_all(folder: Path) -> int:
    """Export the run's checkpoint, each kind compared with the training model, and return how many were."""
    compared = Gate(saved_in(folder), shards=str(folder / "shards" / "train")).compare
    export(saved_in(folder), folder / "out", gate=compared)
    return len([kind for kind in KINDS if (folder / "out" / kind / "README.md").exists()])


def test_its_exports_compute_what_the_training_model_does(folder: Path) -> None:
    assert run_alone(export_all, folder) == len(KINDS)
