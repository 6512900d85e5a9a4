"""Pretrained files into the encoders: the libraries' own features, resized positions, and every key accounted for."""

from pathlib import Path

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchaudio.models import wav2vec2_model
from transformers import ViTConfig, ViTForImageClassification, Wav2Vec2Config, Wav2Vec2ForPreTraining

from megatron_mm.errors import DataError
from megatron_mm.modalities.audio.encoder import Encoder as AudioEncoder
from megatron_mm.modalities.audio.spec import AudioConfig
from megatron_mm.modalities.image.encoder import Encoder as ImageEncoder
from megatron_mm.modalities.image.spec import ImageConfig
from megatron_mm.modalities.image.towers.vit import resize_positions
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


def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def timm_vit(**options) -> VisionTransformer:
    return stirred(
        VisionTransformer(patch_size=16, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=5, **options)
    )


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
