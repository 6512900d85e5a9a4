"""What a start compares, refuses and leaves alone: between ranks, between a run and its resumes, between two runs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import Ended, _main, run_alone, run_command, run_ranks
from small import SMALL, layout, pretrained, save_tokenizer, write_shards
from test_failures import run_of, train

from megatron_mm import config as configs
from megatron_mm.checkpoint import load as loading
from megatron_mm.checkpoint.format import read_manifest
from megatron_mm.config import Config
from megatron_mm.data.consumption import LeftOut
from megatron_mm.engine import mesh as meshes
from megatron_mm.errors import ConfigError, DataError, StorageFailed
from megatron_mm.shards import merge
from megatron_mm.shards.writer import write_manifest
from megatron_mm.storage import hash_file
from megatron_mm.tokenizer import train_tokenizer
from megatron_mm.training import checkpoints, processes
from megatron_mm.training.evaluate import evaluate_checkpoint
from megatron_mm.training.metrics import read_metrics
from megatron_mm.training.state import TrainState
from megatron_mm.training.step import StepResult


def everything(folder: Path) -> dict[str, float]:
    """Return every file under a folder with the time of its last change."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def refusal(ranks: int, function: Callable[..., Any], *args: Any, error: type[Exception] = ConfigError) -> str:
    """Return what a run was refused with."""
    with pytest.raises(AssertionError) as failure:
        run_ranks(ranks, function, *args)
    assert f".{error.__name__}: " in str(failure.value), failure.value
    return str(failure.value)


# Between ranks.


def train_with_another(config: Config, section: str, **other: Any) -> None:
    """Train, on rank 1 with other settings."""
    if int(torch.distributed.get_rank()) == 1:
        changed = getattr(config, section).model_copy(update=other)
        config = config.model_copy(update={section: changed})
    train(config)


@pytest.mark.parametrize(
    ("section", "other"),
    [
        ("optimizer", {"lr": 0.7}),
        ("data", {"seed": 7}),
        ("training", {"global_batch_size": 4}),
        ("guard", {"hang_seconds": 5.0}),
    ],
)
def test_a_rank_with_another_setting_is_named(section: str, other: dict, shards: Path, tmp_path: Path) -> None:
    message = refusal(2, lambda_of(train_with_another, section, other), run_of(shards, tmp_path / "run"))
    ((name, value),) = other.items()
    assert f"{section}.{name} {value}" in message
    assert f"rank 1 on {socket.gethostname()}" in message
    assert not (tmp_path / "run").exists()


def lambda_of(function: Callable[..., None], section: str, other: dict) -> Callable[[Config], None]:
    """Bind what can be sent to another process."""
    import functools

    return functools.partial(function, section=section, **other)


def cut_otherwise(config: Config) -> None:
    """Join a run, on rank 1 in another layout."""
    os.environ["WORLD_SIZE"] = "2"
    if torch.distributed.get_rank() == 1:
        config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tp": 2})})
    meshes.initialize(config)


def test_a_rank_with_another_layout_is_named_before_any_group_is_made(shards: Path, tmp_path: Path) -> None:
    assert "parallel.tp 2, most ranks have 1: rank 1" in refusal(2, cut_otherwise, run_of(shards, tmp_path))


def train_from_own_folder(config: Config, folders: list[str]) -> None:
    os.chdir(folders[torch.distributed.get_rank()])
    train(config)


def test_a_rank_with_other_shards_under_the_same_prefix_is_named(tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    save_tokenizer(tmp_path / "tokenizer.json")
    for seed, folder in enumerate(folders):
        folder.mkdir()
        shutil.copy(tmp_path / "tokenizer.json", folder)
        write_shards(folder, seed=seed, text_only=True)
    message = refusal(2, train_from_own_folder, run_of("train", tmp_path / "run"), list(map(str, folders)))
    assert "do not have the same data and files" in message
    assert "data.train train" in message


def train_in_own_run_dir(config: Config, folders: list[str]) -> None:
    os.chdir(folders[torch.distributed.get_rank()])
    loading.VISIBLE_SECONDS = 1.0
    train(config.model_copy(update={"run_dir": "run"}))


def test_a_rank_that_sees_another_run_dir_is_named(stopped: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folders = [str(stopped), str(tmp_path)]
    message = refusal(2, train_in_own_run_dir, own_run(stopped), folders, error=StorageFailed)
    assert f"rank 1 on {socket.gethostname()}: " in message
    assert "step_00000003, which rank 0 goes on from, is not there" in message


def test_shards_that_are_missing_on_one_node_are_named_with_the_rank(shards: Path, tmp_path: Path) -> None:
    folders = [shards.parent, tmp_path]
    message = refusal(
        2, train_from_own_folder, run_of("train", tmp_path / "run"), list(map(str, folders)), error=DataError
    )
    assert f"rank 1 on {socket.gethostname()}: train.json is missing" in message


def train_in_environment(config: Config, name: str) -> None:
    if torch.distributed.get_rank() == 1:
        os.environ[name] = "0"
    train(config)


@pytest.mark.parametrize("name", ["NVTE_FLASH_ATTN", "NVIDIA_TF32_OVERRIDE", "NCCL_ALGO"])
def test_a_rank_of_another_environment_is_named(name: str, shards: Path, tmp_path: Path) -> None:
    message = refusal(2, train_in_environment, run_of(shards, tmp_path / "run"), name)
    assert f"${name} 0, most ranks have none: rank 1" in message
    assert not (tmp_path / "run").exists()


def train_with_kernels(config: Config) -> None:
    from megatron_mm.training import loop

    if torch.distributed.get_rank() == 1:
        loop.select = lambda *_: "native"
    train(config)


def test_a_rank_that_computes_with_other_kernels_is_named(shards: Path, tmp_path: Path) -> None:
    message = refusal(2, train_with_kernels, run_of(shards, tmp_path / "run"))
    assert "kernels native, most ranks have fused: rank 1" in message


def train_impatiently_from_own_folder(config: Config, folders: list[str]) -> None:
    loading.VISIBLE_SECONDS = 0.5
    train_from_own_folder(config, folders)


def test_a_run_dir_that_is_another_folder_on_some_ranks_is_named(shards: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
    message = refusal(2, train_impatiently_from_own_folder, run_of(shards, "run"), list(map(str, folders)))
    assert f"rank 1 on {socket.gethostname()}: run_dir=run, here {folders[1]}/run, is not the folder" in message
    assert not (folders[1] / "run").exists()


MEET = """
import sys
from datetime import timedelta
from megatron_mm.engine import rendezvous
rendezvous.PATIENCE_SECONDS = 0.6
import logging; logging.basicConfig(format="%(message)s")
try:
    rendezvous.meet(int(sys.argv[1]), timeout=timedelta(seconds=float(sys.argv[2])))
except Exception as error:
    print(type(error).__name__, error)
"""


def meeting(rank: int, world_size: int, port: int, seconds: float) -> subprocess.Popen:
    place = {"RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", MEET, str(world_size), str(seconds)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, **place}, **pipes)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_ranks_that_do_not_come_are_named_while_the_others_wait() -> None:
    port = free_port()
    ranks = [meeting(rank, 5, port, 8.0) for rank in (0, 1, 3)]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    host = socket.gethostname()
    assert f"3 of 5 ranks have come (0-1, 3 on {host}); missing: 2, 4" in said[0]
    assert "waiting for ranks for" in said[0]
    assert "RanksMissing after" in said[0]


def test_a_rank_that_cannot_reach_rank_0_says_where_it_looks() -> None:
    port = free_port()
    said = meeting(1, 2, port, 3.0).communicate(timeout=120)[0]
    assert f"rank 1 on {socket.gethostname()} has not reached rank 0 at 127.0.0.1:{port}" in said
    assert "RanksMissing rank 1 could not reach rank 0" in said


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"ConfigError MASTER_PORT={port} is in use on" in meeting(0, 2, port, 5.0).communicate(timeout=120)[0]


def test_a_rank_that_was_told_of_another_number_of_ranks_is_named_by_both() -> None:
    port = free_port()
    ranks = [meeting(0, 2, port, 20.0), meeting(1, 4, port, 20.0)]
    for said in [rank.communicate(timeout=120)[0] for rank in ranks]:
        assert "ConfigError rank" in said
        assert "WORLD_SIZE=2" in said
        assert "WORLD_SIZE=4" in said


def test_two_processes_of_one_rank_are_named() -> None:
    port = free_port()
    ranks = [meeting(rank, 3, port, 20.0) for rank in (0, 1, 1)]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    wanted = f"ConfigError rank 1 on {socket.gethostname()} is process 2 that came to 127.0.0.1:{port} with RANK=1"
    assert wanted in said[0]
    assert sum(wanted in one for one in said[1:]) == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, "RANK=x in the environment is not a whole number"),
        ({"RANK": "2"}, "RANK=2 is none of the ranks 0 to 1 of WORLD_SIZE=2"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http is no port"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number of ranks"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 is no number of ranks"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ],
)
def test_what_a_launcher_says_wrongly_is_named(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    ended = run_alone(command_where, {**place, **variables}, tmp_path)
    assert (ended.status, message in ended.stderr) == (2, True), ended.stderr


def command_where(variables: dict[str, str], run_dir: Path) -> Ended:
    os.environ.update(variables)
    return _main(["tiny", *SMALL, *pretrained("ls960"), "data.train=[none]", f"run_dir={run_dir}"])


# Between a run and its resumes.


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, held-out shards, and a run of three of its five steps over them."""
    folder = tmp_path_factory.mktemp("begun")
    write_shards(folder, "train", text_only=True)
    write_shards(folder, "heldout", seed=5, text_only=True)
    run_ranks(1, train, own_run(folder, "training.stop_after=3"))
    return folder


def own_run(folder: Path, *overrides: str) -> Config:
    held_out = (f"data.validation=[{folder}/heldout]", "evaluation.interval=5", "evaluation.samples=2")
    return run_of(folder / "train", folder / "run", *held_out, *overrides)


@pytest.fixture
def stopped(begun: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    shutil.copytree(begun, tmp_path / "copy")
    return tmp_path / "copy"


def test_paths_may_move_and_merge(stopped: Path) -> None:
    (stopped / "elsewhere").mkdir()
    for path in stopped.glob("train.*"):
        path.rename(stopped / "elsewhere" / path.name.replace("train", "other"))
    merge(stopped / "merged", [str(stopped / "elsewhere" / "other")])
    (seen,) = run_ranks(1, train, own_run(stopped, f"data.train={{{stopped}/merged: 3}}"))
    assert seen["step"] == 5
    start = [record for record in read_metrics(stopped / "run") if "layout" in record][-1]
    assert any(line.startswith("data.train: ") for line in start["changed"])


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_shards_that_were_made_anew_under_their_prefix_are_refused(name: str, stopped: Path) -> None:
    run_ranks(1, train, own_run(stopped, "training.stop_after=4"))  # a held-out set is known by its path and contents
    write_shards(stopped, name, seed=9, text_only=True)
    before = everything(stopped / "run")
    message = refusal(1, train, own_run(stopped))
    assert f"{stopped}/{name}" in message
    assert "not what its settings name now" in message
    assert everything(stopped / "run") == before


def test_shards_of_another_tokenizer_are_refused_before_and_between(stopped: Path) -> None:
    other = train_tokenizer(["other words than the first ones had " * 50], vocab_size=280)
    other.save(str(stopped / "tokenizer.json"))
    write_shards(stopped, "heldout", seed=5, text_only=True)
    assert "comes from another tokenizer than" in refusal(1, train, own_run(stopped))
    write_shards(stopped, "train", text_only=True)
    message = refusal(1, train, own_run(stopped))
    assert "the shards come from tokenizer" in message


def test_weights_of_another_tokenizer_are_not_started_from(stopped: Path, tmp_path: Path) -> None:
    weights = checkpoints.newest(own_run(stopped))
    other = train_tokenizer(["other words than the first ones had " * 50], vocab_size=280)
    (tmp_path / "new").mkdir()
    other.save(str(tmp_path / "new" / "tokenizer.json"))
    write_shards(tmp_path / "new", text_only=True)
    config = run_of(tmp_path / "new" / "train", tmp_path / "run", f"training.start_from={weights}")
    message = refusal(1, train, config)
    assert f"training.start_from: {weights} was trained with another tokenizer" in message
    assert not (tmp_path / "run").exists()


def test_another_start_is_not_taken_for_the_run_own(stopped: Path) -> None:
    weights = checkpoints.newest(own_run(stopped))
    shutil.copytree(weights, stopped / "weights")
    message = refusal(1, train, own_run(stopped, f"training.start_from={stopped}/weights"))
    assert "training.start_from" in message
    assert "does not read it again" in message


@pytest.mark.parametrize("spelling", ["./train", "sub/../train", "merged", "link"])
def test_held_out_shards_are_known_by_content(spelling: str, stopped: Path) -> None:
    merge(stopped / "merged", [str(stopped / "heldout"), str(stopped / "train")])
    (stopped / "sub").mkdir()
    for path in stopped.glob("train.*"):
        (stopped / path.name.replace("train", "link")).symlink_to(path)
    config = own_run(stopped, f"data.validation=[{stopped}/{spelling}]", f"run_dir={stopped}/new")
    message = refusal(1, train, config)
    assert f"data.validation={stopped}/{spelling} is trained on" in message
    twice = own_run(stopped, f"data.train=[{stopped}/train, {stopped}/{spelling}]", f"run_dir={stopped}/new")
    assert "data.train holds the same shards twice" in refusal(1, train, twice)


def test_shards_that_count_twice_are_named_however_they_are_joined(stopped: Path) -> None:
    twice, held_twice = merge_of(stopped, "twice", "train", "train"), merge_of(stopped, "t", "heldout", "heldout")
    for override, message in (
        (f"data.train=[{twice}]", "data.train holds the same shards twice"),
        (f"data.validation=[{held_twice}]", "data.validation holds the same shards twice"),
        (f"data.validation=[{stopped}/heldout,{stopped}/./heldout]", "data.validation holds the same"),
        (f"data.validation=['{stopped}/heldout,{stopped}/train']", f"data.validation={stopped}/train is trained on"),
    ):
        assert message in refusal(1, train, own_run(stopped, override, f"run_dir={stopped}/new"))
    write_shards(stopped, "more", seed=6, text_only=True)
    joined = own_run(stopped, f"data.validation=['{stopped}/heldout,{stopped}/more']", f"run_dir={stopped}/new")
    assert run_ranks(1, train, joined)[0]["step"] == 5
    losses = next(record for record in read_metrics(stopped / "new") if "heldout/loss" in record)
    assert {f"heldout/loss/dataset/{stopped}/{name}" for name in ("heldout", "more")} <= losses.keys()


def merge_of(folder: Path, name: str, *parts: str) -> Path:
    """Name `parts` as one set of shards, which `merge` refuses where one of them comes twice."""
    merge(folder / name, [str(folder / part) for part in dict.fromkeys(parts)])
    merged = json.loads((folder / f"{name}.json").read_text())
    write_manifest(str(folder / name), {**merged, "parts": list(parts)})
    return folder / name


@pytest.mark.parametrize(("name", "suffix"), [("train", ".bin"), ("heldout", ".idx"), ("train", ".media.idx")])
def test_files_that_are_not_those_of_their_manifest_are_refused(name: str, suffix: str, stopped: Path) -> None:
    path = stopped / f"{name}{suffix}"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    before = everything(stopped / "run")
    message = refusal(1, train, own_run(stopped), error=DataError)
    assert str(path) in message or f"{path.with_suffix('')} is" in message
    assert everything(stopped / "run") == before


def test_a_tokenizer_that_was_swapped_beside_the_shards_is_refused(stopped: Path) -> None:
    path = stopped / "train.tokenizer"
    path.write_bytes(path.read_bytes() + b" ")
    assert f"{path} is not the tokenizer that" in refusal(1, train, own_run(stopped), error=DataError)
    path.unlink()
    (seen,) = run_ranks(1, train, own_run(stopped))
    assert "checkpoints and exports will have no tokenizer" in seen["said"]


def test_a_learning_rate_may_change_and_does_not_come_back(stopped: Path) -> None:
    lr = ("optimizer.lr=0.001", "optimizer.min_lr=1e-5", "optimizer.encoder_lr_scale=0.5", "optimizer.clip_grad=0.5")
    (seen,) = run_ranks(1, train, own_run(stopped, *lr, "optimizer.weight_decay=0.2", "schedule.decay_steps=9"))
    assert seen["step"] == 5
    records = read_metrics(stopped / "run")
    (fresh,) = run_ranks(1, learning_rates, own_run(stopped, *lr, "schedule.decay_steps=9", "run_dir=unused"))
    assert [record["lr"] for record in records if record.get("grad_norm")][3:] == pytest.approx(fresh[3:])
    (change,) = read_manifest(checkpoints.newest(own_run(stopped)))["changes"]
    assert change["step"] == 3
    assert {"optimizer.lr", "optimizer.clip_grad", "schedule.decay_steps"} <= change["settings"].keys()
    assert any("optimizer.lr: 0.003 -> 0.001" in line for record in records for line in record.get("changed", []))


def learning_rates(config: Config) -> list[float]:
    """Return what the schedule gives to each step of a run that was so from the start."""
    from megatron_mm.training.state import build_state

    state = build_state(config, meshes.cut(config))
    found = []
    for _ in range(config.training.steps):
        state.scheduler.step(1)
        found.append(next(group["lr"] for group in state.optimizer.param_groups if group["default_config"]))
    return found


def test_a_batch_size_may_change_and_nothing_is_seen_twice(stopped: Path) -> None:
    (seen,) = run_ranks(1, train, own_run(stopped, "training.global_batch_size=6"))
    assert seen["step"] == 5
    facts = read_manifest(checkpoints.newest(own_run(stopped)))
    assert facts["batch_sizes"] == [[0, 2], [3, 6]]
    again = own_run(stopped, "training.global_batch_size=6")
    consumption = checkpoints.consumption_of(again, checkpoints.newest(again))
    assert consumption.positions(3).tolist() == list(range(6, 12))


def test_every_setting_is_on_one_list_and_the_page_shows_them() -> None:
    from megatron_mm.config.resume import BY_RULE, FREELY, NEVER, verdict

    keys = [key for key, *_ in configs.describe_fields()]
    assert {verdict(key) for key in keys} == {"never", "by rule", "freely"}
    page = (Path(__file__).parents[2] / "docs" / "resume.md").read_text()
    for title, entries in (("Never", NEVER), ("By a rule", BY_RULE), ("Freely", FREELY)):
        assert entries.keys() <= {key for key in entries if any(one.startswith(key) for one in keys)}, title
        part = page.split(f"## {title}\n")[1].split("\n## ")[0]
        rows = dict(line.strip("| ").split(" | ", 1) for line in part.splitlines() if line.startswith("| `"))
        assert {key.strip("`"): text.strip() for key, text in rows.items()} == {
            key + "*" * key.endswith("."): text for key, text in entries.items()
        }


def test_a_run_goes_on_from_its_own_settings_when_the_file_it_came_from_is_gone(stopped: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(configs.to_yaml(own_run(stopped, f"run_dir={tmp_path}/run", "training.stop_after=1")))
    assert run_command(str(mine), "evaluation.interval=0").status == 0
    mine.unlink()
    ended = run_command(f"{tmp_path}/run/config.yaml", "training.stop_after=2", "evaluation.interval=0")
    assert ended.status == 0, ended.stderr
    assert checkpoints.newest(configs.load_saved(tmp_path / "run" / "config.yaml")).name == "step_00000002"


def test_a_run_of_relative_paths_goes_on_from_its_own_settings_in_another_folder(tmp_path: Path) -> None:
    write_shards(tmp_path / "home" / "d", text_only=True)
    write_shards(tmp_path / "home" / "d", "heldout", seed=5, text_only=True)
    (tmp_path / "elsewhere").mkdir()
    settings = [*SMALL, *pretrained("ls960"), "training.global_batch_size=2", "checkpoint.interval=1"]
    settings += ["data.train={d/train: 1}", "data.validation=[d/heldout]", "run_dir=runs/own"]
    begun = run_alone(command_in, tmp_path / "home", ["tiny", *settings, "training.stop_after=1"])
    assert begun.status == 0, begun.stderr
    own = tmp_path / "home" / "runs" / "own"
    ended = run_alone(command_in, tmp_path / "elsewhere", [str(own / "config.yaml"), "training.stop_after=2"])
    assert ended.status == 0, ended.stderr
    again = run_alone(command_in, tmp_path / "home", ["tiny", *settings, "training.stop_after=3"])
    assert again.status == 0, again.stderr
    assert [record["step"] for record in read_metrics(own) if "grad_norm" in record] == [1, 2, 3]
    assert not [line for record in read_metrics(own) for line in record.get("changed", []) if "d/" in line]
    assert not list((tmp_path / "elsewhere").iterdir())


def command_in(folder: Path, arguments: list[str]) -> Ended:
    os.chdir(folder)
    return _main(arguments)


@pytest.mark.parametrize("file", ["config.yaml", "checkpoints/step_00000004/config.yaml"])
def test_a_run_that_was_moved_is_not_started_anew_where_it_was(file: str, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "old")
    run_ranks(1, train, own_run(tmp_path / "old", "training.stop_after=4"))
    (tmp_path / "old" / "run").rename(tmp_path / "moved")
    ended = run_command(str(tmp_path / "moved" / file))
    assert ended.status == 2
    assert f"Give run_dir={tmp_path}/moved to go on with the run" in ended.stderr
    assert not (tmp_path / "old" / "run").exists()
    ended = run_command(str(tmp_path / "moved" / file), f"run_dir={tmp_path}/moved")
    assert ended.status == 0, ended.stderr
    assert run_command(str(tmp_path / "moved" / "config.yaml"), f"run_dir={tmp_path}/new", "--check").status == 0


# Between two runs in one folder.


def test_a_second_command_that_is_refused_touches_nothing(stopped: Path) -> None:
    before = everything(stopped / "run")
    for override in ("model.num_layers=5", "data.seed=9", f"data.train=[{stopped}/missing]", "checkpoint.resume=false"):
        with pytest.raises(AssertionError):
            run_ranks(1, train, own_run(stopped, override))
        assert everything(stopped / "run") == before, override


def heartbeat(run_dir: Path, **other: Any) -> Path:
    path = run_dir / "health" / "rank_0.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"rank": 0, "host": socket.gethostname(), "pid": os.getpid(), "step": 7, "phase": "step"}
    record |= {"process_started": processes.began(os.getpid()), "beat": 7, "job": None, **other}
    path.write_text(json.dumps(record))
    return path


def test_a_run_that_lives_is_left_alone(stopped: Path) -> None:
    heartbeat(stopped / "run")
    before = everything(stopped / "run")
    message = refusal(1, train, own_run(stopped))
    assert f"is being written by another run: rank 0 on {socket.gethostname()}, process {os.getpid()}" in message
    assert everything(stopped / "run") == before


def test_a_heartbeat_of_another_host_is_watched_until_it_moves(stopped: Path) -> None:
    beating = 'while :; do sed -i "s/\\"beat\\": [0-9]*/\\"beat\\": $((++beat))/" {0}; sleep 0.3; done'
    path = heartbeat(stopped / "run", host="elsewhere")
    process = subprocess.Popen(["bash", "-c", beating.format(path)])
    try:
        assert "rank 0 on elsewhere" in refusal(1, train, own_run(stopped))
    finally:
        process.kill()
        process.wait()
    heartbeat(stopped / "run", host="elsewhere")  # of a node that died
    assert run_ranks(1, train, own_run(stopped))[0]["step"] == 5


def test_a_run_that_beats_seldom_is_left_alone(stopped: Path) -> None:
    heartbeat(stopped / "run", period=200.0)
    assert f"process {os.getpid()}, is at step 7" in refusal(1, train, own_run(stopped))


def test_a_run_of_the_same_slurm_job_is_left_alone_while_its_process_lives(stopped: Path) -> None:
    """Two commands in one allocation are of one job."""
    heartbeat(stopped / "run", job="77")
    assert "is being written by another run" in refusal(1, train_in_job, own_run(stopped), "77")
    heartbeat(stopped / "run", job="77", pid=2**22 - 3)
    assert run_ranks(1, train_in_job, own_run(stopped), "77")[0]["step"] == 5


def train_in_job(config: Config, job: str) -> dict[str, Any]:
    os.environ["SLURM_JOB_ID"] = job
    return train(config)


def test_a_process_that_is_gone_keeps_nobody_out(stopped: Path) -> None:
    heartbeat(stopped / "run", pid=2**22 - 3)
    heartbeat(stopped / "run", process_started=1.0)  # another process has its number
    assert run_ranks(1, train, own_run(stopped))[0]["step"] == 5
    assert not list((stopped / "run" / "health").glob("rank_*"))


def test_leftovers_of_an_earlier_run_do_not_act_on_a_new_one(stopped: Path) -> None:
    run_dir = stopped / "run"
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "left_out.json").write_text(json.dumps({"run": "old", "left_out": [[0, 4, 0]]}))
    (run_dir / "DONE").write_text("5\n")
    (run_dir / "health").mkdir(exist_ok=True)
    heartbeat(run_dir, rank=6, pid=2**22 - 3)
    (seen,) = run_ranks(1, train, own_run(stopped, "training.stop_after=2"))
    assert seen["left_out"] == ()
    assert "run_dir holds DONE of another run" in seen["said"]
    assert [record["step"] for record in read_metrics(run_dir) if "grad_norm" in record] == [1, 2]
    assert len(list(run_dir.glob("former-*/metrics.jsonl"))) == 1
    assert not (run_dir / "left_out.json").exists()


def test_weights_of_steps_that_were_left_out_stay_as_they_were(stopped: Path) -> None:
    """Steps 4 and 5 were done, and left out by a roll-back to step 3: what they drew is counted with their weights."""
    newest = checkpoints.newest(own_run(stopped))
    left_out = {"run": read_manifest(newest)["run"], "left_out": [[6, 2, 3], [8, 2, 4]]}
    (stopped / "run" / "left_out.json").write_text(json.dumps(left_out))
    longer = ("training.steps=9", "training.stop_after=6")
    early, late = (f"data.changes=[{{from_step: {step}, train: {{{stopped}/train: 2}}}}]" for step in (4, 5))
    assert "only changes from step 5 on can differ" in refusal(1, train, own_run(stopped, *longer, early))
    (seen,) = run_ranks(1, train, own_run(stopped, *longer, late))
    assert seen["step"] == 6


def test_metrics_of_another_run_are_not_gone_on_with(stopped: Path) -> None:
    own = [{**one, "run": "another"} if "layout" in one else one for one in read_metrics(stopped / "run")]
    (stopped / "run" / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in own))
    (seen,) = run_ranks(1, train, own_run(stopped))
    assert "run_dir holds metrics.jsonl of another run" in seen["said"]
    assert [one["step"] for one in read_metrics(stopped / "run") if "grad_norm" in one] == [4, 5]


def test_what_another_run_left_out_is_not_heeded_by_the_one_that_goes_on(stopped: Path) -> None:
    (stopped / "run" / "left_out.json").write_text(json.dumps({"run": "another", "left_out": [[0, 2, 0]]}))
    (seen,) = run_ranks(1, train, own_run(stopped))
    assert seen["left_out"] == ()
    assert "is of another run than the checkpoint" in seen["said"]


@pytest.mark.parametrize("line", [b"\xff\xfe", b"[]", b"{}", b"3", b'{"step": null}'])
def test_a_damaged_line_of_the_metrics_ends_no_run(line: bytes, stopped: Path) -> None:
    path = stopped / "run" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:], b""]))
    (seen,) = run_ranks(1, train, own_run(stopped))
    assert seen["step"] == 5
    assert "line 3 of metrics.jsonl holds no record" in seen["said"]
    assert [record["step"] for record in read_metrics(stopped / "run") if "grad_norm" in record] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("content", ["", "{", '{"run": "r"}', '{"run": "", "left_out": [[1]]}', "[]"])
def test_a_damaged_list_of_what_was_left_out_is_replaced_by_the_checkpoints(content: str, stopped: Path) -> None:
    (stopped / "run" / "left_out.json").write_text(content)
    (seen,) = run_ranks(1, train, own_run(stopped))
    assert (seen["step"], seen["left_out"]) == (5, ())
    assert "left_out.json, which says what the run has left out, is damaged" in seen["said"]
    assert "as its checkpoint says, which may be less, the run leaves out nothing" in seen["said"]
    assert (stopped / "run" / "left_out.json.damaged").read_text() == content
    assert not (stopped / "run" / "left_out.json").exists()


def test_a_checkpoint_that_counts_batches_is_refused_before_anything_is_touched(stopped: Path) -> None:
    path = checkpoints.newest(own_run(stopped))
    facts = {**json.loads((path / "manifest.json").read_text()), "skipped_batches": 2}
    (path / "manifest.json").write_text(json.dumps(facts))
    (path / "COMMITTED").write_text(hash_file(path / "manifest.json"))
    before = everything(stopped / "run")
    assert "counts what it left out in batches" in refusal(1, train, own_run(stopped), error=DataError)
    assert everything(stopped / "run") == before


def test_a_checkpoint_that_was_copied_in_part_does_not_keep_its_step_from_being_saved(stopped: Path) -> None:
    folder = stopped / "run" / "checkpoints"
    shutil.copytree(folder / "step_00000003", folder / "step_00000004")
    (folder / "step_00000004" / "COMMITTED").unlink()
    (seen,) = run_ranks(1, train, own_run(stopped, "training.stop_after=4"))
    assert "step_00000004 is damaged" in seen["said"]
    assert checkpoints.newest(own_run(stopped)).name == "step_00000004"
    assert (folder / "step_00000004.damaged").exists()


def test_a_run_of_nothing_but_parts_of_checkpoints_is_not_started_anew(stopped: Path) -> None:
    for path in (stopped / "run" / "checkpoints").glob("step_*"):
        (path / "COMMITTED").unlink()
    before = everything(stopped / "run")
    assert "has no COMMITTED" in refusal(1, train, own_run(stopped), error=DataError)
    assert everything(stopped / "run") == before


# At the end.


def spoil_last(state: TrainState, result: StepResult) -> StepResult | None:
    """Let the batch that is first seen at step 5 have no finite gradient."""
    if state.consumption.positions(state.step - 1)[0] == 8:
        return StepResult(result.losses, float("inf"), result.lr, False)
    return None


def spoil_every_last(state: TrainState, result: StepResult) -> StepResult | None:
    """Let whatever batch step 5 sees have no finite gradient."""
    if state.step == 5:
        return StepResult(result.losses, float("inf"), result.lr, False)
    return None


def test_a_last_step_that_is_not_finite_is_done_again_with_other_samples(shards: Path, tmp_path: Path) -> None:
    config = run_of(shards, tmp_path, "checkpoint.interval=4")
    (seen,) = run_ranks(1, train, config, spoil_last)
    assert seen["left_out"] == (LeftOut(8, 2, 4),)
    assert checkpoints.newest(config).name == "step_00000005"
    assert (tmp_path / "DONE").read_text() == "5\n"


def test_a_run_whose_last_step_stays_bad_is_not_done(shards: Path, tmp_path: Path) -> None:
    config = run_of(shards, tmp_path, "checkpoint.interval=4")
    with pytest.raises(AssertionError, match="steps 5 to 5, the last of the run, had no finite gradient, after 3 roll"):
        run_ranks(1, train, config, spoil_every_last)
    assert not (tmp_path / "DONE").exists()
    assert checkpoints.newest(config).name == "step_00000004"


def test_a_run_that_saves_nothing_is_not_marked_as_done(shards: Path, tmp_path: Path) -> None:
    (seen,) = run_ranks(1, train, run_of(shards, tmp_path, "checkpoint.interval=0"))
    assert "the weights after step 5, the last, are not saved" in seen["said"]
    assert not (tmp_path / "DONE").exists()


def spoil_and_stop(state: TrainState, result: StepResult) -> StepResult | None:
    """Ask the run to end after step 3, whose gradient is not finite."""
    if state.step == 3:
        os.kill(os.getpid(), signal.SIGUSR1)
        return StepResult(result.losses, float("inf"), result.lr, False)
    return None


def test_a_run_that_is_asked_to_stop_at_a_bad_step_goes_on_to_a_good_one(shards: Path, tmp_path: Path) -> None:
    config = run_of(shards, tmp_path, "checkpoint.interval=100")
    (seen,) = run_ranks(1, train, config, spoil_and_stop)
    assert seen["step"] == 4
    assert checkpoints.newest(config).name == "step_00000004"
    nothing = run_of(shards, tmp_path / "nothing", "checkpoint.interval=0")
    assert run_ranks(1, train, nothing, spoil_and_stop)[0]["step"] == 3


# Without starting.


def test_a_check_says_what_fits_and_writes_nothing(stopped: Path) -> None:
    before = everything(stopped)
    settings = [*SMALL, *pretrained("ls960"), f"data.train=[{stopped}/train]", f"data.validation=[{stopped}/heldout]"]
    ended = run_command(
        "tiny", "--check", *settings, f"run_dir={stopped}/new", "--world-size", "4", "checkpoint.interval=1"
    )
    assert ended.status == 0, ended.stderr
    for part in (
        "4 ranks",
        "parameters",
        "samples of 256 tokens",
        "a new run",
        "MB each",
        "first batch step 1",
        f"epochs      {stopped}/train: read",
        "fits",
    ):
        assert part in ended.stdout, ended.stdout
    assert everything(stopped) == before
    ended = run_command("tiny", "--check", *settings, f"run_dir={stopped}/new", f"data.validation=[{stopped}/train]")
    assert ended.status == 2
    assert "is trained on" in ended.stderr


def evaluated(config: Config, path: Path) -> dict[str, float]:
    return evaluate_checkpoint(config, meshes.cut(config), path)


def test_a_checkpoint_is_evaluated_alone_as_its_run_was(stopped: Path) -> None:
    (then,) = [one for one in read_metrics(stopped / "run") if one["step"] == 3 and "heldout/loss" in one]
    config = own_run(stopped)
    path, before = checkpoints.newest(config), everything(stopped / "run")
    for ranks, text in ((1, ""), (2, "tp=2")):
        for found in run_ranks(ranks, evaluated, own_run(stopped, *layout(text)), path):
            assert found["loss"] == pytest.approx(then["heldout/loss"], rel=1e-5)
            assert found["loss/text"] == pytest.approx(then["heldout/loss/text"], rel=1e-5)
            assert f"loss/dataset/{stopped}/heldout" in found
    data = (f"data.train=[{stopped}/train]", f"data.validation=[{stopped}/heldout]")
    ended = run_command(f"{stopped}/run/config.yaml", "--evaluate", str(path), *data)
    assert ended.status == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1])["loss"] == pytest.approx(then["heldout/loss"], rel=1e-5)
    assert everything(stopped / "run") == before


def test_what_cannot_be_evaluated_is_named(stopped: Path) -> None:
    path = checkpoints.newest(own_run(stopped))
    assert "data.validation is empty" in refusal(1, evaluated, own_run(stopped, "data.validation=[]"), path)
    assert "is no checkpoint" in refusal(1, evaluated, own_run(stopped), stopped)
    assert "model.num_layers" in refusal(
        1, evaluated, own_run(stopped, "model.num_layers=5", "parallel.embedding_slot=false"), path
    )
    other = train_tokenizer(["other words than the first ones had " * 50], vocab_size=280)
    other.save(str(stopped / "tokenizer.json"))
    write_shards(stopped, "heldout", seed=5, text_only=True)
    assert "was trained with another tokenizer" in refusal(1, evaluated, own_run(stopped), path)


def test_a_check_of_a_run_that_goes_on_compares_it_with_its_checkpoint(stopped: Path) -> None:
    settings = str(stopped / "run" / "config.yaml")
    own = (f"run_dir={stopped}/run", f"data.train=[{stopped}/train]", f"data.validation=[{stopped}/heldout]")
    ended = run_command(settings, "--check", *own)
    assert "nothing is left to do: step 3 of 3 is saved" in ended.stdout, ended.stderr
    own = (*own, "training.stop_after=null")
    ended = run_command(settings, "--check", *own)
    assert ended.status == 0, ended.stderr
    assert "goes on from" in ended.stdout
    assert "first batch step 4" in ended.stdout
    ended = run_command(settings, "--check", *own, "data.seed=5")
    assert (ended.status, "data.seed" in ended.stderr) == (2, True)
