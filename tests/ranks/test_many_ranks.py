"""A checkpoint of TP8 x PP8, which 64 ranks write, loads in any other layout."""

import json
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launch import run_isolated, run_ranks
from small import layout, small_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.hf.tensors import CheckpointReader
from megatron_mm.model.multimodal import build_chunks
from megatron_mm.parallel import device
from megatron_mm.parallel import mesh as meshes
from megatron_mm.training.start import load_weights
from megatron_mm.training.state import build_state

EIGHT = ("model.num_attention_heads=8", "model.ffn_hidden_size=64", "model.head_dim=8")


def save_by_64_ranks(config: Config, folder: Path) -> None:
    """Be each of the ranks of TP8 x PP8 in turn, and write the pieces of the initial weights that it would."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
    from torch.testing._internal.distributed.fake_pg import FakeStore

    folder.mkdir()
    device.prepare(0, 1)
    torch.set_num_threads(1)
    file = (folder / "__0_0.distcp").open("wb")
    chunks, whole, stored = defaultdict(list), {}, {}

    def append(value: Any) -> _StorageInfo:
        start = file.tell()
        torch.save(value, file)
        return _StorageInfo("__0_0.distcp", start, file.tell() - start)

    for rank in range(64):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=64)
        mesh = meshes.cut(config)
        for chunk in build_chunks(config, mesh):
            sharded = chunk.sharded_state_dict(
                metadata={"singleton_local_shards": False, "dp_cp_group": mesh.dp_cp_group}
            )
            apply_factories(sharded)
            for part in nested_values(sharded):
                if not isinstance(part, ShardedTensor) or not is_main_replica(part.replica_id):
                    continue
                value = part.data.detach().view(*(1,) * part.prepend_axis_num, *part.local_shape).clone()
                place = torch.Size(part.global_offset)
                assert MetadataIndex(part.key, place) not in stored
                whole[part.key] = (torch.Size(part.global_shape), value.dtype)
                chunks[part.key].append(ChunkStorageMetadata(place, value.shape))
                stored[MetadataIndex(part.key, place)] = append(value)
        dist.destroy_process_group()
    stored[MetadataIndex("common_state/shard_0_1")] = append([{}])
    file.close()
    described = {
        key: TensorStorageMetadata(TensorProperties(dtype), size, chunks[key]) for key, (size, dtype) in whole.items()
    }
    described["common_state/shard_0_1"] = BytesStorageMetadata()
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=stored)))
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"step": 0, "bytes": sizes}))


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many") / "step_00000000"
    config = small_config(shards, "unused", *EIGHT, *layout("tp=8 pp=8"))
    run_isolated(save_by_64_ranks, config, folder)
    return folder


def initial_and_loaded(config: Config, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return this rank's initial weights, and what it loads over zeros."""
    state = build_state(config, meshes.cut(config))
    named = [(f"{number}.{name}", p) for number, c in enumerate(state.chunks) for name, p in c.named_parameters()]
    initial = {name: parameter.detach().clone() for name, parameter in named}
    with torch.no_grad():
        for _, parameter in named:
            parameter.zero_()
    load_weights(state.chunks, config=config, mesh=state.mesh, path=path)
    return initial, {name: parameter.detach().clone() for name, parameter in named}


@pytest.mark.parametrize(("text", "ranks"), [("", 1), ("tp=2 pp=2", 4)])
def test_what_64_ranks_saved_loads_in_another_layout(text: str, ranks: int, saved: Path, shards: Path) -> None:
    """Initial weights are those of a parameter's name and place alone, so any layout knows what the 64 ranks had."""
    config = small_config(shards, "unused", *EIGHT, *layout(text))
    for initial, loaded in run_ranks(ranks, initial_and_loaded, config, saved):
        assert sum(value.abs().sum() for value in initial.values()) > 0
        assert all(torch.equal(loaded[name], value) for name, value in initial.items())


def test_the_pieces_of_64_ranks_are_read_whole(saved: Path) -> None:
    reader = CheckpointReader(saved)
    reader.check()
    pieces = {name: len(reader._chunks[name]) for name in reader.tensors}
    assert pieces["decoder.layers.5.self_attention.linear_proj.weight"] == 8
    for name, info in reader.tensors.items():
        assert reader.read_rows(name, 0, info.shape[0]).shape == info.shape
