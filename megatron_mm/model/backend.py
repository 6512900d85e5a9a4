"""What decoder layers are built of: megatron-core's own linear layers, or TransformerEngine's.

Both name and shape their parameters alike, so a checkpoint of one is a checkpoint of the other. Which one runs, and
which attention, is decided once, by `choose`.
"""

from functools import partial
from importlib.util import find_spec

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_mm.config import Config
from megatron_mm.engine import device
from megatron_mm.errors import ConfigError
from megatron_mm.kernels.attention import stacking_ever_pays
from megatron_mm.model.core_attention import (
    DocumentAttention,
    VarlenAttention,
    defined,
    flash_attn_varlen,
    stacked,
    torch_sdpa,
    torch_varlen,
)
from megatron_mm.model.layer import Backend, ReplicatedLinear, RMSNorm, defer_add

DOCUMENT_FORMS = {"reference": defined, "sdpa": torch_sdpa, "stacked": stacked}
"""Forms of attention that take one document at a time."""
FP8_CAPABILITY = {"current": (8, 9), "delayed": (8, 9), "blockwise": (9, 0)}
"""The least CUDA compute capability of each FP8 recipe."""


def choose(config: Config) -> Backend:
    """Return the backend of this rank. Raises ConfigError if what `config` asks for cannot be had here.

    On the meta device nothing runs, so nothing is refused: what is not installed is built of its local counterpart.
    """
    kind = device.current().type
    wanted = config.training.backend
    missing = _transformer_engine_missing()
    if kind != "meta":
        _refuse(config, kind=kind, missing=missing)
    if wanted == "local" or missing or (wanted == "auto" and kind == "meta"):
        return local(_attention_form(config, kind=kind))
    from megatron_mm.model import transformer_engine  # needs TransformerEngine

    return transformer_engine.backend()


def local(attention: str = "sdpa") -> Backend:
    """Return the backend of megatron-core's linear layers with the named form of attention."""
    if attention in DOCUMENT_FORMS:
        build = partial(DocumentAttention, DOCUMENT_FORMS[attention])
    else:
        build = partial(VarlenAttention, flash_attn_varlen() if attention == "flash_attn" else torch_varlen)

    def core_attention(config: TransformerConfig, layer_number: int, tp_group: dist.ProcessGroup) -> nn.Module:
        return build()

    return Backend(
        name="local",
        attention=attention,
        column_linear=ColumnParallelLinear,
        row_linear=RowParallelLinear,
        replicated_linear=ReplicatedLinear,
        norm=RMSNorm,
        residual_add=defer_add,
        start=lambda config: None,
        core_attention=core_attention,
    )


def _transformer_engine_missing() -> str | None:
    """Return why TransformerEngine cannot be used, None if it can."""
    if not device.has_gpu():
        return "its kernels run on GPUs, and this rank is on the CPU"
    return None if find_spec("transformer_engine") else "it is not installed"


def _refuse(config: Config, *, kind: str, missing: str | None) -> None:
    training, failures = config.training, []
    needs = [
        setting
        for setting, on in (
            ("training.backend=transformer_engine", training.backend == "transformer_engine"),
            ("training.precision=fp8", training.precision == "fp8"),
            ("parallel.tp_comm_overlap=true", config.parallel.tp_comm_overlap),
        )
        if on
    ]
    if needs and missing:
        failures.append(
            f"{' and '.join(needs)} need TransformerEngine, but {missing}. Use training.backend=local "
            "training.precision=bf16 parallel.tp_comm_overlap=false."
        )
    elif training.precision == "fp8":
        least, found = FP8_CAPABILITY[training.fp8_recipe], torch.cuda.get_device_capability()
        if found < least:
            failures.append(
                f"training.precision=fp8 with training.fp8_recipe={training.fp8_recipe} needs a GPU of compute "
                f"capability {least[0]}.{least[1]} or more (H100: 9.0), and this rank's has {found[0]}.{found[1]} "
                "(A100: 8.0). Use training.precision=bf16."
            )
    if training.backend != "local" and not missing:
        failures += _ignored_by_transformer_engine(config)
    elif failure := _attention_failure(config, kind=kind):
        failures.append(failure)
    if failures:
        raise ConfigError("\n  ".join(failures))


def _ignored_by_transformer_engine(config: Config) -> list[str]:
    """Return the settings that TransformerEngine's layers, which run here, would not heed."""
    training = config.training
    own = {
        f"training.attention={training.attention}": training.attention != "auto",
        "training.kernels=reference": training.kernels == "reference",
    }
    return [
        f"{setting}, but TransformerEngine's layers run here (training.backend={training.backend}), which have an "
        "attention and norms of their own. Use training.backend=local, or auto in its place."
        for setting, given in own.items()
        if given
    ]


def _attention_failure(config: Config, *, kind: str) -> str | None:
    """Return why the local layers cannot run training.attention here, None if they can."""
    wanted, precision = config.training.attention, config.training.precision
    if kind == "cpu" and wanted in ("varlen", "flash_attn"):
        return f"training.attention={wanted} runs on GPUs, and this rank is on the CPU. Use auto."
    if wanted in ("varlen", "flash_attn") and precision == "fp32":
        return (
            f"training.attention={wanted} takes 16-bit operands, and training.precision=fp32. Use "
            "training.precision=bf16, or training.attention=sdpa."
        )
    if wanted == "flash_attn" and not _has_flash_attn():
        return "training.attention=flash_attn, but flash-attn is not installed. Use varlen, or auto."
    if wanted == "stacked" and (kind != "cpu" or precision != "fp32"):
        return (
            f"training.attention=stacked runs on CPUs in FP32, and this rank is on {kind} with training.precision="
            f"{precision}. Use auto."
        )
    if wanted == "stacked" and not _stacking_pays(config):
        return (
            "training.attention=stacked is never the faster one for so few heads that share keys, of so short a "
            "model.head_dim, and would never run. Use sdpa, or auto."
        )
    return None


def _stacking_pays(config: Config) -> bool:
    """Tell whether the stacked form is ever the faster one with these heads."""
    model, tp = config.model, config.parallel.tp
    shared = model.num_attention_heads // tp // max(1, model.num_query_groups // tp)
    return stacking_ever_pays(shared=shared, head_dim=model.head_dim, seq_len=config.data.seq_len)


def _attention_form(config: Config, *, kind: str) -> str:
    """Return the form of attention of the local layers."""
    wanted, fp32 = config.training.attention, config.training.precision == "fp32"
    if wanted in DOCUMENT_FORMS:
        return wanted
    if wanted == "auto" and config.training.kernels == "reference":
        return "reference"
    if kind != "cuda":
        return "stacked" if kind == "cpu" and fp32 and _stacking_pays(config) else "sdpa"
    if wanted != "auto":
        return wanted
    if fp32:  # flash kernels take 16-bit operands
        return "sdpa"
    return "flash_attn" if _has_flash_attn() else "varlen"


def _has_flash_attn() -> bool:
    return any(find_spec(name) for name in ("flash_attn_interface", "flash_attn"))
