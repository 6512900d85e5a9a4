"""Where the encoders of a new run come from: files, whose features every rank has and keeps while they are frozen; a
checkpoint; or random weights, if that is said."""

import logging
from pathlib import Path

import pytest
import torch
from launch import run_ranks
from small import TRAINED, layout, small_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining

from megatron_mm import config as configs
from megatron_mm.checkpoint import load as checkpoint_load
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.errors import ConfigError
from megatron_mm.training import checkpoints
from megatron_mm.training.initial_weights import load_initial_weights
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
    load_initial_weights(state)
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
    files = [f"image.pretrained={tmp_path / 'vit.pth'}", f"audio.pretrained={tmp_path / 'wav2vec2'}"]
    found = run_ranks(ranks, features, small_config(shards, "unused", *layout(text), *files))
    with torch.no_grad():
        seen = vit().forward_features(image().unsqueeze(0).float() / 127.5 - 1.0)[0, 1:]
        heard = wav2vec2().wav2vec2(clip().unsqueeze(0)).last_hidden_state[0]
    assert [own is None for own in found] == [False, "pp" in text]
    for own in found:
        if own is not None:
            torch.testing.assert_close(own[0], seen, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(own[1].view_as(heard), heard, rtol=1e-5, atol=1e-5)


def started(config: Config, without: str = "") -> tuple[str, dict[str, Tensor]]:
    """Return what a new run says as it starts, or why it does not, and its encoders' weights.

    `without` are the names of tensors that the checkpoint that it starts from is not to have.
    """
    from megatron_mm.training import initial_weights as starting

    class Reader(checkpoint_load.CheckpointReader):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.tensors = {
                key: info for key, info in self.tensors.items() if not (without and key.startswith(without))
            }

    checkpoint_load.CheckpointReader = Reader
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("megatron_mm").addHandler(handler)
    logging.getLogger("megatron_mm").setLevel(logging.INFO)
    try:
        configs.check_start(config)
        if config.training.start_from:
            starting.check_start_from(config, Path(config.training.start_from))
    except ConfigError as error:
        return f"error: {error}", {}
    state = build_state(config, meshes.cut(config))
    load_initial_weights(state)
    weights = {key: value.clone() for key, value in state.chunks[0].named_parameters() if ".encoder." in key}
    return "\n".join(said), weights


def save_first(config: Config) -> None:
    """Save a model as step 1 of its run, after a step: there is nothing of the optimizer to save before."""
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    train_step(state, Loader(config.data.train, config=config, mesh=mesh).step(0))
    checkpoints.save(state)


def resumed(config: Config) -> str:
    """Return why a run cannot go on from its checkpoint."""
    state = build_state(config, meshes.cut(config))
    try:
        checkpoints.resume(state)
    except ConfigError as error:
        return str(error)
    return ""


RANDOM = ("image.pretrained=random", "audio.pretrained=random")
PARTS = ("embedding.image.", "embedding.audio.")
NULL = ("image.pretrained=null", "audio.pretrained=null")


def test_a_run_says_where_its_encoders_come_from_and_starts_with_neither_in_silence(
    shards: Path, tmp_path: Path
) -> None:
    def config_of(*overrides: str) -> Config:
        return small_config(shards, tmp_path, *TRAINED, "training.global_batch_size=2", *overrides)

    run_ranks(1, save_first, config_of())
    at = tmp_path / "checkpoints" / "step_00000001"
    from_it = f"training.start_from={at}"

    (alone,) = run_ranks(1, started, config_of(*NULL))
    assert alone[0].startswith("error: image.pretrained is not given, and training.start_from names no checkpoint")
    ((said, random),) = run_ranks(1, started, config_of(*RANDOM))
    for name in ("image", "audio"):
        assert said.splitlines().count(f"{name} encoder: random weights, as {name}.pretrained=random says") == 1

    ((said, saved),) = run_ranks(1, started, config_of(from_it, *NULL))
    assert "image encoder: as training.start_from has it" in said
    for part in PARTS:
        assert not all(torch.equal(saved[key], value) for key, value in random.items() if part in key)
    (refused,) = run_ranks(1, started, config_of(from_it, *RANDOM))
    for name in ("image", "audio"):
        assert f"{name}.pretrained=random would throw away the {name} encoder of training.start_from={at}" in refused[0]

    (refused,) = run_ranks(1, started, config_of(from_it, *NULL), "embedding.audio.")
    assert refused[0].startswith(f"error: training.start_from={at} has no audio encoder, and audio.pretrained is not")
    assert "image" not in refused[0]
    lacking = (from_it, "image.pretrained=null", "audio.pretrained=random")
    ((said, weights),) = run_ranks(1, started, config_of(*lacking), "embedding.audio.")
    assert "audio encoder: random weights, as audio.pretrained=random says" in said
    for key, value in weights.items():
        assert torch.equal(value, (random if PARTS[1] in key else saved)[key]), key


def test_a_run_with_frozen_encoders_of_random_weights_is_not_gone_on_with(shards: Path, tmp_path: Path) -> None:
    """As runs were saved before `pretrained` had to be given; their checkpoints can be exported and started from."""
    small = ("training.global_batch_size=2", "image.pretrained=null")
    run_ranks(1, save_first, small_config(shards, tmp_path, *small))
    at = tmp_path / "checkpoints" / "step_00000001"
    file = small_config(shards, tmp_path).image.pretrained
    (said,) = run_ranks(1, resumed, small_config(shards, tmp_path, *small[:1], f"image.pretrained={file}"))
    assert f"{at} is of a run whose image encoder is frozen at random weights" in said
    assert f"training.start_from={at} image.pretrained=FILE" in said
    ((said, _),) = run_ranks(1, started, small_config(shards, tmp_path, f"training.start_from={at}", *NULL))
    assert said.startswith(f"error: training.start_from={at} has a frozen and never pretrained image encoder")
    assert "audio" not in said
    ((said, _),) = run_ranks(1, started, small_config(shards, tmp_path, f"training.start_from={at}"))
    assert f"pretrained tensors of {file}" in said
