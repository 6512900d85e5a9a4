"""What a run may start from: a checkpoint of its model, tensor by tensor; anything else is refused before it begins."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from launch import run_ranks
from small import layout, small_config

from megatron_mm import config as configs
from megatron_mm.checkpoint.load import check_model
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import mesh as meshes
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf.export import Options, export
from megatron_mm.hf.load import import_folder
from megatron_mm.training import checkpoints
from megatron_mm.training.initial_weights import check_start_from
from megatron_mm.training.state import build_state
from megatron_mm.training.step import train_step


def save_one(config: Config) -> None:
    mesh = meshes.cut(config)
    state = build_state(config, mesh)
    train_step(state, Loader(config.data.train, config=config, mesh=mesh).step(0))
    checkpoints.save(state)


@pytest.fixture(scope="module")
def saved(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a TP2 x PP2 run."""
    config = small_config(
        shards, tmp_path_factory.mktemp("saved"), *layout("tp=2 pp=2"), "training.global_batch_size=2"
    )
    run_ranks(4, save_one, config)
    return checkpoints.newest(config)


@pytest.mark.parametrize(
    ("override", "messages"),
    [
        ("image.num_layers=1", ["image.num_layers: 2 -> 1", "not embedding.image.encoder.tower.layers.1.* (16"]),
        ("image.num_layers=4", ["image.num_layers: 2 -> 4", "lacks embedding.image.encoder.tower.layers.2-3.*"]),
        ("audio.num_layers=3", ["audio.num_layers: 2 -> 3", "lacks embedding.audio.encoder.tower.encoder.layers.2.*"]),
        ("image.ffn_hidden_size=48", ["image.ffn_hidden_size: 32 -> 48", "(32, 16) in it, (48, 16) in the model"]),
        ("audio.form=lv60k", ["audio.form: ls960 -> lv60k", "conv_layers.1-6.layer_norm.weight"]),
        ("image.num_attention_heads=4", ["image.num_attention_heads: 2 -> 4"]),
        ("audio.num_attention_heads=4", ["audio.num_attention_heads: 2 -> 4"]),
        ("audio.pos_conv_groups=4", ["audio.pos_conv_groups: 2 -> 4"]),
        ("model.qk_norm=true", ["model.qk_norm: False -> True", "layers.0-5.self_attention.key_norm.weight"]),
        ("model.rope_theta=1e4", ["model.rope_theta: 500000.0 -> 10000.0"]),
        ("model.norm_epsilon=1e-6", ["model.norm_epsilon: 1e-05 -> 1e-06"]),
        ("model.num_layers=4", ["model.num_layers: 6 -> 4", "not decoder.layers.4-5.*"]),
    ],
)
def test_another_model_is_refused_with_all_that_differs(
    override: str, messages: list[str], saved: Path, shards: Path
) -> None:
    config = small_config(shards, "unused", override)
    with pytest.raises(ConfigError, match="is another model") as refused:
        check_start_from(config, saved)
    for message in [str(saved), *messages]:
        assert message in str(refused.value)


def test_the_same_model_is_taken_in_another_layout_and_with_other_training(saved: Path, shards: Path) -> None:
    others = ("image.trainable=true", "model.init_std=0.01", *layout("tp=4"))
    assert len(check_model(small_config(shards, "unused", *others), saved)) > 100


def test_settings_that_belie_the_tensors_are_no_excuse(saved: Path, shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / saved.name
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).symlink_to(file)
    settings = yaml.safe_load((saved / "config.yaml").read_text())
    settings["audio"]["num_layers"] = 1  # as many bytes: without hashes, sizes are all that is compared
    manifest = json.loads((saved / "manifest.json").read_text())
    (folder / "COMMITTED").unlink()
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").write_text(json.dumps({key: manifest[key] for key in ("step", "bytes")}))
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert configs.load(str(folder / "config.yaml")).audio.num_layers == 1
    with pytest.raises(ConfigError, match=r"it has, and the model has not embedding\.audio\.encoder\.tower"):
        check_start_from(small_config(shards, "unused", "audio.num_layers=1"), folder)
    with pytest.raises(DataError, match=r"is not the model of its config\.yaml"):
        export(folder, tmp_path / "out", options=Options(kinds=("full",)))


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full export of that checkpoint."""
    out = tmp_path_factory.mktemp("exported") / "out"
    export(saved, out, options=Options(kinds=("full",)))
    return out / "full"


def test_an_import_has_the_encoders_of_the_folder(exported: Path, tmp_path: Path, shards: Path) -> None:
    config = import_folder(exported, tmp_path / "start", preset="tiny", overrides=["data.seq_len=256"])
    own = small_config(shards, "unused")
    for section in ("image", "audio"):
        kept = {name: getattr(getattr(config, section), name) for name in ("trainable", "pretrained")}
        assert getattr(own, section).model_copy(update=kept) == getattr(config, section)
    check_start_from(config, tmp_path / "start")


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vision_config", "hidden_act", "relu", "vision_config.hidden_act=relu, ours has gelu"),
        ("vision_config", "layer_norm_eps", 1e-5, "vision_config.layer_norm_eps=1e-05, ours has 1e-06"),
        ("audio_config", "do_stable_layer_norm", True, "audio_config.do_stable_layer_norm=True, ours has False"),
        ("audio_config", "num_hidden_layers", 1, "it has, and the model has not embedding.audio"),
        ("vision_config", "intermediate_size", 48, r"\(32, 16\) in it, \(48, 16\) in the model"),
    ],
)
def test_a_folder_whose_encoders_are_not_ours_is_refused(
    part: str, key: str, value: object, message: str, exported: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(exported, tmp_path / "folder")
    description = json.loads((folder / "config.json").read_text())
    description[part][key] = value
    (folder / "config.json").write_text(json.dumps(description))
    (folder / "conversion_manifest.json").unlink()  # as no folder of others has one
    with pytest.raises((ConfigError, DataError), match=message):
        import_folder(folder, tmp_path / "start", preset="tiny")
    assert not (tmp_path / "start").exists()


def test_encoders_that_are_set_otherwise_than_in_the_folder_are_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"vision_config.num_attention_heads=2, ours has 4"):
        import_folder(exported, tmp_path / "start", preset="tiny", overrides=["image.num_attention_heads=4"])
