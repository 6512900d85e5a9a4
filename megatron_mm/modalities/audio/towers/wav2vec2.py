"""Wav2Vec 2.0 (Baevski et al. 2020) in Hugging Face's module code; files of torchaudio and Hugging Face."""

from typing import Any

from torch import Tensor, nn

from megatron_mm.modalities.audio.spec import CONV_KERNELS, CONV_STRIDES, AudioConfig
from megatron_mm.modalities.family import Family

ABSENT = (
    *("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"),
    *("mask_time_prob", "mask_feature_prob"),
)
"""Dropout and masking of its own pretraining."""


class Wav2Vec2(Family):
    """Seven convolutions and a transformer, in the forms ls960 and lv60k."""

    names = (
        # torchaudio
        (r"^encoder\.feature_projection\.", "feature_projection."),
        (r"^encoder\.transformer\.", "encoder."),
        # Hugging Face
        (r"^wav2vec2\.", ""),
        # weight norm as older versions of torch keep it
        (r"\.conv\.weight_g$", ".conv.parametrizations.weight.original0"),
        (r"\.conv\.weight_v$", ".conv.parametrizations.weight.original1"),
    )
    left_behind = (
        r"(aux|lm_head|quantizer|project_q|project_hid|classifier|projector)\..*|(wav2vec2\.)?masked_spec_embed"
    )
    meaning = (
        *("num_attention_heads", "num_conv_pos_embedding_groups", "hidden_act", "feat_extract_activation"),
        *("feat_extract_norm", "do_stable_layer_norm", "conv_kernel", "conv_stride"),
    )
    sizes = "audio.form, num_layers, hidden_size, ffn_hidden_size"
    model_type = "wav2vec2"
    architecture = "Wav2Vec2Model"
    keys = {  # noqa: RUF012
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "pos_conv_kernel": "num_conv_pos_embeddings",
        "pos_conv_groups": "num_conv_pos_embedding_groups",
    }

    def build(self, config: AudioConfig) -> nn.Module:
        """Return a Wav2Vec2Model without dropout and masking."""
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        return Wav2Vec2Model(Wav2Vec2Config(**self.shape(config), attn_implementation="sdpa"))

    def features(self, tower: nn.Module, batch: Tensor) -> Tensor:
        """Return the features of chunks of (num_chunks, num_samples): (num_chunks, num_frames, width)."""
        return tower(batch).last_hidden_state

    def shape(self, config: AudioConfig) -> dict[str, Any]:
        """Return the settings of Hugging Face's module."""
        layer_norm = config.form == "lv60k"
        return {
            **{theirs: getattr(config, ours) for ours, theirs in self.keys.items()},
            "conv_dim": [config.conv_channels] * len(CONV_KERNELS),
            "conv_kernel": list(CONV_KERNELS),
            "conv_stride": list(CONV_STRIDES),
            "conv_bias": layer_norm,
            "feat_extract_norm": "layer" if layer_norm else "group",
            "do_stable_layer_norm": layer_norm,
            "layer_norm_eps": 1e-5,
            **dict.fromkeys(ABSENT, 0.0),
        }

    def description(self, config: AudioConfig) -> dict[str, Any]:
        """Return the settings of the module that an export has, the same one."""
        return {"model_type": self.model_type, "architectures": [self.architecture], **self.shape(config)}

    def settings(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return our settings of a Wav2Vec 2.0; convolutions that are not alike are left to the comparison."""
        found = super().settings(description)
        if "conv_dim" in description:
            found["conv_channels"] = description["conv_dim"][0]
        if "feat_extract_norm" in description:
            found["form"] = "lv60k" if description["feat_extract_norm"] == "layer" else "ls960"
        return found


FAMILY = Wav2Vec2()
