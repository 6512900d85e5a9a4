"""Saving and going on: to the bit in the same layout, to 1e-5 in another, and never from a damaged checkpoint."""

import json
import os
import pickle
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_alone, run_ranks
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from small import TRAINED, layout, small_config
from test_export import stir
from test_layouts import TOLERANCE, assert_same_gradients, full_gradients
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mm import config as configs
from megatron_mm.checkpoint.index import CheckpointReader
from megatron_mm.checkpoint.load import load_weights
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import device
from megatron_mm.engine import mesh as meshes
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.model.loss import by_name
from megatron_mm.model.multimodal import MultimodalModel, build_chunks
from megatron_mm.training import checkpoints
from megatron_mm.training.state import TrainState, build_state
from megatron_mm.training.step import train_step


def small_run(shards: Path, run_dir: Path, *overrides: str) -> Config:
    """Return a configuration whose steps are cheap."""
    return small_config(shards, run_dir, "training.global_batch_size=4", *overrides)


def go_on(config: Config, *, stop: int, save: bool = False) -> dict[str, Any]:
    """Train to step `stop`, from the newest checkpoint if there is one, and return what each step did."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    path = checkpoints.newest(config)
    if path is not None:
        spoil(state)  # nothing may be right by having been so before
        checkpoints.load(state, path)
    seen: dict[str, Any] = {"first": state.step, "losses": [], "grad_norms": [], "lr": [], "samples": []}
    while state.step < stop:
        seen["samples"].append(loader.step_samples(state.step).tolist())
        result = train_step(state, loader.step(state.step))
        seen["losses"].append(by_name(result.losses))
        seen["grad_norms"].append(result.grad_norm)
        seen["lr"].append(result.lr)
    seen["gradients"] = full_gradients(state)
    seen["weights"] = {name: value.clone() for chunk in state.chunks for name, value in chunk.named_parameters()}
    if save:
        checkpoints.save(state)
    return seen


def spoil(state: TrainState) -> None:
    with torch.no_grad():
        for chunk in state.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(0.123)


CHANGES = {
    ("tp=2 pp=2", 4): [("tp=2 pp=2", 4), ("", 1), ("tp=1 pp=2", 4), ("pp=2 vpp=2", 2), ("tp=4", 4)],
    ("", 1): [("", 1), ("", 2)],
    ("", 2): [("", 1)],
}
"""Layouts that save, with their ranks, and the layouts that go on from each."""


@pytest.mark.parametrize(("saved", "resumed"), CHANGES.items(), ids=str)
def test_a_resumed_run_is_the_undisturbed_one(
    saved: tuple[str, int], resumed: list[tuple[str, int]], shards: Path, tmp_path: Path
) -> None:
    text, ranks = saved
    config = small_run(shards, tmp_path, *layout(text))
    whole = run_ranks(ranks, go_on, small_run(shards, tmp_path / "whole", *layout(text)), stop=6)
    run_ranks(ranks, go_on, config, stop=3, save=True)
    for other, other_ranks in resumed:
        seen = run_ranks(other_ranks, go_on, small_run(shards, tmp_path, *layout(other)), stop=6)
        same_layout = (other, other_ranks) == saved
        for rank, rest in enumerate(seen):
            assert rest["first"] == 3
            assert rest["samples"] == whole[0]["samples"][3:]
            assert rest["lr"] == whole[0]["lr"][3:]
            for step in range(3):
                tolerance = 0.0 if same_layout else TOLERANCE
                assert rest["losses"][step] == pytest.approx(whole[0]["losses"][3 + step], rel=tolerance, abs=0.0)
                assert rest["grad_norms"][step] == pytest.approx(
                    whole[0]["grad_norms"][3 + step], rel=tolerance, abs=0.0
                )
            assert_same_gradients(rest["gradients"], whole[0]["gradients"], tolerance)
            if same_layout:
                for name, weight in whole[rank]["weights"].items():
                    assert torch.equal(rest["weights"][name], weight), name


Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]
"""Key, shape of the whole tensor, offset in it, and values of the same number of dimensions."""


def pieces_of(chunks: Sequence[MultimodalModel], mesh: meshes.Mesh) -> list[Piece]:
    """Return every piece of a parameter that this rank holds."""
    pieces = []
    for chunk in chunks:
        sharded = chunk.sharded_state_dict(metadata={"singleton_local_shards": False, "dp_cp_group": mesh.dp_cp_group})
        apply_factories(sharded)
        for part in nested_values(sharded):
            shape, offset = tuple(part.global_shape), tuple(part.global_offset)
            value = part.data.detach().clone()
            pieces.append((part.key, shape, offset, value.view((1,) * (len(shape) - value.dim()) + value.shape)))
    return pieces


def assembled(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    """Return the whole parameters that the pieces of all ranks make up, to the last element."""
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, value in pieces:
        tensor = whole.setdefault(key, torch.full(shape, torch.nan))
        tensor[tuple(slice(start, start + size) for start, size in zip(offset, value.shape))] = value
    assert not any(value.isnan().any() for value in whole.values())
    return whole


def write_in_turn(config: Config, folder: Path, world_size: int) -> dict[str, torch.Tensor]:
    """Write a checkpoint of weights as its ranks would, one after the other; return the whole parameters."""
    folder.mkdir()
    device.prepare()
    pieces: list[Piece] = []
    chunks, stored = defaultdict(dict), {}
    for rank in range(world_size):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        mesh = meshes.cut(config)
        model = build_chunks(config, mesh)
        stir(SimpleNamespace(mesh=mesh, chunks=model), seed=3)
        own = pieces_of(model, mesh)
        with (folder / f"__{rank}_0.distcp").open("wb") as file:
            for key, _, offset, value in own:
                if offset not in chunks[key]:  # another rank has the same
                    start = file.tell()
                    torch.save(value, file)
                    chunks[key][offset] = ChunkStorageMetadata(torch.Size(offset), value.shape)
                    place = MetadataIndex(key, torch.Size(offset))
                    stored[place] = _StorageInfo(file.name.rpartition("/")[2], start, file.tell() - start)
        pieces += own
        meshes.leave()
    with (folder / "common.distcp").open("wb") as file:
        torch.save([{}], file)
        stored[MetadataIndex("common_state/shard_0_1")] = _StorageInfo("common.distcp", 0, file.tell())
    described = {
        key: TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), list(chunks[key].values()))
        for key, shape, _, _ in pieces
    }
    described["common_state/shard_0_1"] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=stored)))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"step": 0, "bytes": sizes}))
    return assembled(pieces)


def load_pieces(config: Config, path: Path) -> list[Piece]:
    mesh = meshes.cut(config)
    chunks = build_chunks(config, mesh)
    load_weights(chunks, config=config, mesh=mesh, path=path)
    return pieces_of(chunks, mesh)


def test_the_shards_of_64_ranks_load_at_other_layouts(shards: Path, tmp_path: Path) -> None:
    """TP8 PP8, as the 88B is trained; the layouts see each parameter whole and where it belongs."""
    small = ("model.num_attention_heads=8", "model.head_dim=4")
    config = small_config(shards, tmp_path, *small, *layout("tp=8 pp=8"))
    expected = run_alone(write_in_turn, config, tmp_path / "saved", 64)
    reader = CheckpointReader(tmp_path / "saved")  # what exports read with
    for name, info in reader.tensors.items():
        assert reader.read_rows(name, 0, info.shape[0]).shape == info.shape
    for text, ranks in (("", 1), ("tp=2 pp=2", 4)):
        found = run_ranks(ranks, load_pieces, small_config(shards, tmp_path, *small, *layout(text)), tmp_path / "saved")
        whole = assembled([piece for rank in found for piece in rank])
        assert whole.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(whole[key], value), key


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_kind_of_parameter_is_saved(precision: str, shards: Path, tmp_path: Path) -> None:
    kinds = [f"training.precision={precision}", *TRAINED, *layout("tp=2")]
    run_ranks(2, go_on, small_run(shards, tmp_path, *kinds), stop=2, save=True)
    whole = run_ranks(2, go_on, small_run(shards, tmp_path / "whole", *kinds), stop=4)
    rest = run_ranks(2, go_on, small_run(shards, tmp_path, *kinds), stop=4)
    for rank in range(2):
        for name, weight in whole[rank]["weights"].items():
            assert torch.equal(rest[rank]["weights"][name], weight), name


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run_dir with checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("saved")
    run_ranks(1, save_each, small_run(shards, run_dir), steps=2)
    return run_dir


def save_each(config: Config, *, steps: int) -> list[str]:
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    for step in range(steps):
        train_step(state, loader.step(step))
        checkpoints.save(state)
    return sorted(path.name for path in checkpoints.folder(config).iterdir())


def test_only_the_newest_are_kept(shards: Path, tmp_path: Path) -> None:
    (names,) = run_ranks(
        1, save_each, small_run(shards, tmp_path, "checkpoint.keep=2", "checkpoint.interval=1"), steps=4
    )
    assert names == ["step_00000003", "step_00000004"]


def test_a_half_written_checkpoint_is_not_a_checkpoint(saved: Path, shards: Path) -> None:
    config = small_run(shards, saved)
    partial = checkpoints.folder(config) / "step_00000009.partial"
    partial.mkdir()
    assert checkpoints.newest(config).name == "step_00000002"
    partial.rmdir()


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: os.truncate(next(path.glob("*.distcp")), 100), "has 100 bytes, its manifest says"),
        (lambda path: next(path.glob("*.distcp")).unlink(), "distcp is missing"),
        (lambda path: flip(next(path.glob("*.distcp"))), "other bytes than were written"),
        (lambda path: shutil.copy(path.with_name("step_00000001") / "manifest.json", path), "stale or damaged"),
        (lambda path: (path / ".metadata").unlink(), ".metadata is missing"),
        (lambda path: (path / "manifest.json").write_text("{"), "COMMITTED cannot be read"),
    ],
    ids=["cut", "missing", "flipped", "stale-manifest", "no-metadata", "no-manifest"],
)
def test_a_damaged_checkpoint_is_refused_with_its_file(
    damage, message: str, saved: Path, shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    config = small_run(shards, tmp_path)
    damage(checkpoints.newest(config))
    with pytest.raises(AssertionError, match=message) as failure:
        run_ranks(1, go_on, config, stop=3)
    assert DataError.__name__ in str(failure.value)


def test_a_setting_that_must_not_change_is_named(saved: Path, shards: Path) -> None:
    for override in ("model.init_std=0.01", "data.seed=7", "image.num_layers=3", "training.precision=bf16"):
        with pytest.raises(AssertionError, match=override.split("=")[0]) as failure:
            run_ranks(1, go_on, small_run(shards, saved, override), stop=3)
        assert ConfigError.__name__ in str(failure.value)


def test_a_longer_run_goes_on(saved: Path, shards: Path) -> None:
    (seen,) = run_ranks(1, go_on, small_run(shards, saved, "training.steps=9"), stop=3)
    assert seen["first"] == 2


def test_the_manifest_lists_every_file(saved: Path, shards: Path) -> None:
    path = checkpoints.newest(small_run(shards, saved))
    listed = json.loads((path / "manifest.json").read_text())["bytes"]
    assert listed.keys() == {file.name for file in path.iterdir()} - {"manifest.json", "COMMITTED"}
