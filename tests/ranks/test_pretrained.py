"""A run that starts from pretrained encoder files has their features on every rank, and keeps them while frozen."""

from pathlib import Path

import pytest
import torch
from launch import run_ranks
from small import layout, small_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.parallel import mesh as meshes
from megatron_mm.training.start import start
from megatron_mm.training.state import build_state
from megatron_mm.training.step import train_step


def image() -> Tensor:
    return torch.randint(0, 256, (3, 224, 224), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def clip() -> Tensor:
    return torch.randn(16_000, generator=torch.Generator().manual_seed(2))


def vit() -> VisionTransformer:
    torch.manual_seed(3)
    return VisionTransformer(patch_size=16, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=5).eval()


def wav2vec2() -> Wav2Vec2ForPreTraining:
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForPreTraining(Wav2Vec2Config(**sizes, **convolutions)).eval()


def features(config: Config) -> tuple[Tensor, Tensor] | None:
    """Return the features of an image and a clip after two steps of a new run; None on ranks without encoders."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    start(state)
    for step in range(2):
        train_step(state, loader.step(step))
    chunk = state.chunks[0]
    if not chunk.pre_process:
        return None
    with torch.no_grad():
        chunk.eval()
        tower = chunk.embedding.image.encoder.tower
        seen = tower.layernorm(chunk.embedding.image.encoder((image(),))).view(196, -1)
        return seen, chunk.embedding.audio.encoder((clip(),))


@pytest.mark.parametrize(("text", "ranks"), [("tp=2", 2), ("pp=2", 2)])
def test_a_run_starts_from_the_files_and_keeps_them(text: str, ranks: int, shards: Path, tmp_path: Path) -> None:
    torch.save(vit().state_dict(), tmp_path / "vit.pth")
    wav2vec2().save_pretrained(tmp_path / "wav2vec2")
    files = [f"vision.pretrained={tmp_path / 'vit.pth'}", f"audio.pretrained={tmp_path / 'wav2vec2'}"]
    found = run_ranks(ranks, features, small_config(shards, "unused", *layout(text), *files))
    with torch.no_grad():
        seen = vit().forward_features(image().unsqueeze(0).float() / 127.5 - 1.0)[0, 1:]
        heard = wav2vec2().wav2vec2(clip().unsqueeze(0)).last_hidden_state[0]
    assert [own is None for own in found] == [False, "pp" in text]
    for own in found:
        if own is not None:
            torch.testing.assert_close(own[0], seen, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own[1].view_as(heard), heard, rtol=1e-5, atol=1e-5)
