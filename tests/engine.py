"""TransformerEngine's own Python layers, importable without a GPU and without its compiled half.

The compiled half takes half an hour to build on two cores and cannot run without a GPU. What can be checked without it
- which parameters its layers have, their attributes and checkpoint keys, what its functions take - is all Python.
"""

import enum
import inspect
import os
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

FOLDER = Path(__file__).parents[1] / "build" / "transformer_engine"
"""Where `make setup` puts the package's Python part, out of sight of everything else."""
ONE_STAGE = ("parallel.pp=1", "parallel.vpp=1")
ENUMS = {
    "DType": "kByte kInt32 kFloat32 kFloat16 kBFloat16 kFloat8E4M3 kFloat8E5M2 kFloat4E2M1",
    "NVTE_Fused_Attn_Backend": "NVTE_No_Backend NVTE_F16_arbitrary_seqlen NVTE_FP8",
}
"""Enumerations of the compiled half whose members its Python part checks."""


def import_engine() -> ModuleType:
    """Import transformer_engine.pytorch over a stand-in for its compiled half, in a fresh process, and return it."""
    assert "transformer_engine" not in sys.modules
    if find_spec("transformer_engine") is None:
        sys.path.append(str(FOLDER))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # its name for: load no library
    compiled = MagicMock(name="transformer_engine_torch")
    for name, members in ENUMS.items():
        setattr(compiled, name, enum.IntEnum(name, members))
    absent = [name for name in ("onnx", "onnxscript", "einops") if name not in sys.modules and find_spec(name) is None]
    sys.modules.update({name: MagicMock(name=name, __spec__=ModuleSpec(name, None)) for name in absent})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the compiled half is not there
        import transformer_engine.common as common
    sys.modules["transformer_engine_torch"] = compiled
    common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch as engine

    for name in absent:
        del sys.modules[name]
    return engine


def _allow(name: str, on: str) -> None:
    """Let backend `name` build its layers on a device, whatever this machine has. Before any other import."""
    if name != "local":
        import_engine()
    import torch

    from megatron_mm.engine import device, patches

    if on == "meta":
        device.use_meta()
    else:
        device.current = lambda: device.CPU
        patches.install(device.current, gpu=False)
    torch.cuda.is_available = lambda: True  # its layers refuse to be built without, wherever they are
    from megatron_mm.model import backend as backends

    backends._refuse = lambda *_, **__: None


def saved_by(name: str, folder: str, preset: str, *overrides: str) -> dict[str, Any]:
    """Save noise as the weights of a model of backend `name`, on one rank; return it by parameter."""
    _allow(name, "cpu")
    import json

    import torch
    from megatron.core import dist_checkpointing
    from torch import distributed as dist

    from megatron_mm import config as configs
    from megatron_mm.engine import mesh
    from megatron_mm.model.multimodal import build_chunks

    config = configs.load(preset, [f"training.backend={name}", "parallel.tp_comm_overlap=false", *overrides])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = mesh.cut(config)
    (model,) = build_chunks(config, ranks)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    path = Path(folder)
    path.mkdir()
    metadata = {"singleton_local_shards": False, "dp_cp_group": ranks.dp_cp_group}
    dist_checkpointing.save(
        model.sharded_state_dict(metadata=metadata), folder, content_metadata=metadata | {"dp_cp_group": 0}
    )
    (path / "config.yaml").write_text(configs.to_yaml(config))
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps({"step": 0, "bytes": sizes}))
    layers = type(model.decoder.layers[0].mlp.linear_fc1).__module__
    return {"weights": {key: value.detach().clone() for key, value in model.named_parameters()}, "layers": layers}


def parameters_of_a_rank(name: str, on: str, preset: str, *overrides: str) -> dict[str, dict]:
    """Return parameters and checkpoint keys of rank 1 of one tensor-parallel group, in backend `name` on a device."""
    _allow(name, on)
    import torch
    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_mm import config as configs
    from megatron_mm.engine import mesh
    from megatron_mm.model.multimodal import build_chunks

    config = configs.load(preset, [f"training.backend={name}", "parallel.tp_comm_overlap=false", *overrides])
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=config.parallel.tp)
    ranks = mesh.cut(config)
    with torch.device(on):
        (model,) = build_chunks(config, ranks)
    attributes = ("sequence_parallel", "tensor_model_parallel", "partition_dim", "partition_stride")
    parameters = {
        key: (tuple(value.shape), value.dtype, *(getattr(value, each, None) for each in attributes if on != "meta"))
        for key, value in model.named_parameters()
    }
    sharded = model.sharded_state_dict(metadata={"dp_cp_group": ranks.dp_cp_group})
    keys = {
        key: (value.key, value.global_shape, value.global_offset, value.local_shape, value.replica_id)
        for key, value in sharded.items()
        if hasattr(value, "global_offset")
    }
    factories = {key: value.key for key, value in sharded.items() if key not in keys}
    sums = {} if on == "meta" else {key: value.double().sum().item() for key, value in model.named_parameters()}
    return {"parameters": parameters, "keys": keys, "factories": factories, "initial": sums}


def at_full_size(preset: str) -> tuple[dict[str, dict], dict[str, Any]]:
    """Return `parameters_of_a_rank` of TransformerEngine's layers at the size of `preset`, on meta, and our arguments
    of its initialize_ub, bound to its signature."""
    found = parameters_of_a_rank("transformer_engine", "meta", preset, *ONE_STAGE)
    import transformer_engine.pytorch as engine

    from megatron_mm import config as configs
    from megatron_mm.model.transformer_engine import user_buffers

    arguments = inspect.signature(engine.module.base.initialize_ub).bind(**user_buffers(configs.load(preset))).arguments
    return found, arguments | {"quantization_modes": [mode.name for mode in arguments["quantization_modes"]]}
