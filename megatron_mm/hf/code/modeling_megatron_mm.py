"""An exported megatron_mm model: stock towers of transformers, composed. No attention, norm or mask of its own."""

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from .configuration_megatron_mm import MegatronMMConfig


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


class MegatronMMPreTrainedModel(PreTrainedModel):
    """What transformers must know of all classes here."""

    config: MegatronMMConfig
    config_class = MegatronMMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "audio", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "Qwen3DecoderLayer", "InternVLVisionLayer", "Wav2Vec2EncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True


class MegatronMMModel(MegatronMMPreTrainedModel):
    """Encoders, projectors and decoder, without the head."""

    def __init__(self, config):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.audio_tower = AutoModel.from_config(config.audio_config)
        self.multi_modal_projector = MegatronMMProjector(config.vision_config.hidden_size, hidden_size, config)
        self.audio_projector = MegatronMMProjector(config.audio_config.hidden_size, hidden_size, config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        """The token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values, **kwargs):
        """(num_images, 3, 224, 224) to pooler_output (num_images, 196, hidden_size): patches, no class token."""
        features = self.vision_tower(pixel_values.to(self.dtype)).last_hidden_state[:, 1:]
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.multi_modal_projector(features)
        )

    def get_audio_features(self, input_values, input_values_mask=None, **kwargs):
        """(num_clips, num_samples) and its mask to pooler_output (frames of all clips, hidden_size).

        Each second is encoded on its own, and what is left of the last one at its own length: padding would change
        its features, because the encoder's group norm runs over time.
        """
        size = self.config.audio_chunk_samples
        if input_values_mask is None:
            lengths = [input_values.shape[1]] * input_values.shape[0]
        else:
            lengths = input_values_mask.long().sum(-1).tolist()
        chunks = [chunk for clip, length in zip(input_values, lengths) for chunk in clip[:length].split(size)]
        chunks = [c for c in chunks if int(self.audio_tower._get_feat_extract_output_lengths(c.shape[0])) > 0]
        features = [None] * len(chunks)
        for length in sorted({chunk.shape[0] for chunk in chunks}):
            alike = [number for number, chunk in enumerate(chunks) if chunk.shape[0] == length]
            batch = torch.stack([chunks[number] for number in alike]).to(self.dtype)
            for number, frames in zip(alike, self.audio_tower(batch).last_hidden_state):
                features[number] = frames
        features = torch.cat(features)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.audio_projector(features))

    def _merge(self, input_ids, embeds, features, token_id):
        mask = input_ids == token_id
        features = features.reshape(-1, features.shape[-1])
        if int(mask.sum()) != len(features):
            raise ValueError(f"there are {int(mask.sum())} placeholders of id {token_id}, but {len(features)} features")
        return embeds.masked_scatter(mask.unsqueeze(-1), features.to(embeds.device, embeds.dtype))

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        input_values=None,
        input_values_mask=None,
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
        if pixel_values is not None:
            features = self.get_image_features(pixel_values).pooler_output
            inputs_embeds = self._merge(input_ids, inputs_embeds, features, self.config.image_token_id)
        if input_values is not None:
            features = self.get_audio_features(input_values, input_values_mask).pooler_output
            inputs_embeds = self._merge(input_ids, inputs_embeds, features, self.config.audio_token_id)
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
    """The whole model: text from text, images and sound."""

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

    def get_image_features(self, *args, **kwargs):
        """See MegatronMMModel."""
        return self.model.get_image_features(*args, **kwargs)

    def get_audio_features(self, *args, **kwargs):
        """See MegatronMMModel."""
        return self.model.get_audio_features(*args, **kwargs)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        input_values=None,
        input_values_mask=None,
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
            pixel_values=pixel_values,
            input_values=input_values,
            input_values_mask=input_values_mask,
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

    def prepare_inputs_for_generation(
        self, input_ids, pixel_values=None, input_values=None, input_values_mask=None, **kwargs
    ):
        """Give the encoders their inputs only while the cache is empty: once a prompt."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        past = kwargs.get("past_key_values")
        if past is None or past.get_seq_length() == 0:
            media = {
                "pixel_values": pixel_values,
                "input_values": input_values,
                "input_values_mask": input_values_mask,
            }
            inputs.update({name: value for name, value in media.items() if value is not None})
        return inputs
