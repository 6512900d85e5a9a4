"""Configuration of an exported megatron_mm model: a text decoder, an image encoder and a sound encoder."""

from transformers import CONFIG_MAPPING, AutoConfig

try:
    from transformers import PreTrainedConfig
except ImportError:  # transformers 4
    from transformers import PretrainedConfig as PreTrainedConfig


def _part(values, default):
    """Return a part's configuration from its dictionary."""
    if isinstance(values, dict):
        values = dict(values)
        return CONFIG_MAPPING[values.pop("model_type", default)](**values)
    return CONFIG_MAPPING[default]() if values is None else values


class MegatronMMConfig(PreTrainedConfig):
    """A stock text decoder that reads the projected features of a stock image encoder and a stock sound encoder."""

    model_type = "megatron_mm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "audio_config": AutoConfig}  # noqa: RUF012
    attribute_map = {"image_token_index": "image_token_id", "audio_token_index": "audio_token_id"}  # noqa: RUF012

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        audio_config=None,
        image_token_id=0,
        audio_token_id=1,
        image_seq_length=196,
        audio_chunk_samples=16000,
        max_audio_seconds=30,
        projector_hidden_act="gelu",
        projector_layernorm_eps=1e-5,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.text_config = _part(text_config, "llama")
        self.vision_config = _part(vision_config, "internvl_vision")
        self.audio_config = _part(audio_config, "wav2vec2")
        self.image_token_id, self.audio_token_id = image_token_id, audio_token_id
        self.image_seq_length = image_seq_length
        self.audio_chunk_samples = audio_chunk_samples
        # vLLM's Transformers backend sizes its sound budget by it: 49 frames a second.
        self.audio_config.max_source_positions = 49 * max_audio_seconds
        self.max_audio_seconds = max_audio_seconds
        self.projector_hidden_act, self.projector_layernorm_eps = projector_hidden_act, projector_layernorm_eps
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
