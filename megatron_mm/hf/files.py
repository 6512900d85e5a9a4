"""The files of an export that are not weights, written for transformers 4.57 and 5 alike, without importing either."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.hf.sources import describe_data
from megatron_mm.hf.weight_map import MediaMap
from megatron_mm.modalities import BY_NAME, MODALITIES
from megatron_mm.modalities.exports import Exports, Stock
from megatron_mm.tokenizer import SPECIAL_TOKENS, TextTokenizer

CODE = Path(__file__).parent / "code"
MANIFEST = "conversion_manifest.json"
"""Lists the sha256 of every other file of an export."""
CARD = "README.md"
EXPORTS: Mapping[str, Exports] = {modality.name: modality.part("hf").EXPORTS for modality in MODALITIES}
"""The part of each modality in Hugging Face folders, by its name."""
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}
MEDIA
{%- endif %}
{%- endfor %}
{%- endif %}
{%- if not loop.last %}{{ '\\n' }}{% endif %}
{%- endfor %}
""".replace(
    "MEDIA",
    "\n".join(f"{{%- elif part['type'] == '{name}' %}}{{{{ '{SPECIAL_TOKENS[name]}' }}}}" for name in EXPORTS),
)
"""A pretrained model knows no roles: messages follow one another, media where they stand."""
FULL_CLASSES = {
    "AutoConfig": "configuration_megatron_mm.MegatronMMConfig",
    "AutoModel": "modeling_megatron_mm.MegatronMMModel",
    "AutoModelForCausalLM": "modeling_megatron_mm.MegatronMMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_megatron_mm.MegatronMMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_megatron_mm.MegatronMMForConditionalGeneration",
    "AutoProcessor": "processing_megatron_mm.MegatronMMProcessor",
}
FULL_PROJECTORS = {"projector_hidden_act": "gelu", "projector_layernorm_eps": 1e-5}
"""What features go through on their way into the decoder, in an export that carries its code."""
LISTED = "modalities_megatron_mm.py"
"""The file of that code that says which modalities there are."""
LISTED_CODE = '''"""The modalities beside text of this export, and what the settings of its processor are called."""

{imports}
MODALITIES = ({modalities},)


class ProcessorSettings:
    """Has the arguments of the processor by their names: transformers reads them off."""

    def __init__(self, {arguments}, **kwargs):
        self.set_up(dict({given}))
'''


def media_map(name: str, config: Config) -> MediaMap:
    """Return the names of a modality's tensors, here and in exports."""
    section = config.encoders[name]
    return MediaMap(EXPORTS[name], BY_NAME[name].family(section), section)


def write_files(
    folder: Path, *, kind: str, config: Config, tokenizer: TextTokenizer, dtype: torch.dtype, kv_replicate: int
) -> None:
    """Write everything but weights, index, card and manifest of an export of `kind`."""
    ids = {"eos_token_id": tokenizer.special_ids["end_of_text"], "pad_token_id": tokenizer.special_ids["pad"]}
    text = _text_config(config, kv_replicate=kv_replicate) | {"bos_token_id": None} | ids
    # transformers 4 reads torch_dtype, 5 reads dtype.
    precision = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    model = text if kind == "text" else _with_encoders(config, kind, text, tokenizer) | ids
    _write_json(folder / "config.json", model | {"bos_token_id": None, "tie_word_embeddings": False} | precision)
    _write_json(folder / "generation_config.json", ids | {"do_sample": False})
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(config))
    _write_json(folder / "special_tokens_map.json", _END_AND_PAD)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    if kind != "text":
        # transformers 5 reads the parts from one file, 4 all of them from another.
        parts, own = _processor(config, kind)
        _write_json(folder / "processor_config.json", own | parts)
        _write_json(
            folder / "preprocessor_config.json", own | {k: v for part in parts.values() for k, v in part.items()}
        )
    if kind == "full":
        _write_code(folder, config)
    elif kind != "text":
        for name, values in EXPORTS[kind].stock.files(config.encoders[kind]).items():
            _write_json(folder / name, values)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _text_config(config: Config, *, kv_replicate: int) -> dict[str, Any]:
    """Return the configuration of Llama, or of Qwen3, which is Llama with norms on queries and keys."""
    model = config.model
    kind, architecture = ("qwen3", "Qwen3ForCausalLM") if model.qk_norm else ("llama", "LlamaForCausalLM")
    extra = {"use_sliding_window": False, "sliding_window": None} if model.qk_norm else {"mlp_bias": False}
    return {
        "architectures": [architecture],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups * kv_replicate,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_epsilon,
        # Both: transformers 4 would take 10,000 in silence if it found only the second.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "max_position_embeddings": config.data.seq_len,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
        "use_cache": True,
        **extra,
    }


def _with_encoders(config: Config, kind: str, text: dict[str, Any], tokenizer: TextTokenizer) -> dict[str, Any]:
    """Return the config.json of an export that has encoders: one of them in a stock class, or all."""
    stock = None if kind == "full" else EXPORTS[kind].stock
    values: dict[str, Any] = {
        "architectures": [stock.architecture if stock else "MegatronMMForConditionalGeneration"],
        "model_type": stock.model_type if stock else "megatron_mm",
        **({} if stock else {"auto_map": FULL_CLASSES}),
        "text_config": text,
    }
    for name in EXPORTS if stock is None else (kind,):
        exports, section = EXPORTS[name], config.encoders[name]
        values[exports.describes] = BY_NAME[name].family(section).description(section)
        values[f"{name}_token_id"] = tokenizer.special_ids[name]
        if stock:
            values[f"{name}_token_index"] = tokenizer.special_ids[name]
        values |= stock.config(section) if stock else exports.config(section)
    return values if stock else values | FULL_PROJECTORS


def _write_code(folder: Path, config: Config) -> None:
    """Write the code that a full export carries: what composes the model, and a file for each modality.

    transformers finds the files by their relative imports: 4 copies only those that a file names itself, so every one
    that imports the list of modalities names them all.
    """
    imports = "".join(f"from .{name}_megatron_mm import MODALITY as {name}\n" for name in EXPORTS)
    listed = f"from .{LISTED.removesuffix('.py')} import"
    for file in sorted(CODE.glob("*.py")):
        if file.name != LISTED:
            (folder / file.name).write_text(file.read_text().replace(listed, f"{imports}{listed}", 1))
    for modality in MODALITIES:
        code = Path(modality.part("spec").__file__).with_name("exported.py").read_text()
        (folder / f"{modality.name}_megatron_mm.py").write_text(code)
    parts, own = _processor(config, "full")
    defaults = dict.fromkeys((*parts, "tokenizer")) | own | {"chat_template": None}
    names = [name for name in defaults if name not in ("processor_class", "auto_map")]
    code = LISTED_CODE.format(
        imports=imports,
        modalities=", ".join(EXPORTS),
        arguments=", ".join(f"{name}={defaults[name]!r}" for name in names),
        given=", ".join(f"{name}={name}" for name in names),
    )
    (folder / LISTED).write_text(code)


_END_AND_PAD = {"eos_token": SPECIAL_TOKENS["end_of_text"], "pad_token": SPECIAL_TOKENS["pad"]}


def _tokenizer_config(config: Config) -> dict[str, Any]:
    names = {}
    for name, exports in EXPORTS.items():
        start, placeholder, end = (SPECIAL_TOKENS[role] for role in BY_NAME[name].special_tokens)
        names |= {f"start_{name}_token": start, f"end_{name}_token": end}
        names |= {f"context_{name}_token": placeholder, f"{name}_token": placeholder}
        if exports.stock:
            names |= {token: SPECIAL_TOKENS[role] for token, role in exports.stock.token_names.items()}
    return _END_AND_PAD | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.data.seq_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "extra_special_tokens": names,
    }


def _processor(config: Config, kind: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the parts of the processor of an export, and the settings of its own."""
    if kind != "full":
        stock: Stock = EXPORTS[kind].stock
        return stock.processor(config.encoders[kind])
    parts: dict[str, dict[str, Any]] = {}
    own = {"processor_class": "MegatronMMProcessor", "auto_map": {"AutoProcessor": FULL_CLASSES["AutoProcessor"]}}
    for name, exports in EXPORTS.items():
        its_parts, its_own = exports.processor(config.encoders[name])
        parts, own = parts | its_parts, own | its_own
    return parts, own


def model_card(config: Config, *, kind: str, step: int, figures: dict[str, Any]) -> str:
    """Return the README.md of an export: what it is, what was checked, on which data and how it was trained."""
    loading = {
        "text": "AutoModelForCausalLM.from_pretrained(folder)",
        "full": "AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)",
    }
    takes = {"text": "text", "full": ", ".join(["text", *(own.takes for own in EXPORTS.values())]) + " and PDFs"}
    pipelines = {"text": "text-generation", "full": "any-to-any"}
    if kind not in loading:
        stock = EXPORTS[kind].stock
        loading[kind] = f"{stock.auto_class}.from_pretrained(folder)"
        takes[kind], pipelines[kind] = f"text and {EXPORTS[kind].takes}", stock.pipeline
    what = takes[kind]
    checks = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""---
library_name: transformers
pipeline_tag: {pipelines[kind]}
---
# {Path(config.run_dir).name}, step {step}

A pretrained (not instruction-tuned) decoder that continues {what}, exported from a megatron_mm training checkpoint.

```python
import hashlib, json
from pathlib import Path
from transformers import *

folder = Path(FOLDER)
for name, digest in json.loads((folder / "{MANIFEST}").read_text())["sha256"].items():
    found = hashlib.file_digest(open(folder / name, "rb"), "sha256").hexdigest()
    assert found == digest or name == "{CARD}", f"{{name}} is damaged"
model = {loading[kind]}
```

Trained for {step:,} steps, the last of {config.tokens_per_step:,} positions (text, media and padding). No licence is
stated here: whoever publishes the weights adds it.

## What was checked

| check | result |
|---|---|
{checks}

## The data

{describe_data(config)}
## The run

```yaml
{configs.to_yaml(config)}```
"""
