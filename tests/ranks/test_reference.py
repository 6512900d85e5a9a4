"""The whole model against an obvious one: transformers' own Llama, ViT and Wav2Vec2, one document at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launch import run_ranks
from small import layout, small_config
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, Wav2Vec2FeatureExtractor

from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.modalities import BY_NAME
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, audio_frames, decode_flac
from megatron_mm.modalities.image.decode import decode_pixels
from megatron_mm.model.multimodal import MultimodalModel, build_chunks
from megatron_mm.source import Source


def as_llama(model: MultimodalModel, config: Config) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """Return transformers' Llama with the weights of `model`'s decoder: our attention is its, split otherwise.

    With query and key norms it is transformers' Qwen3, which is Llama with them.
    """
    own = dict(model.named_parameters())
    norms = {"q_norm": "query_norm", "k_norm": "key_norm"} if config.model.qk_norm else {}
    model_class, config_class = (Qwen3ForCausalLM, Qwen3Config) if norms else (LlamaForCausalLM, LlamaConfig)
    llama = model_class(
        config_class(
            vocab_size=config.model.vocab_size,
            hidden_size=config.model.hidden_size,
            intermediate_size=config.model.ffn_hidden_size,
            num_hidden_layers=config.model.num_layers,
            num_attention_heads=config.model.num_attention_heads,
            num_key_value_heads=config.model.num_query_groups,
            head_dim=config.model.head_dim,
            rms_norm_eps=config.model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": config.model.rope_theta},
            tie_word_embeddings=False,
        )
    )
    weights = {
        "model.embed_tokens.weight": own["embedding.word_embeddings.weight"] + own["embedding.text_type_embedding"],
        "model.norm.weight": own["decoder.final_layernorm.weight"],
        "lm_head.weight": own["output_layer.weight"],
    }
    for layer in range(config.model.num_layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        key_value = own[ours + "self_attention.linear_kv.weight"]
        key_value = key_value.view(config.model.num_query_groups, 2, config.model.head_dim, -1)
        gate, up = own[ours + "mlp.linear_fc1.weight"].chunk(2)
        weights |= {
            theirs + "self_attn.q_proj.weight": own[ours + "self_attention.linear_q.weight"],
            theirs + "self_attn.k_proj.weight": key_value[:, 0].flatten(0, 1),
            theirs + "self_attn.v_proj.weight": key_value[:, 1].flatten(0, 1),
            theirs + "self_attn.o_proj.weight": own[ours + "self_attention.linear_proj.weight"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": own[ours + "mlp.linear_fc2.weight"],
            **{
                theirs + f"self_attn.{name}.weight": own[ours + f"self_attention.{norm}.weight"]
                for name, norm in norms.items()
            },
            theirs + "input_layernorm.weight": own[ours + "input_layernorm.weight"],
            theirs + "post_attention_layernorm.weight": own[ours + "pre_mlp_layernorm.weight"],
        }
    llama.load_state_dict({name: value.detach() for name, value in weights.items()})
    return llama.eval()


def obvious_embedding(model: MultimodalModel, llama: LlamaForCausalLM, loader: Loader, document: int) -> torch.Tensor:
    """Return the decoder inputs of one document, (num_tokens, hidden), item by item."""
    shard = loader.shards[0]
    normalize = Wav2Vec2FeatureExtractor(do_normalize=loader.config.audio.form == "lv60k")
    hidden = llama.model.embed_tokens(torch.from_numpy(shard.tokens(document)))
    for item in shard.media(document):
        data = shard.media_bytes(item)
        if item["kind"] == BY_NAME["image"].kind:
            part = model.embedding.image
            pixels = (decode_pixels(data, 224).float() / 255 - 0.5) / 0.5
            # transformers' ViT gives the features before its final norm as the last of the hidden states.
            outputs = part.encoder.tower(pixels.unsqueeze(0), output_hidden_states=True)
            features = outputs.hidden_states[-1][0, 1:]
        else:
            part = model.embedding.audio
            clip = normalize(decode_flac(data), sampling_rate=SAMPLE_RATE).input_values[0]
            whole = [chunk for chunk in torch.from_numpy(clip).split(16_000) if audio_frames(len(chunk))]
            features = torch.cat([part.encoder.tower(chunk.unsqueeze(0)).last_hidden_state[0] for chunk in whole])
        normed = F.layer_norm(
            features, (features.shape[1],), part.projector.norm.weight, part.projector.norm.bias, 1e-5
        )
        projected = part.projector.linear_2(F.gelu(part.projector.linear_1(normed)))
        first = int(item["token_offset"])
        assert len(projected) == item["num_tokens"]
        hidden = torch.cat([hidden[:first], projected, hidden[first + len(projected) :]])
    return hidden


def losses_of(config: Config, samples: list[int]) -> np.ndarray:
    """Return our model's loss of every position of `samples`."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    (model,) = build_chunks(config, mesh)
    with torch.no_grad():
        return model.eval()(loader.micro_batch(samples))[0].numpy()


def obvious_losses(config: Config, samples: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (losses, mask) of every position of `samples`, document by document through transformers' Llama."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    (model,) = build_chunks(config, mesh)
    llama = as_llama(model.eval(), config)
    shard, length = loader.shards[0], config.data.seq_len
    losses, mask = np.zeros(len(samples) * length, np.float32), np.zeros(len(samples) * length, np.float32)
    placeholders = [shard.tokenizer.special_ids["image"], shard.tokenizer.special_ids["audio"]]
    for number, sample in enumerate(samples):
        position = number * length
        for piece in loader.samples.pieces(sample):
            document, start, size = int(piece["document"]), int(piece["start"]), int(piece["length"])
            with torch.no_grad():
                inputs = obvious_embedding(model, llama, loader, document)[start : start + size]
                logits = llama(inputs_embeds=inputs.unsqueeze(0)).logits[0]
            labels = torch.from_numpy(shard.tokens(document, start + 1, start + size + 1))
            place = slice(position, position + size)
            losses[place] = F.cross_entropy(logits, labels, reduction="none").numpy()
            mask[place] = [label not in placeholders for label in labels.tolist()]
            position += size
    return losses, mask


@pytest.mark.parametrize(
    "overrides",
    [(), ("model.num_query_groups=2",), ("model.num_query_groups=4",), ("model.qk_norm=true",), ("audio.form=lv60k",)],
    ids=["mqa", "gqa", "mha", "qk-norm", "lv60k"],
)
def test_losses_are_those_of_transformers(overrides: tuple[str, ...], shards: Path) -> None:
    config = small_config(shards, "unused", *overrides)
    samples = [0, 3, 5, 9]
    ((expected, mask),) = run_ranks(1, obvious_losses, config, samples)
    (found,) = run_ranks(1, losses_of, config, samples)
    np.testing.assert_allclose(found * mask, expected * mask, rtol=2e-5, atol=2e-5)
    split = run_ranks(4, losses_of, small_config(shards, "unused", *overrides, *layout("tp=4")), samples)
    for losses in split:
        np.testing.assert_allclose(losses, found, rtol=2e-5, atol=2e-5)


def test_samples_hold_every_source(shards: Path) -> None:
    config = small_config(shards, "unused")
    (sources,) = run_ranks(1, sources_of, config, [0, 3, 5, 9])
    assert sources == {Source.TEXT, Source.IMAGE, Source.AUDIO, Source.PDF}


def sources_of(config: Config, samples: list[int]) -> set[int]:
    loader = Loader(config.data.train, config=config, mesh=meshes.cut(config))
    return set(loader.micro_batch(samples).sources.tolist())
