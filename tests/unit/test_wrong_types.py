"""Files from elsewhere whose contents are of other types than they should be: an error by name, never a traceback."""

import copy
import functools
import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from small import save_tokenizer, small_config, write_shards

from megatron_mm import config as configs
from megatron_mm.batch import TokenCounts
from megatron_mm.checkpoint import verify
from megatron_mm.checkpoint.format import COMMITTED, MANIFEST, Fence, read_manifest
from megatron_mm.engine import mesh, rendezvous
from megatron_mm.environment import read_number
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf import export
from megatron_mm.hf.load import decoder_settings, encoder_settings, read_description
from megatron_mm.hf.tensors import SafetensorsReader, read_header
from megatron_mm.ingest.read import read_file
from megatron_mm.shards import fingerprints, open_shards
from megatron_mm.tokenizer import TextTokenizer
from megatron_mm.training import checkpoints, stop
from megatron_mm.training.inputs import Inputs, _tokenizer_of
from megatron_mm.training.living import check_nobody_lives
from megatron_mm.training.metrics import _forget_after, read_metrics, run_of_metrics
from megatron_mm.training.watch import explain_hang, read_health

WRONG = (None, True, -1, 2**70, 1.5, "x", "../../x", "a\nb\x1b[2J", [], {}, [[1]], {"x": None}, 10**4000)
"""What stands, in turn, in the place of each value."""
MAX_PLACES = 40
DEEP = 100_000


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield where each value lies in `value`, itself included; of a list the first and of an object the first eight."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, one in list(inner)[:8]:
        yield from places(one, (*path, key))


def changed(value: Any, path: tuple, new: Any, *, gone: bool = False) -> Any:
    """Return `value` with something else at `path`, or without what is there."""
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if gone:
        del inner[path[-1]]
    else:
        inner[path[-1]] = new
    return value


def spelled(value: Any) -> bytes:
    """Return JSON, of numbers of any length too."""
    if value == WRONG[-1]:
        return b"1" + b"0" * 4000
    return json.dumps(value).encode()


def mutations(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (what was done, bytes) of a JSON file that is damaged or of other types."""
    value = json.loads(data)
    yield from (("empty", b""), ("not UTF-8", b"\xff\xfe\xff" + data), ("cut", data[: len(data) // 2]))
    yield from (("a mark of byte order", b"\xef\xbb\xbf" + data), ("NaN", b'{"step": NaN}'), ("zeros", bytes(50)))
    yield from (("deep lists", b"[" * DEEP), ("deep objects", b'{"a":' * DEEP), ("infinite", b'{"version": 1e999}'))
    if isinstance(value, dict) and value:
        key = next(iter(value))
        yield "twice", b"{" + json.dumps(key).encode() + b": 1, " + data.strip()[1:]
    for path in list(places(value))[:MAX_PLACES]:
        for new in WRONG[:-1]:
            yield f"{path} = {new!r}", spelled(changed(value, path, new))
        if path:
            yield f"no {path}", spelled(changed(value, path, None, gone=True))
    yield "a number of 4,000 digits", b'{"step": 1' + b"0" * 5000 + b"}"


def survivors(
    file: Path,
    read: Callable[[], object],
    *,
    write: Callable[[bytes], object] | None = None,
    data: bytes | None = None,
    named: tuple[str, ...] = (),
) -> list[str]:
    """Return each mutation of a file at which `read` raises what it should not, or names neither it nor `named`."""
    original = file.read_bytes()
    read()
    failed = []
    for what, mutated in mutations(data if data is not None else original):
        (write or file.write_bytes)(mutated)
        try:
            read()
        except (ConfigError, DataError) as error:
            if not any(part in str(error) for part in (file.name, *named)):
                failed.append(f"{what}: does not name the file: {error}")
        except Exception as error:
            failed.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
    file.write_bytes(original)
    return failed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"))


def test_the_manifest_of_shards(shards: Path) -> None:
    def read() -> None:
        for reader in open_shards([str(shards)]):
            reader.blocks, reader.geometries, reader.document(0)
        fingerprints(str(shards))

    assert not survivors(Path(f"{shards}.json"), read)


def test_the_manifest_of_merged_shards(shards: Path) -> None:
    from megatron_mm.shards import merge

    merge(shards.with_name("merged"), [str(shards)])
    merged = shards.with_name("merged.json")
    assert not survivors(merged, lambda: open_shards([str(merged.with_suffix(""))]), named=("json is missing",))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that is a checkpoint as far as its manifest goes."""
    path = tmp_path / "step_00000004"
    path.mkdir()
    (path / "config.yaml").write_text("x: 1\n")
    inputs = Inputs({"a": ["1"]}, {"b": ["2"]}, "3", {"training.start_from": "none"}).as_json()
    facts = {"step": 4, "run": "r", "batch_sizes": [[0, 2]], "left_out": [[0, 2, 1]], "changes": [], "inputs": inputs}
    digest = hashlib.sha256(b"x: 1\n").hexdigest()
    commit(path, json.dumps(facts | {"bytes": {"config.yaml": 5}, "sha256": {"config.yaml": digest}}).encode())
    return path


def commit(path: Path, manifest: bytes) -> None:
    (path / MANIFEST).write_bytes(manifest)
    (path / COMMITTED).write_text(hashlib.sha256(manifest).hexdigest())


def test_the_manifest_of_a_checkpoint(checkpoint: Path) -> None:
    def read() -> None:
        facts = read_manifest(checkpoint)
        assert isinstance(verify.find_damage(checkpoint), list)
        try:
            Inputs.of(facts.get("inputs"))
        except DataError as error:
            assert "checkpoint's inputs" in str(error)

    content = (checkpoint / MANIFEST).read_bytes()
    for reads in (read, lambda: verify.check_outline(checkpoint)):
        commit(checkpoint, content)
        commits = functools.partial(commit, checkpoint)
        assert not survivors(checkpoint / MANIFEST, reads, write=commits, named=("config.yaml",))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", "", "a\0b"])
def test_a_manifest_names_files_of_its_own_folder_alone(checkpoint: Path, name: str) -> None:
    (checkpoint.parent / "secret").write_text("x: 1\n")
    facts = read_manifest(checkpoint)
    digest = facts["sha256"]["config.yaml"]
    commit(checkpoint, json.dumps(facts | {"bytes": {name: 5}, "sha256": {name: digest}}).encode())
    assert "is no file of its folder" in "".join(verify.find_damage(checkpoint))
    with pytest.raises(DataError, match="is no file of its folder"):
        verify.check_outline(checkpoint)


def test_the_index_of_a_checkpoint_names_files_of_its_own_folder_alone(tmp_path: Path) -> None:
    import pickle

    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    from megatron_mm.checkpoint.index import read_index

    path = tmp_path / ".metadata"
    for name in ("../x", "/etc/hostname", 7, None, ["x"]):
        path.write_bytes(pickle.dumps(Metadata({}, storage_data={MetadataIndex("a"): _StorageInfo(name, 0, 1)})))
        with pytest.raises(DataError, match="metadata"):
            read_index(path)
    for foreign in ([], None, {"a": 1}, 7):
        path.write_bytes(pickle.dumps(foreign))
        with pytest.raises(DataError, match="metadata is damaged"):
            read_index(path)


def test_the_files_of_an_export(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    manifest, progress = tmp_path / export.MANIFEST, tmp_path / "partial" / "progress.json"
    manifest.write_text(json.dumps({"kind": "text", "sha256": {"a.txt": hashlib.sha256(b"x").hexdigest()}}))

    assert not survivors(manifest, lambda: export.verify(tmp_path), named=("a.txt",))
    progress.parent.mkdir()
    progress.write_text(json.dumps({"begun": "b", "done": {"a": "c"}}))
    for what, data in mutations(progress.read_bytes()):
        progress.write_bytes(data)
        try:
            export._begin(progress.parent, "b")
        except (ConfigError, DataError) as error:
            assert "partial" in str(error), what


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with an index, as far as its files are read."""
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, tmp_path / "model-1.safetensors")
    index = {"metadata": {"total_size": 40}, "weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_the_index_of_a_hugging_face_folder(folder: Path) -> None:
    assert not survivors(folder / "model.safetensors.index.json", lambda: SafetensorsReader(folder))


@pytest.mark.parametrize("name", ["../model-1.safetensors", "ABSOLUTE", "inner/../model-1.safetensors", "..", ""])
def test_an_index_names_files_of_its_own_folder_alone(folder: Path, name: str) -> None:
    (folder / "inner").mkdir()
    name = str(folder / "model-1.safetensors") if name == "ABSOLUTE" else name
    (folder / "inner/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(DataError, match=r"index.json names .* is no file of its folder"):
        SafetensorsReader(folder / "inner")


def test_the_header_of_safetensors(folder: Path) -> None:
    file = folder / "model-1.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]

    def write(header: bytes) -> None:
        file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])

    assert not survivors(file, lambda: read_header(file), write=write, data=data[8 : 8 + length])


LLAMA = {
    "model_type": "internvl",
    "text_config": {
        **{"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rms_norm_eps": 1e-6, "hidden_act": "silu"},
    },
    "downsample_ratio": 0.5,
    "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": [32, 32]},
}


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_the_configuration_of_a_hugging_face_folder(tmp_path: Path, part: str) -> None:
    file = tmp_path / "config.json"
    own = LLAMA if part == "vision_config" else LLAMA[part]
    file.write_text(json.dumps(own))

    def read() -> None:
        description = read_description(tmp_path)
        try:
            found = decoder_settings(description) | encoder_settings(description)
            configs.load("tiny", [f"{key}={value}" for key, value in found.items()])
        except ConfigError as error:
            raise DataError(f"config.json: {error}") from error  # names the setting, not the file

    failed = []
    for what, data in mutations(file.read_bytes()):
        file.write_bytes(data)
        try:
            read()
        except DataError:
            pass
        except Exception as error:
            failed.append(f"{what}: {type(error).__name__}: {error}")
    assert not failed


def test_a_tokenizer(tmp_path: Path) -> None:
    path = save_tokenizer(tmp_path / "tokenizer.json")

    def read() -> None:
        TextTokenizer(path, engine="reference").encode("a text")
        _tokenizer_of(path.read_bytes(), str(path))

    assert not survivors(path, read)


def test_the_state_files_of_a_run(tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(shards, tmp_path / "run")
    folder = Path(config.run_dir)
    (folder / "health").mkdir(parents=True)
    left_out, beat, metrics = folder / "left_out.json", folder / "health/rank_0.json", folder / "metrics.jsonl"
    left_out.write_text(json.dumps({"run": "r", "left_out": [[0, 2, 1]]}))
    assert not survivors(left_out, lambda: checkpoints._read_left_out(config, run="r", stored=[]))
    own = {"rank": 0, "host": "elsewhere", "pid": 1, "process_started": 0.0, "job": None, "period": 0.01, "step": 1}
    beat.write_text(json.dumps(own | {"phase": "step", "beat": 1, "waits_in": None, "at": "x.py:1"}))

    def read_beats() -> None:
        explain_hang(read_health(beat.parent), [], world_size=2)
        check_nobody_lives(folder, heartbeat_seconds=0.01)

    assert not survivors(beat, read_beats)
    assert len(read_health(beat.parent)) == 1
    beat.write_text(json.dumps({"rank": 0, "host": "elsewhere", "pid": 1, "step": 1, "phase": "step", "time": 0}))
    assert len(read_health(beat.parent)) == 1, "an older version's, which says less, keeps another run out too"
    beat.write_text(json.dumps(own | {"phase": 7, "time": 0.0}))
    assert not read_health(beat.parent) and "rank_0.json is not what it should be: phase" in caplog.text
    record = {"step": 1, "run": "r", "loss": 1.0, "grad_norm": 1.0, "step_seconds": 1.0, "text_tokens": 3}
    metrics.write_text(json.dumps(record))

    def write(data: bytes) -> None:
        metrics.write_bytes(data.replace(b"\n", b" ") + b'\n{"step": 2}\n')

    assert not survivors(metrics, lambda: (read_metrics(folder), run_of_metrics(folder)), write=write)
    whole = record | dict.fromkeys((f"{name}_tokens" for name in TokenCounts.names()), 3)
    for key, wrong in (("text_tokens", "x"), ("text_tokens", None), ("step_seconds", []), ("step", 2**70)):
        metrics.write_text("".join(json.dumps(one) + "\n" for one in (whole, whole | {"step": 2, key: wrong})))
        assert _forget_after(metrics, 1).counts.numbers[0] == 3


def test_the_report_of_metrics_that_no_run_has_written(tmp_path: Path) -> None:
    import importlib.util

    tool = Path(__file__).parents[2] / "tools/report_run.py"
    spec = importlib.util.spec_from_file_location("report_run", tool)
    report_run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report_run)
    start = {"step": 0, "layout": "TP1", "parameters": 3, "run": "r"}
    step = {"step": 1, "loss": 1.0, "grad_norm": 1.0, "tokens": 3, "tokens_per_second": 1.0}
    whole = [start, step, {"step": 1, "heldout/loss": 1.0, "heldout/loss/dataset/a$b^{$\n\x1b[2Jx": 2.0}]
    bad = [start | {"parameters": "x"}, step | {"tokens": "3"}, step | {"loss": [1]}, {"step": 1, "heldout/loss": "x"}]
    bad += [start | {"layout": 7, "parameters": None}, step | {"tokens_per_second": {}}, step | {"loss": 10**400}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in whole))
    report_run._run(tmp_path)
    for line in bad:
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*whole, line]))
        try:
            report_run._run(tmp_path)
        except DataError as error:
            assert "metrics.jsonl" in str(error)


def test_records_of_other_types_cost_themselves_alone(tmp_path: Path) -> None:
    (tmp_path / "own.png").write_bytes(b"no image")
    fields = ("text", "content", "caption", "image", "audio", "segments")
    lines = [spelled({field: value}) for field in fields for value in WRONG[:-1]]
    lines += [spelled({"segments": [value]}) for value in WRONG[:-1]] + [spelled(value) for value in WRONG[:-1]]
    lines += [b"[" * DEEP, b'{"text": "\xff"}', b'{"text": NaN}', b'{"text": 1' + b"0" * 5000 + b"}"]
    (tmp_path / "l.jsonl").write_bytes(b"\n".join(lines) + b'\n{"text": "good"}\n')
    documents, rejections = read_file(tmp_path / "l.jsonl")
    assert len(documents) + len(rejections) == len(lines) + 1
    assert documents[-1].segments[0].text == "good" and len(rejections) > len(lines) // 2
    assert not [one for one in rejections if "raised" in one.reason]


def test_rows_of_other_types_cost_themselves_alone(tmp_path: Path) -> None:
    columns = {"text": ["good", None], "image": [None, {"bytes": None, "path": 7}], "audio": [None, [1]]}
    for name, values in columns.items():
        table = pyarrow.table({"text": ["good", "good"], name: values})
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        documents, rejections = read_file(tmp_path / "t.parquet")
        assert len(documents) == len(rejections) == 1, name
        assert "raised" not in rejections[0].reason


SETTINGS = (
    "- 1\n",
    "7\n",
    "x: 2001-99-99\n",
    "x: !!int abc\n",
    "x: !!float abc\n",
    "x: !!bool abc\n",
    "x: !!binary \xff\n",
    "x: !!python/object/apply:os.system [id]\n",
    "? [1]\n: 2\n",
    "? {a: 1}\n: 2\n",
    "x: &a [*a]\n",
    "x: &a {b: *a}\n",
    "[" * 1500,
    "{a: " * 1500,
    "x: 1" + "0" * 5000,
    "x: \0",
    "\ufeffmodel: 1\n",
    "1: 2\n",
    "null: 3\n",
    "<<: 1\n",
    "model: &m {<<: *m}\n",
    "extends: [1]\n",
    "extends: /etc\n",
    "model: {1: 2}\n",
    "model: {null: 2}\n",
    "data: null\n",
    "extends: tiny\nmodel: {num_layers: .nan}\n",
    "extends: tiny\nmodel: {num_layers: 1e400}\n",
    "extends: tiny\nrun_dir: [1]\n",
    "extends: tiny\noptimizer: {name: [1]}\n",
    "extends: tiny\noptimizer: 3\n",
    "extends: tiny\ndata: {train: {1: 2}}\n",
    "extends: tiny\ndata: {train: [[1]]}\n",
    "extends: tiny\nimage: {encoder: {a: 1}}\n",
    "extends: tiny\nguard: null\n",
    "extends: tiny\ndata: {changes: {0: x}}\n",
    "extends: tiny\ndata: {changes: [{step: -1}]}\n",
    "extends: tiny\nmodel: {num_layers: 100000000000000000000000000000}\n",
)
"""Files that are no settings."""


@pytest.mark.parametrize("text", SETTINGS)
def test_settings_of_other_types(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    for read in (configs.load, configs.load_saved):
        with pytest.raises(ConfigError) as found:
            read(str(path))
        assert str(found.value)
    path.write_bytes(b"x: \xff\n")
    with pytest.raises(ConfigError, match=r"settings\.yaml"):
        configs.load(str(path))


@pytest.mark.parametrize("value", ["2001-99-99", "!!int abc", "[" * 1500, "1" * 5000, "{", "&a [*a]", "\x00"])
def test_an_override_of_another_type(value: str) -> None:
    with pytest.raises(ConfigError):
        configs.load("tiny", [f"model.num_layers={value}"])


@pytest.mark.parametrize("value", ["x", "1.5", "1" * 5000, "\n1 2", "-", "0x1", "-1", "nan", str(2**40)])
def test_a_number_in_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "LOCAL_WORLD_SIZE": lambda: read_number("LOCAL_WORLD_SIZE", 1, least=1),
        "WORLD_SIZE": mesh.world_size,
        "RANK": lambda: rendezvous.own_rank(2),
    }
    monkeypatch.setenv("MASTER_PORT", "1")
    for name, read in names.items():
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigError, match=f"^{name}="):
            read()


def test_a_deadline_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("nan", "x", "1:00"):
        monkeypatch.setenv(stop.DEADLINE, value)
        with pytest.raises(ConfigError, match=r"is no Unix time"):
            stop._deadline()


def test_the_name_of_a_job_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "../../x/y\n1")
    fence = Fence.take(tmp_path / "run/checkpoints")
    assert fence.token.startswith(".._.._x_y_1.0.") and fence.holds(tmp_path / "run/checkpoints")


def test_the_settings_of_a_checkpoint_extend_no_others(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("extends: tiny\n")
    assert configs.load_saved(tmp_path / "config.yaml").model == configs.load("tiny").model
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ConfigError, match=r"config.yaml extends 'tiny': the settings of a checkpoint stand alone"):
        configs.load_saved(tmp_path / "config.yaml")
