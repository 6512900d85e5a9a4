"""The files of an export that are not weights, written for transformers 4.57 and 5 alike, without importing either."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.modality import (
    CHUNK_SAMPLES,
    CONV_KERNELS,
    CONV_STRIDES,
    IMAGE_SIZE,
    IMAGE_TOKENS,
    PATCH_SIZE,
    SAMPLE_RATE,
)
from megatron_mm.tokenizer import SPECIAL_TOKENS, TextTokenizer

CODE = Path(__file__).parent / "code"
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'text' %}{{ part['text'] }}
{%- elif part['type'] == 'image' %}{{ '<|image|>' }}
{%- elif part['type'] == 'audio' %}{{ '<|audio|>' }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- if not loop.last %}{{ '\\n' }}{% endif %}
{%- endfor %}
"""
"""A pretrained model knows no roles: messages follow one another, media where they stand."""
FULL_CLASSES = {
    "AutoConfig": "configuration_megatron_mm.MegatronMMConfig",
    "AutoModel": "modeling_megatron_mm.MegatronMMModel",
    "AutoModelForCausalLM": "modeling_megatron_mm.MegatronMMForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_megatron_mm.MegatronMMForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_megatron_mm.MegatronMMForConditionalGeneration",
    "AutoProcessor": "processing_megatron_mm.MegatronMMProcessor",
}


def write_files(
    folder: Path, *, kind: str, config: Config, tokenizer: TextTokenizer, dtype: torch.dtype, kv_replicate: int
) -> None:
    """Write everything but weights, index, card and manifest of an export of `kind` (text, image or full)."""
    ids = {"eos_token_id": tokenizer.special_ids["end_of_text"], "pad_token_id": tokenizer.special_ids["pad"]}
    text = _text_config(config, kv_replicate=kv_replicate) | {"bos_token_id": None} | ids
    # transformers 4 reads torch_dtype, 5 reads dtype.
    precision = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    model = {"text": {}, "image": _image_config, "full": _full_config}[kind]
    values = model(config, text, tokenizer) | ids if model else text
    _write_json(folder / "config.json", values | {"bos_token_id": None, "tie_word_embeddings": False} | precision)
    _write_json(folder / "generation_config.json", ids | {"do_sample": False})
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(config))
    _write_json(folder / "special_tokens_map.json", _END_AND_PAD)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    if kind != "text":
        # transformers 5 reads the parts from one file, 4 all of them from another.
        parts, own = _processor_parts(config, kind=kind)
        _write_json(folder / "processor_config.json", own | parts)
        _write_json(
            folder / "preprocessor_config.json", own | {k: v for part in parts.values() for k, v in part.items()}
        )
    if kind == "image":
        _write_json(
            folder / "video_preprocessor_config.json", {"video_processor_type": "InternVLVideoProcessor", **_SQUASH}
        )
    if kind == "full":
        for file in sorted(CODE.glob("*.py")):
            (folder / file.name).write_text(file.read_text())


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


STOCK_PROJECTOR = {
    "downsample_ratio": 1.0,
    "projector_hidden_act": "gelu",
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
FULL_PROJECTORS = {
    "audio_chunk_samples": CHUNK_SAMPLES,
    "projector_hidden_act": "gelu",
    "projector_layernorm_eps": 1e-5,
}
"""What features go through on their way into the decoder, in the two kinds of export that have encoders."""


def vision_config(config: Config) -> dict[str, Any]:
    """Return the image encoder's: a ViT whose final norm is the identity and whose LayerScale is one."""
    return {
        "model_type": "internvl_vision",
        "architectures": ["InternVLVisionModel"],
        "hidden_size": config.image.hidden_size,
        "num_hidden_layers": config.image.num_layers,
        "num_attention_heads": config.image.num_attention_heads,
        "intermediate_size": config.image.ffn_hidden_size,
        "image_size": [IMAGE_SIZE, IMAGE_SIZE],
        "patch_size": [PATCH_SIZE, PATCH_SIZE],
        "attention_bias": True,
        "use_qk_norm": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "use_mean_pooling": True,
        "layer_scale_init_value": 1.0,
        "use_absolute_position_embeddings": True,
    }


def audio_config(config: Config) -> dict[str, Any]:
    """Return the sound encoder's: a Wav2Vec 2.0 of one of its two forms, without dropout and masking."""
    audio, layer_norm = config.audio, config.audio.form == "lv60k"
    dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop")
    return {
        "model_type": "wav2vec2",
        "architectures": ["Wav2Vec2Model"],
        "hidden_size": audio.hidden_size,
        "num_hidden_layers": audio.num_layers,
        "num_attention_heads": audio.num_attention_heads,
        "intermediate_size": audio.ffn_hidden_size,
        "conv_dim": [audio.conv_channels] * len(CONV_KERNELS),
        "conv_kernel": list(CONV_KERNELS),
        "conv_stride": list(CONV_STRIDES),
        "conv_bias": layer_norm,
        "feat_extract_norm": "layer" if layer_norm else "group",
        "do_stable_layer_norm": layer_norm,
        "num_conv_pos_embeddings": audio.pos_conv_kernel,
        "num_conv_pos_embedding_groups": audio.pos_conv_groups,
        "layer_norm_eps": 1e-5,
        **dict.fromkeys((*dropouts, "mask_time_prob", "mask_feature_prob"), 0.0),
    }


def _image_config(config: Config, text: dict[str, Any], tokenizer: TextTokenizer) -> dict[str, Any]:
    image_id = tokenizer.special_ids["image"]
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "text_config": text,
        "vision_config": vision_config(config),
        "image_token_id": image_id,
        "image_token_index": image_id,
        "image_seq_length": IMAGE_TOKENS,
        **STOCK_PROJECTOR,
    }


def _full_config(config: Config, text: dict[str, Any], tokenizer: TextTokenizer) -> dict[str, Any]:
    image_id, audio_id = tokenizer.special_ids["image"], tokenizer.special_ids["audio"]
    return {
        "architectures": ["MegatronMMForConditionalGeneration"],
        "model_type": "megatron_mm",
        "auto_map": FULL_CLASSES,
        "text_config": text,
        "vision_config": vision_config(config),
        "audio_config": audio_config(config),
        "image_token_id": image_id,
        "audio_token_id": audio_id,
        "image_seq_length": IMAGE_TOKENS,
        **FULL_PROJECTORS,
    }


_END_AND_PAD = {"eos_token": SPECIAL_TOKENS["end_of_text"], "pad_token": SPECIAL_TOKENS["pad"]}
_SQUASH = {
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,  # bicubic
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}


def _tokenizer_config(config: Config) -> dict[str, Any]:
    names = {
        "start_image_token": SPECIAL_TOKENS["image_start"],
        "end_image_token": SPECIAL_TOKENS["image_end"],
        "context_image_token": SPECIAL_TOKENS["image"],
        "image_token": SPECIAL_TOKENS["image"],
        "start_audio_token": SPECIAL_TOKENS["audio_start"],
        "end_audio_token": SPECIAL_TOKENS["audio_end"],
        "context_audio_token": SPECIAL_TOKENS["audio"],
        "audio_token": SPECIAL_TOKENS["audio"],
        # InternVL's processor wants one; a text+image model has no other use for this token.
        "video_token": SPECIAL_TOKENS["audio"],
    }
    return _END_AND_PAD | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.data.seq_len,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "extra_special_tokens": names,
    }


def _processor_parts(config: Config, *, kind: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Return the parts of the processor of an export, and the settings of its own."""
    if kind == "image":
        image = {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": False, "max_patches": 1} | _SQUASH
        video = {"video_processor_type": "InternVLVideoProcessor"} | _SQUASH
        own = {"processor_class": "InternVLProcessor", "image_seq_length": IMAGE_TOKENS}
        return {"video_processor": video, "image_processor": image | {"min_patches": 1}}, own
    sound = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "return_attention_mask": True,
    }
    own = {
        "processor_class": "MegatronMMProcessor",
        "auto_map": {"AutoProcessor": FULL_CLASSES["AutoProcessor"]},
        "image_seq_length": IMAGE_TOKENS,
        "audio_chunk_samples": CHUNK_SAMPLES,
        # Not the feature extractor's do_normalize: transformers 4 reads one of that name for images and for sound.
        "normalize_audio": config.audio.form == "lv60k",
    }
    image = {"image_processor_type": "ViTImageProcessor"} | _SQUASH
    return {"feature_extractor": sound, "image_processor": image}, own


def model_card(config: Config, *, kind: str, step: int, figures: dict[str, Any]) -> str:
    """Return the README.md of an export: what it is, how it was trained, what was checked, how to load it."""
    loading = {
        "text": "AutoModelForCausalLM.from_pretrained(FOLDER)",
        "image": "AutoModelForImageTextToText.from_pretrained(FOLDER)",
        "full": "AutoModelForMultimodalLM.from_pretrained(FOLDER, trust_remote_code=True)",
    }[kind]
    what = {"text": "text", "image": "text and images", "full": "text, images, sound and PDFs"}[kind]
    pipeline = {"text": "text-generation", "image": "image-text-to-text", "full": "any-to-any"}[kind]
    checks = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
---
# {Path(config.run_dir).name}, step {step}

A pretrained (not instruction-tuned) decoder that continues {what}, exported from a megatron_mm training checkpoint.

```python
from transformers import *
model = {loading}
```

Trained for {step:,} steps, the last of {config.tokens_per_step:,} positions (text, media and padding). No licence is
stated here: whoever publishes the weights adds it.

## What was checked

| check | result |
|---|---|
{checks}

## The run

```yaml
{configs.to_yaml(config)}```
"""
