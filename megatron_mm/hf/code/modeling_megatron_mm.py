"""An exported megatron_mm model: stock towers of transformers, composed. No attention, norm or mask of its own."""

import hashlib
import inspect
import json
import os

from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_megatron_mm import MegatronMMConfig
from .modalities_megatron_mm import MODALITIES

MANIFEST = "conversion_manifest.json"
INPUTS = [name for modality in MODALITIES for name in modality.inputs]


def _takes_media(function):
    """Name the inputs of every modality among the arguments of a function that passes them on: generate reads them."""
    own = inspect.signature(function)
    *before, rest = own.parameters.values()
    media = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in INPUTS]
    function.__signature__ = own.replace(parameters=[*before, *media, rest])
    return function


class MegatronMMProjector(nn.Module):
    """Encoder features to decoder inputs; the modality-type embedding is folded into the last bias."""

    def __init__(self, width, hidden_size, config):
        super().__init__()
        self.layer_norm = nn.LayerNorm(width, eps=config.projector_layernorm_eps)
        self.linear_1 = nn.Linear(width, hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features):
        """(..., width) to (..., hidden_size)."""
        return self.linear_2(self.act(self.linear_1(self.layer_norm(features))))


def check_files(folder):
    """Raise OSError if a file of the export in `folder`, but its card, is not what was written."""
    with open(os.path.join(folder, MANIFEST), encoding="utf-8") as file:
        expected = json.load(file)["sha256"]
    for name in expected.keys() - {"README.md"}:
        digest = hashlib.sha256()
        with open(os.path.join(folder, name), "rb") as file:
            for block in iter(lambda: file.read(1 << 23), b""):
                digest.update(block)
        if digest.hexdigest() != expected[name]:
            raise OSError(
                f"{name} in {folder} is damaged: its sha256 is not that of {MANIFEST}. Copy the folder again."
            )


class MegatronMMPreTrainedModel(PreTrainedModel):
    """What transformers must know of all classes here."""

    config: MegatronMMConfig
    config_class = MegatronMMConfig
    base_model_prefix = "model"
    input_modalities = (*(modality.name for modality in MODALITIES), "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012
        *("LlamaDecoderLayer", "Qwen3DecoderLayer"),
        *(layer for modality in MODALITIES for layer in modality.layers),
    ]
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, verify=True, **kwargs):
        """Load a model from a folder whose files are compared with its manifest first, unless `verify` is false."""
        if verify and os.path.isfile(os.path.join(pretrained_model_name_or_path, MANIFEST)):
            check_files(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def _tower(modality, config):
    """Return the encoder of a modality: as transformers builds it, if the modality does not."""
    return (
        modality.build(config)
        if hasattr(modality, "build")
        else AutoModel.from_config(getattr(config, modality.encoder))
    )


class MegatronMMModel(*(modality.model for modality in MODALITIES), MegatronMMPreTrainedModel):
    """Encoders, projectors and decoder, without the head."""

    def __init__(self, config):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        for modality in MODALITIES:
            self.add_module(modality.tower, _tower(modality, config))
        for modality in MODALITIES:
            projector = MegatronMMProjector(modality.width(config), hidden_size, config)
            self.add_module(modality.projector, projector)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        """The token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.language_model.set_input_embeddings(value)

    def _merge(self, input_ids, embeds, features, token_id):
        mask = input_ids == token_id
        features = features.reshape(-1, features.shape[-1])
        if int(mask.sum()) != len(features):
            raise ValueError(f"there are {int(mask.sum())} placeholders of id {token_id}, but {len(features)} features")
        return embeds.masked_scatter(mask.unsqueeze(-1), features.to(embeds.device, embeds.dtype))

    @_takes_media
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        **kwargs,
    ):
        """Run the decoder over token embeddings with media features over their placeholders."""
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        for modality in MODALITIES:
            given = {name: kwargs.pop(name, None) for name in modality.inputs}
            if given[modality.inputs[0]] is not None:
                features = getattr(self, f"get_{modality.name}_features")(**given).pooler_output
                placeholder = getattr(self.config, f"{modality.name}_token_id")
                inputs_embeds = self._merge(input_ids, inputs_embeds, features, placeholder)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return BaseModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class MegatronMMForConditionalGeneration(MegatronMMPreTrainedModel, GenerationMixin):
    """The whole model: text from text and media."""

    _tied_weights_keys = {}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = MegatronMMModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        """The token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The head."""
        return self.lm_head

    @_takes_media
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Return logits, and the loss of `labels` if they are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        logits = self.lm_head(hidden[:, kept] if not isinstance(kept, int) else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        """Give the encoders their inputs only while the cache is empty: once a prompt."""
        media = {name: kwargs.pop(name, None) for name in INPUTS}
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        past = kwargs.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            inputs.update({name: value for name, value in media.items() if value is not None})
        return inputs


def _asks_model(name):
    """Return a method that asks the model below the head."""

    def ask(self, *args, **kwargs):
        return getattr(self.model, name)(*args, **kwargs)

    ask.__doc__ = f"See MegatronMMModel.{name}."
    return ask


for _modality in MODALITIES:
    _name = f"get_{_modality.name}_features"
    setattr(MegatronMMForConditionalGeneration, _name, _asks_model(_name))
