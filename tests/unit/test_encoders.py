"""Pretrained files into the encoders: the libraries' own features, resized positions, and every key accounted for."""

from pathlib import Path

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchaudio.models import wav2vec2_model
from transformers import (
    HubertConfig,
    HubertForCTC,
    InternVLModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForPreTraining,
)

from megatron_mm.errors import DataError
from megatron_mm.modalities.audio.encoder import Encoder as AudioEncoder
from megatron_mm.modalities.audio.spec import AudioConfig
from megatron_mm.modalities.image.encoder import Encoder as ImageEncoder
from megatron_mm.modalities.image.positions import resize_positions
from megatron_mm.modalities.image.spec import ImageConfig
from megatron_mm.modalities.pretrained import load_tower

SIZE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
AUDIO_SIZE = {**SIZE, "conv_channels": 16, "pos_conv_kernel": 8, "pos_conv_groups": 2}
TOLERANCE = 1e-5  # fp32: another order of sums


def load(encoder: ImageEncoder | AudioEncoder, path: Path) -> None:
    """Load a pretrained file into an encoder."""
    name = "image" if isinstance(encoder, ImageEncoder) else "audio"
    load_tower(encoder.tower, encoder.family, path, name=name)


def stirred(module: nn.Module) -> nn.Module:
    """Give every parameter, norms and biases too, a value of its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return module.eval()


def images(size: int = 224) -> Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def timm_vit(**options) -> VisionTransformer:
    shape = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "num_classes": 5}
    return stirred(VisionTransformer(**shape | options))


def test_a_timm_file_gives_timms_features(tmp_path: Path) -> None:
    timm = timm_vit()
    torch.save(timm.state_dict(), tmp_path / "vit.pth")
    ours = ImageEncoder(ImageConfig(**SIZE)).eval()
    load(ours, tmp_path / "vit.pth")
    with torch.no_grad():
        found = ours(tuple(images())).view(2, 196, 32)
        normed = ours.tower.layernorm(found)
        expected = timm.forward_features(images().float() / 127.5 - 1.0)[:, 1:]
    torch.testing.assert_close(normed, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("class_token", [True, False])
def test_another_size_and_patch_with_a_class_token_or_without(class_token: bool, tmp_path: Path) -> None:
    pooled = {} if class_token else {"class_token": False, "global_pool": "avg", "fc_norm": False}
    timm = timm_vit(img_size=96, patch_size=8, **pooled)
    torch.save(timm.state_dict(), tmp_path / "vit.pth")
    settings = ImageConfig(**SIZE, image_size=96, patch_size=8, class_token=class_token)
    ours = ImageEncoder(settings).eval()
    load(ours, tmp_path / "vit.pth")
    with torch.no_grad():
        found = ours.tower.layernorm(ours(tuple(images(96)))).view(2, settings.tokens_per_image, 32)
        expected = timm.forward_features(images(96).float() / 127.5 - 1.0)
    torch.testing.assert_close(found, expected[:, int(class_token) :], rtol=TOLERANCE, atol=TOLERANCE)
    other = ImageEncoder(settings.model_copy(update={"class_token": not class_token}))
    with pytest.raises(DataError, match=f"image.class_token={not class_token}"):
        load(other, tmp_path / "vit.pth")


def siglip(size: int) -> SiglipModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = sizes | {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2}
    return stirred(SiglipModel(SiglipConfig(vision_config=sizes | {"image_size": size}, text_config=text)))


def test_a_siglip_2_folder_gives_its_features(tmp_path: Path) -> None:
    theirs = siglip(96)
    theirs.save_pretrained(tmp_path)
    ours = ImageEncoder(ImageConfig(**SIZE, encoder="siglip2", image_size=96)).eval()
    load(ours, tmp_path)
    with torch.no_grad():
        found = ours(tuple(images(96))).view(2, 36, 32)
        expected = theirs.vision_model(images(96).float() / 127.5 - 1.0).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    larger = ImageEncoder(ImageConfig(**SIZE, encoder="siglip2"))
    load(larger, tmp_path)
    positions = theirs.vision_model.embeddings.position_embedding.weight.unsqueeze(0)
    expected = resample_abs_pos_embed(positions, new_size=[14, 14], num_prefix_tokens=0)[0]
    torch.testing.assert_close(larger.tower.embeddings.position_embedding.weight, expected, rtol=1e-6, atol=1e-6)
    other = ImageEncoder(ImageConfig(**SIZE | {"num_attention_heads": 4}, encoder="siglip2", image_size=96))
    with pytest.raises(DataError, match="num_attention_heads=2, ours 4"):
        load(other, tmp_path)


@pytest.mark.parametrize("form", ["pytorch_model.bin", "folder"])
def test_a_hugging_face_vit_gives_its_features(form: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    theirs = stirred(ViTForImageClassification(ViTConfig(**sizes, layer_norm_eps=1e-6)))
    if form == "folder":  # written with the names of transformers 4
        theirs.save_pretrained(tmp_path)
    else:
        torch.save(theirs.state_dict(), tmp_path / form)
    ours = ImageEncoder(ImageConfig(**SIZE)).eval()
    load(ours, tmp_path)
    with torch.no_grad():
        found = ours.tower.layernorm(ours(tuple(images())).view(2, 196, 32))
        expected = theirs.vit(images().float() / 127.5 - 1.0).last_hidden_state[:, 1:]
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_positions_of_another_resolution_are_resized_as_timm_does(tmp_path: Path) -> None:
    timm = timm_vit(img_size=160)  # 10 x 10 patches
    torch.save({"model": timm.state_dict()}, tmp_path / "vit.pth")
    ours = ImageEncoder(ImageConfig(**SIZE))
    load(ours, tmp_path / "vit.pth")
    expected = resample_abs_pos_embed(timm.pos_embed, new_size=[14, 14], num_prefix_tokens=1)
    torch.testing.assert_close(ours.tower.embeddings.position_embeddings, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(DataError, match="no class token|not a class token"):
        resize_positions(torch.zeros(1, 50 + 2, 4), num_tokens=197)


def torchaudio_model(form: str) -> nn.Module:
    layer_norm = form == "lv60k"
    convolutions = [(16, kernel, stride) for kernel, stride in zip((10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2))]
    kind = "layer_norm" if layer_norm else "group_norm"
    sizes = (32, 0.0, 8, 2, 2, 2, 0.0, 64, 0.0, 0.0)
    return stirred(wav2vec2_model(kind, convolutions, layer_norm, *sizes, layer_norm, 0.0, None))


def hugging_face_model(form: str) -> nn.Module:
    layer_norm = form == "lv60k"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    convolutions = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    norms = {"conv_bias": layer_norm, "do_stable_layer_norm": layer_norm}
    norms["feat_extract_norm"] = "layer" if layer_norm else "group"
    quantizer = {"codevector_dim": 8, "proj_codevector_dim": 8, "num_codevectors_per_group": 4}
    return stirred(Wav2Vec2ForPreTraining(Wav2Vec2Config(**sizes, **convolutions, **norms, **quantizer)))


@pytest.mark.parametrize("form", ["ls960", "lv60k"])
@pytest.mark.parametrize("library", ["torchaudio", "hugging-face"])
def test_a_wav2vec_file_gives_its_librarys_features(library: str, form: str, tmp_path: Path) -> None:
    sound = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(2))
    if library == "torchaudio":
        theirs = torchaudio_model(form)
        torch.save(theirs.state_dict(), tmp_path / "model.pth")
        path, run = tmp_path / "model.pth", lambda: theirs(sound)[0]
    else:
        theirs = hugging_face_model(form)
        theirs.save_pretrained(tmp_path)
        path, run = tmp_path, lambda: theirs.wav2vec2(sound).last_hidden_state
    ours = AudioEncoder(AudioConfig(**AUDIO_SIZE, form=form)).eval()
    load(ours, path)
    with torch.no_grad():
        torch.testing.assert_close(ours((sound[0],)), run()[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["ls960", "lv60k"])
def test_a_hubert_folder_gives_its_features(form: str, tmp_path: Path) -> None:
    layer_norm = form == "lv60k"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    convolutions = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    norms = {"conv_bias": layer_norm, "do_stable_layer_norm": layer_norm}
    norms["feat_extract_norm"] = "layer" if layer_norm else "group"
    theirs = stirred(HubertForCTC(HubertConfig(**sizes, **convolutions, **norms, vocab_size=9)))
    theirs.save_pretrained(tmp_path)
    ours = AudioEncoder(AudioConfig(**AUDIO_SIZE, encoder="hubert", form=form)).eval()
    load(ours, tmp_path)
    sound = torch.randn(1, 16_000, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = theirs.hubert(sound).last_hidden_state[0]
        torch.testing.assert_close(ours((sound[0],)), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_two_by_two_patches_are_one_token_as_in_internvl() -> None:
    settings = ImageConfig(**SIZE, image_size=96, pixel_shuffle=True)
    assert settings.tokens_per_image == 9
    ours = ImageEncoder(settings).eval()
    with torch.no_grad():
        apart = ours.family.features(ours.tower, images(96).float() / 127.5 - 1.0).view(2, 6, 6, 32)
        found = ours(tuple(images(96)))
    torch.testing.assert_close(found.view(2, 3, 3, 128), InternVLModel.pixel_shuffle(None, apart, 0.5))
    (message,) = ImageConfig(**SIZE, image_size=80, pixel_shuffle=True).failures("image")
    assert "are 5 a side: make it an even number" in message


def test_an_encoder_that_there_is_not_is_named() -> None:
    wrong = ImageConfig(**SIZE, encoder="siglip")
    assert list(wrong.failures("image")) == ["image.encoder=siglip is no encoder that there is. Did you mean siglip2?"]
    wrong = AudioConfig(**AUDIO_SIZE, encoder="whisper")
    (message,) = wrong.failures("audio")
    assert "Use one of hubert, wav2vec2." in message
    wrong = ImageConfig(**SIZE, encoder="siglip2", class_token=False)
    assert "image.class_token=false is a setting of image.encoder=vit" in next(wrong.failures("image"))


def test_every_key_is_accounted_for(tmp_path: Path) -> None:
    weights = timm_vit().state_dict()
    weights["blocks.1.ls1.gamma"] = weights.pop("blocks.1.norm1.weight")
    weights["norm.bias"] = torch.zeros(7)
    torch.save(weights, tmp_path / "vit.pth")
    ours = ImageEncoder(ImageConfig(**SIZE))
    with pytest.raises(DataError) as failure:
        load(ours, tmp_path / "vit.pth")
    message = str(failure.value)
    assert "1 missing: layers.1.layernorm_before.weight" in message
    assert "1 unexpected: layers.1.ls1.gamma" in message
    assert "1 of another shape: layernorm.bias (7,) for (32,)" in message


def test_a_file_of_the_other_form_is_refused(tmp_path: Path) -> None:
    torch.save(torchaudio_model("lv60k").state_dict(), tmp_path / "model.pth")
    with pytest.raises(DataError, match=r"audio\.form"):
        load(AudioEncoder(AudioConfig(**AUDIO_SIZE, form="ls960")), tmp_path / "model.pth")


@pytest.mark.parametrize("content", [b"", b"not a file of weights", None], ids=["empty", "text", "absent"])
def test_what_is_no_file_of_weights_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match="vit.pth"):
        load(ImageEncoder(ImageConfig(**SIZE)), path)


def test_a_folder_of_the_same_shapes_and_another_meaning_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTForImageClassification(ViTConfig(**sizes)).save_pretrained(tmp_path / "vit")
    with pytest.raises(DataError, match=r"config.json describes another .* image.*num_attention_heads=4, ours 2"):
        load(ImageEncoder(ImageConfig(**SIZE)), tmp_path / "vit")
    audio = AudioEncoder(AudioConfig(**AUDIO_SIZE))
    settings = audio.tower.config.to_dict() | {"num_conv_pos_embedding_groups": 4, "do_stable_layer_norm": True}
    Wav2Vec2ForPreTraining(Wav2Vec2Config(**settings)).save_pretrained(tmp_path / "sound")
    with pytest.raises(
        DataError, match=r"num_conv_pos_embedding_groups=4, ours 2; do_stable_layer_norm=True, ours Fal"
    ):
        load(audio, tmp_path / "sound")


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    weights = timm_vit().state_dict()
    torch.save(weights | {"layernorm.weight": weights["norm.weight"]}, tmp_path / "vit.pth")
    with pytest.raises(DataError, match=r"holds norm\.weight and layernorm\.weight, which are the same tensor"):
        load(ImageEncoder(ImageConfig(**SIZE)), tmp_path / "vit.pth")
