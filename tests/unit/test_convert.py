"""Conversion of files alone: there and back to the byte, on-disk dialects, and inputs that must be refused."""

import contextlib
import errno
import io
import json
import os
import pickle
import resource
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from launch import run_alone
from safetensors.torch import load_file, save_file
from small import save_tokenizer, small_config
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_mm import config as configs
from megatron_mm.checkpoint import index, write
from megatron_mm.checkpoint.index import CheckpointReader
from megatron_mm.errors import ConfigError, DataError, StorageFailed
from megatron_mm.hf import files, stream
from megatron_mm.hf.export import Options, export, verify
from megatron_mm.hf.load import import_folder
from megatron_mm.hf.tensors import SafetensorsReader

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 320,
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}


def save_llama(folder: Path, **changes) -> dict[str, Tensor]:
    """Write a Llama of random weights, negative zeros among them, and return them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        model.model.embed_tokens.weight[3] = -0.0
    model.save_pretrained(folder)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a small run, as a YAML file."""
    folder = tmp_path_factory.mktemp("preset")
    overrides = ("parallel.embedding_slot=false", "parallel.loss_slot=false")
    path = folder / "small.yaml"
    path.write_text(configs.to_yaml(small_config("unused", folder / "run", *overrides)))
    save_tokenizer(folder / "tokenizer.json")
    return path


@pytest.fixture(scope="module")
def imported(preset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and the checkpoint that it became: folders `llama` and `checkpoint`."""
    folder = tmp_path_factory.mktemp("imported")
    save_llama(folder / "llama")
    import_folder(folder / "llama", folder / "checkpoint", preset=str(preset))
    return folder


def text_of(
    checkpoint: Path, out: Path, preset: Path, *, tokenizer: Path | None = None, **options
) -> dict[str, Tensor]:
    """Export the text model of a checkpoint and return its weights."""
    tokenizer = tokenizer or preset.parent / "tokenizer.json"
    export(checkpoint, out, tokenizer_path=tokenizer, options=Options(("text",), **options))
    found: dict[str, Tensor] = {}
    for file in sorted((out / "text").glob("*.safetensors")):
        found |= load_file(file)
    return found


def bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8)


def test_a_llama_comes_back_to_the_bit(imported: Path, preset: Path, tmp_path: Path) -> None:
    original = load_file(imported / "llama" / "model.safetensors")
    found = text_of(imported / "checkpoint", tmp_path / "out", preset)
    assert found.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(bits(found[name]), bits(value)), name
    before = json.loads((imported / "llama" / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "text" / "config.json").read_text())
    assert {key: after[key] for key in LLAMA} == {key: before[key] for key in LLAMA}
    assert after["rope_parameters"] == before["rope_parameters"]


def test_the_tokenizer_of_the_folder_is_kept_and_a_named_one_comes_first(preset: Path, tmp_path: Path) -> None:
    save_llama(tmp_path / "llama")
    named = preset.parent / "tokenizer.json"
    import_folder(tmp_path / "llama", tmp_path / "bare", preset=str(preset))
    with pytest.raises(ConfigError, match="--tokenizer"):
        export(tmp_path / "bare", tmp_path / "out", options=Options(("text",)))
    kept = json.loads(named.read_text()) | {"version": "1.0", "padding": None, "truncation": None}
    (tmp_path / "llama" / "tokenizer.json").write_text(json.dumps(kept, indent=3))
    import_folder(tmp_path / "llama", tmp_path / "checkpoint", preset=str(preset))
    export(tmp_path / "checkpoint", tmp_path / "out", options=Options(("text",)))
    assert json.loads((tmp_path / "out" / "text" / "tokenizer.json").read_text())["model"] == kept["model"]
    other = json.loads(named.read_text())
    other["normalizer"] = {"type": "NFC"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    text_of(tmp_path / "checkpoint", tmp_path / "out_2", preset, tokenizer=tmp_path / "other.json")
    assert "NFC" in (tmp_path / "out_2" / "text" / "tokenizer.json").read_text()


def test_small_blocks_and_shards_give_the_same_tensors(
    imported: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_file(imported / "llama" / "model.safetensors")
    monkeypatch.setattr(index, "BLOCK_BYTES", 500)  # no whole number of rows
    found = text_of(imported / "checkpoint", tmp_path / "out", preset, shard_bytes=20_000)
    assert len(list((tmp_path / "out" / "text").glob("*.safetensors"))) > 5
    assert all(torch.equal(bits(found[name]), bits(value)) for name, value in expected.items())
    assert verify(tmp_path / "out" / "text") > 10


@pytest.mark.parametrize("times", [1, 2])
def test_key_value_heads_are_repeated_in_order(times: int, imported: Path, preset: Path, tmp_path: Path) -> None:
    original = load_file(imported / "llama" / "model.safetensors")
    found = text_of(imported / "checkpoint", tmp_path / "out", preset, kv_replicate=times)
    name = "model.layers.1.self_attn.v_proj.weight"
    assert torch.equal(found[name], original[name].view(2, 8, 32).repeat_interleave(times, 0).flatten(0, 1))
    with pytest.raises(ConfigError, match="kv-replicate 3"):
        text_of(imported / "checkpoint", tmp_path / "other", preset, kv_replicate=3)


def test_bf16_is_rounded_once(imported: Path, preset: Path, tmp_path: Path) -> None:
    original = load_file(imported / "llama" / "model.safetensors")
    found = text_of(imported / "checkpoint", tmp_path / "out", preset, dtype=torch.bfloat16)
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in original.items())


def test_a_tied_head_starts_as_the_embedding_and_new_rows_as_the_mean(preset: Path, tmp_path: Path) -> None:
    original = save_llama(tmp_path / "llama", tie_word_embeddings=True)["model.embed_tokens.weight"]
    import_folder(tmp_path / "llama", tmp_path / "checkpoint", preset=str(preset), overrides=["model.vocab_size=328"])
    reader = CheckpointReader(tmp_path / "checkpoint")
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = reader.read_rows(name, 0, 328)
        assert torch.equal(rows[:320], original)
        torch.testing.assert_close(rows[320:], original.mean(0).expand(8, -1))


def test_layers_kept_apart_and_halves_read_as_one(imported: Path, tmp_path: Path) -> None:
    """megatron-core's other ways of writing the same: a tensor a layer, and gate and up apart."""
    reader = CheckpointReader(imported / "checkpoint")
    folder = tmp_path / "apart"
    shutil.copytree(imported / "checkpoint", folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = "decoder.layers.mlp.linear_fc1.weight"
    stacked = metadata.state_dict_metadata.pop(key)
    for layer in range(3):
        for half, place in enumerate("wv"):
            name = f"decoder.layers.{layer}.mlp.linear_fc1.weight_{place}"
            value = reader.read_rows(f"decoder.layers.{layer}.mlp.linear_fc1.weight", 48 * half, 48 * half + 48)
            file = f"{name}.distcp"
            torch.save(value, folder / file)
            offsets = torch.Size((0, 0))
            chunk = write.ChunkStorageMetadata(offsets, value.shape)
            metadata.state_dict_metadata[name] = write.TensorStorageMetadata(stacked.properties, value.shape, [chunk])
            size = (folder / file).stat().st_size
            metadata.storage_data[write.MetadataIndex(name, offsets)] = write._StorageInfo(file, 0, size)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    manifest = {"step": 0, "bytes": {path.name: path.stat().st_size for path in folder.iterdir()}}
    manifest["bytes"].pop("manifest.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    apart = CheckpointReader(folder)
    assert apart.tensors == reader.tensors
    for layer in range(3):
        name = f"decoder.layers.{layer}.mlp.linear_fc1.weight"
        assert torch.equal(apart.read_rows(name, 10, 90), reader.read_rows(name, 10, 90))


def without_hashes(folder: Path) -> None:
    """Make a checkpoint one of those that say no more of their files than sizes: of an older import."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({key: manifest[key] for key in ("step", "bytes")}))


def test_nothing_in_an_index_is_executed(imported: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    folder = tmp_path / "checkpoint"
    shutil.copytree(imported / "checkpoint", folder)
    original = (folder / ".metadata").stat().st_size
    without_hashes(folder)
    evil = pickle.dumps(Evil())
    (folder / ".metadata").write_bytes(evil + b"\0" * (original - len(evil)))
    with pytest.raises(DataError, match=r"posix\.mkdir"):
        CheckpointReader(folder)
    assert not (tmp_path / "executed").exists()


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path / "__0_0.distcp"), "its manifest says"),
        (lambda path: flip(path / "__0_0.distcp"), "has other bytes than were written"),
        (lambda path: flip(path / "config.yaml"), "has other bytes than were written"),
        (lambda path: (path / "__0_0.distcp").unlink(), "is missing, its manifest says"),
        (lambda path: (path / "manifest.json").unlink(), "not a checkpoint"),
        (lambda path: path.rename(path.with_name("step_1.partial")), "half written|not a checkpoint"),
    ],
    ids=["cut", "flipped", "other-settings", "missing", "no-manifest", "partial"],
)
def test_a_damaged_checkpoint_gives_no_export(damage, message, imported: Path, preset: Path, tmp_path: Path) -> None:
    shutil.copytree(imported / "checkpoint", tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint")
    with pytest.raises(DataError, match=message):
        text_of(tmp_path / "checkpoint", tmp_path / "out", preset)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_shape_than_its_settings_is_refused(
    imported: Path, preset: Path, tmp_path: Path
) -> None:
    shutil.copytree(imported / "checkpoint", tmp_path / "checkpoint")
    without_hashes(tmp_path / "checkpoint")
    for change, message in (("num_layers: 2", "decoder.layers.2"), ("num_layers: 4", "decoder.layers.3")):
        text = (imported / "checkpoint" / "config.yaml").read_text()
        changed = text.replace("num_layers: 3\n", f"{change}\n", 1)
        path = tmp_path / "checkpoint" / "config.yaml"
        path.write_text(changed)
        with pytest.raises(DataError, match=message):
            text_of(tmp_path / "checkpoint", tmp_path / "out", preset)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing_that_looks_finished_and_can_be_gone_on_from(
    imported: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def limited(descriptor: int, data: memoryview, position: int) -> int:
        written.append(len(data))
        if sum(written) > 90_000:
            raise OSError(errno.ENOSPC, "no space left on device")
        return original(descriptor, data, position)

    original = os.pwrite
    monkeypatch.setattr(stream.os, "pwrite", limited)
    with pytest.raises(StorageFailed, match="is full"):
        text_of(imported / "checkpoint", tmp_path / "out", preset, shard_bytes=20_000)
    assert not (tmp_path / "out").exists()
    whole = sorted((tmp_path / "out.partial" / "text").glob("*.safetensors"))
    assert len(whole) >= 2
    assert not list(tmp_path.rglob("*.safetensors.partial"))
    times = {path.name: path.stat().st_mtime_ns for path in whole}
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="other options"):
        text_of(imported / "checkpoint", tmp_path / "out", preset, shard_bytes=30_000)
    found = text_of(imported / "checkpoint", tmp_path / "out", preset, shard_bytes=20_000)
    expected = load_file(imported / "llama" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all((tmp_path / "out" / "text" / name).stat().st_mtime_ns == time for name, time in times.items())


def test_a_disk_that_is_full_after_the_last_shard_is_named_too(
    imported: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(files, "write_files", full)
    with pytest.raises(StorageFailed, match="the small files around the weights do not fit"):
        text_of(imported / "checkpoint", tmp_path / "out", preset)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    text_of(imported / "checkpoint", tmp_path / "out", preset)
    assert verify(tmp_path / "out" / "text") > 5


TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


def convert(arguments: list[str], file_bytes: int) -> tuple[int, str]:
    """Run the tool where no file can grow beyond `file_bytes`, as on a full disk; return its status and errors."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv[1:] = arguments
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = runpy.run_path(str(TOOL))["main"]()
    return status, errors.getvalue()


def test_the_tool_says_that_the_disk_is_full_and_leaves_nothing_that_looks_finished(
    imported: Path, preset: Path, tmp_path: Path
) -> None:
    shard = (imported / "llama" / "model.safetensors").stat().st_size
    source, tokenizer, out, start = imported / "checkpoint", preset.parent / "tokenizer.json", "out", "start"
    for name, command in (
        (out, ["to-hf", source, tmp_path / out, "--text", "--tokenizer", tokenizer]),
        (start, ["from-hf", imported / "llama", tmp_path / start, "--preset", preset]),
    ):
        arguments = [str(part) for part in command]
        status, errors = run_alone(convert, arguments, shard // 2)
        assert status == 75, errors
        assert "is full" in errors.splitlines()[-1]
        assert not (tmp_path / name).exists()
        assert not list((tmp_path / f"{name}.partial").rglob("*.safetensors*"))
        assert not list((tmp_path / f"{name}.partial").rglob(".metadata"))
        assert run_alone(convert, arguments, 100 * shard)[0] == 0
    assert verify(tmp_path / out / "text") > 5
    CheckpointReader(tmp_path / start).check()


def test_an_import_that_was_killed_is_begun_anew(imported: Path, preset: Path, tmp_path: Path) -> None:
    (tmp_path / "start.partial").mkdir()
    (tmp_path / "start.partial" / "__0_9.distcp").write_bytes(b"half of it")
    with pytest.raises(DataError, match="not a checkpoint"):
        CheckpointReader(tmp_path / "start.partial")
    import_folder(imported / "llama", tmp_path / "start", preset=str(preset))
    assert not (tmp_path / "start.partial").exists()
    assert sorted(path.name for path in (tmp_path / "start").glob("*.distcp")) == ["__0_0.distcp"]


def test_too_little_space_is_said_before_anything_is_written(
    imported: Path, preset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageFailed, match="0.000 GB are free"):
        text_of(imported / "checkpoint", tmp_path / "out", preset)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_flipped_bit_is_found(imported: Path, preset: Path, tmp_path: Path) -> None:
    text_of(imported / "checkpoint", tmp_path / "out", preset)
    flip(next((tmp_path / "out" / "text").glob("*.safetensors")))
    with pytest.raises(DataError, match="not what was written"):
        verify(tmp_path / "out" / "text")
    shutil.copytree(imported / "checkpoint", tmp_path / "checkpoint")
    flip(tmp_path / "checkpoint" / "__0_0.distcp")
    with pytest.raises(DataError, match="damaged"):
        CheckpointReader(tmp_path / "checkpoint").check()


def without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = weights.pop(name)
    save_file(weights, folder / "model.safetensors")


def configured(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: cut(path / "model.safetensors"), "cut short"),
        (lambda path: (path / "model.safetensors").unlink(), "has neither"),
        (lambda path: (path / "config.json").unlink(), "config.json cannot be read"),
        (lambda path: configured(path, num_hidden_layers=2), "Unexpected: model.layers.2"),
        (lambda path: configured(path, intermediate_size=40), "mlp"),
        (lambda path: configured(path, hidden_act="gelu"), "hidden_act=gelu"),
        (lambda path: configured(path, model_type="gpt2"), "model_type=gpt2"),
        (lambda path: configured(path, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type=yarn"),
        (lambda path: without(path, "model.layers.0.mlp.up_proj.weight"), "Missing: model.layers.0.mlp.up_proj.weight"),
    ],
    ids=["cut", "no-weights", "no-config", "layers", "width", "activation", "kind", "rope", "keys"],
)
def test_a_folder_that_is_no_decoder_of_ours_is_refused(damage, message, imported, preset, tmp_path: Path) -> None:
    shutil.copytree(imported / "llama", tmp_path / "llama")
    damage(tmp_path / "llama")
    with pytest.raises((ConfigError, DataError), match=message):
        import_folder(tmp_path / "llama", tmp_path / "checkpoint", preset=str(preset))
    assert not (tmp_path / "checkpoint").exists()


def test_an_index_that_names_an_absent_shard_is_refused(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="lacks model-00001-of-00002"):
        SafetensorsReader(tmp_path)
