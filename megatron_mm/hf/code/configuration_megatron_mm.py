"""Configuration of an exported megatron_mm model: a text decoder, and an encoder for each modality."""

from transformers import CONFIG_MAPPING, AutoConfig

try:
    from transformers import PreTrainedConfig
except ImportError:  # transformers 4
    from transformers import PretrainedConfig as PreTrainedConfig

from .modalities_megatron_mm import MODALITIES


def _part(values, default):
    """Return a part's configuration from its dictionary."""
    if isinstance(values, dict):
        values = dict(values)
        return CONFIG_MAPPING[values.pop("model_type", default)](**values)
    return CONFIG_MAPPING[default]() if values is None else values


class MegatronMMConfig(PreTrainedConfig):
    """A stock text decoder that reads the projected features of a stock encoder for each modality."""

    model_type = "megatron_mm"
    sub_configs = {"text_config": AutoConfig, **{own.encoder: AutoConfig for own in MODALITIES if own.encoder}}  # noqa: RUF012
    attribute_map = {f"{own.name}_token_index": f"{own.name}_token_id" for own in MODALITIES}  # noqa: RUF012

    def __init__(
        self,
        text_config=None,
        projector_hidden_act="gelu",
        projector_layernorm_eps=1e-5,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.text_config = _part(text_config, "llama")
        for number, modality in enumerate(MODALITIES):
            if modality.encoder:  # else its settings say all
                setattr(self, modality.encoder, _part(kwargs.pop(modality.encoder, None), modality.model_type))
            setattr(self, f"{modality.name}_token_id", kwargs.pop(f"{modality.name}_token_id", number))
            for name, default in modality.settings.items():
                setattr(self, name, kwargs.pop(name, default))
            modality.set_up(self)
        self.projector_hidden_act, self.projector_layernorm_eps = projector_hidden_act, projector_layernorm_eps
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
