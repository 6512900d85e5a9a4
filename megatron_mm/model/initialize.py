"""Initial weights that do not depend on the layout: each is a function of (seed, parameter name, global index).

A tensor, pipeline or data rank draws only the elements that it holds, on its own device, and every layout starts from
the same model. The generator is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the
global index is hashed with SplitMix64's finalizer (Steele et al. 2014) and made normal by Box and Muller (1958).
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from megatron_mm.config import Config
from megatron_mm.engine.mesh import Mesh

ELEMENTS_AT_ONCE = 1 << 22
"""Elements drawn together: bounds the memory of the hash, 8 bytes each, to a few times 32 MiB."""


def initialize_weights(chunk: nn.Module, *, config: Config, mesh: Mesh) -> None:
    """Give every parameter of model chunk `chunk` its initial value. No communication.

    Norms start at one and biases at zero; matrices are normal with model.init_std, residual projections with
    init_std / sqrt(2 num_layers) (Radford et al. 2019); convolutions keep the variance of their input.
    """
    for name, parameter in chunk.named_parameters():
        rank, size = (mesh.tp_rank, mesh.tp_size) if getattr(parameter, "tensor_model_parallel", False) else (0, 1)
        global_name = name_in_whole_model(chunk, name)
        std = _std(global_name, parameter, config)
        if std is None:
            nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        else:
            draw_normal(parameter, std=std, key=_key(config.training.seed, global_name), tp_rank=rank, tp_size=size)
    for module in chunk.modules():
        _start_weight_norm_at_identity(module)


@torch.no_grad()
def draw_normal(parameter: Tensor, *, std: float, key: int, tp_rank: int, tp_size: int) -> None:
    """Fill `parameter`, a tensor rank's shard, with its part of the whole tensor's normal values. No communication."""
    rows, columns = _global_rows_and_columns(parameter, tp_rank=tp_rank, tp_size=tp_size)
    width = int(columns[-1]) + 1 if tp_size == 1 else _global_width(parameter, tp_size)
    flat = parameter.view(rows.numel(), columns.numel())
    rows_at_once = max(1, ELEMENTS_AT_ONCE // columns.numel())
    for start in range(0, rows.numel(), rows_at_once):
        indices = rows[start : start + rows_at_once, None] * width + columns[None, :]
        flat[start : start + rows_at_once].copy_(normal_of(indices, key=key) * std)


def normal_of(indices: Tensor, *, key: int) -> Tensor:
    """Return the standard normal value of each global index, float64: a pure function of (key, index)."""
    bits = _mix(indices + _signed(key))
    uniform_1 = ((bits >> 32) & 0xFFFFFFFF).double().add_(0.5).mul_(2.0**-32)
    uniform_2 = (bits & 0xFFFFFFFF).double().mul_(2.0**-32)
    return uniform_1.log_().mul_(-2.0).sqrt_().mul_(uniform_2.mul_(2.0 * math.pi).cos_())


def _mix(counter: Tensor) -> Tensor:
    """SplitMix64's finalizer over int64 tensors, whose products wrap as uint64's do."""
    bits = counter * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ _shift(bits, shift)) * _signed(factor)
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, count: int) -> Tensor:
    """A logical right shift: torch's is arithmetic."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def name_in_whole_model(chunk: nn.Module, name: str) -> str:
    """Return `name` with the layer's number in the whole model: layer 0 of a later stage is not the first."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
    return ".".join(parts)


def _std(name: str, parameter: Tensor, config: Config) -> float | None:
    """Return the standard deviation of new values, None for a constant."""
    if name.endswith("bias") or ("norm" in name and parameter.dim() == 1):
        return None
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return config.model.init_std / math.sqrt(2 * config.model.num_layers)
    if ".tower." in name and "conv" in name:
        return math.sqrt(2.0 / math.prod(parameter.shape[1:]))
    return config.model.init_std


def _global_rows_and_columns(parameter: Tensor, *, tp_rank: int, tp_size: int) -> tuple[Tensor, Tensor]:
    """Return the global index of each local row (first dimension) and column (all others) of a shard."""
    device = parameter.device
    num_rows = parameter.shape[0] if parameter.dim() > 1 else 1
    rows = torch.arange(num_rows, device=device)
    columns = torch.arange(parameter.numel() // num_rows, device=device)
    if tp_size > 1 and parameter.partition_dim == 0:
        # A SwiGLU weight is [gate; up], each sharded: partition_stride blocks of rows, this rank's part of each.
        part = num_rows // parameter.partition_stride
        rows = (rows // part) * part * tp_size + tp_rank * part + rows % part
    elif tp_size > 1:
        assert parameter.partition_dim == 1 and parameter.dim() == 2
        columns = columns + tp_rank * parameter.shape[1]
    return rows, columns


def _global_width(parameter: Tensor, tp_size: int) -> int:
    local = parameter.numel() // parameter.shape[0]
    return local * tp_size if parameter.partition_dim == 1 else local


def _start_weight_norm_at_identity(module: nn.Module) -> None:
    """Set the magnitude of a weight-normalised convolution to the norm of its direction, as its definition does."""
    weight = getattr(getattr(module, "parametrizations", None), "weight", None)
    if weight is not None:
        with torch.no_grad():
            direction = weight.original1
            weight.original0.copy_(direction.float().norm(dim=(0, 1), keepdim=True).to(direction.dtype))
