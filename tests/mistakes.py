"""Making mistakes: a folder with data and a run, a command as a person types it, and what it answers.

mistakes.yaml holds the mistakes and their answers. Each command runs in a copy of the same folder, in a fork of one
process that has imported everything, so that a hundred of them take a minute.
"""

import builtins
import errno
import gc
import io
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import small
import yaml
from launch import Ended

ROOT = Path(__file__).parents[1]
FIXTURE = Path(__file__).with_name("mistakes.yaml")
SECONDS = 30
"""What one command may take."""
LINKED_BYTES = 1 << 15
START = re.compile(r"^(\[rank \d+\] )?(error: |stopped by Ctrl-C|[A-Z]\w+: )", re.MULTILINE)
"""How an answer begins; what a command logs before it is none of it."""


@dataclass(frozen=True)
class Mistake:
    """A command that cannot be done, and how it ends."""

    mistake: str
    command: str
    given: tuple[str, ...] = ()
    """Names of PREPARATIONS."""
    status: int = -1
    answer: str = ""


def read() -> dict[str, list[Mistake]]:
    """Return the mistakes of mistakes.yaml by their kind."""
    kinds = yaml.safe_load(FIXTURE.read_text())
    return {
        kind: [Mistake(**{**one, "given": tuple(one.get("given", ()))}) for one in mistakes]
        for kind, mistakes in kinds.items()
    }


def build(folder: Path) -> None:
    """Make the folder that commands run in: settings, files, shards, a run with two checkpoints, and its export."""
    folder.mkdir()
    child = os.fork()
    if child == 0:  # tokenizers start threads, which the forks of this process must not lack
        _make_files(folder)
        os._exit(0)
    assert _wait(child) == 0, "the folder could not be made"
    for command in (
        "python -m megatron_mm.train small.yaml run_dir=runs/mine",
        "python tools/convert_checkpoint.py to-hf runs/mine/checkpoints/step_00000004 export",
    ):
        done = run(Mistake("none", command), folder, copy=False)
        assert done.status == 0, done.stderr


def _make_files(folder: Path) -> None:
    os.chdir(folder)
    small.write_shards(folder / "shards")
    small.write_shards(folder / "shards", "heldout", seed=1)
    shutil.copy("shards/tokenizer.json", "tokenizer.json")
    _write_settings()
    rng = np.random.default_rng(0)
    for name in ("texts", "other", "empty"):
        Path(name).mkdir()
    Path("texts/a.txt").write_text("A tall house by the lake.\n" * 40)
    Path("photo.png").write_bytes(small.png(rng))
    Path("prompts.jsonl").write_text('{"text": "the lake"}\n{"text": \n')
    _write_other_tokenizer()


def _write_settings() -> None:
    """Write small.yaml: the small model over the shards, with random encoders that learn, saved at every other step."""
    settings: dict[str, Any] = {"extends": "tiny", "run_dir": "runs/new"}
    own = (
        *("data.train=[shards/train]", "data.validation=[shards/heldout]", "training.steps=4", "checkpoint.interval=2"),
        *("image.pretrained=random", "audio.pretrained=random", "image.trainable=true", "audio.trainable=true"),
        *("evaluation.interval=0", "schedule.warmup_steps=1"),
    )
    for key, _, text in (override.partition("=") for override in (*small.SMALL, *own)):
        section, name = key.split(".")
        value = yaml.safe_load(text)
        settings.setdefault(section, {})[name] = float(value) if name == "epsilon" else value
    Path("small.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def _write_other_tokenizer() -> None:
    """Write other/train, shards of a tokenizer that has seen other words."""
    from megatron_mm.tokenizer import train_tokenizer

    rng = np.random.default_rng(9)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz "))
    train_tokenizer(["".join(rng.choice(letters, 4_000))], vocab_size=small.VOCAB_SIZE).save("other/tokenizer.json")
    small.write_shards(Path("other").absolute(), seed=2)


def load_everything() -> None:
    """Import what any command imports, so that a fork of this process need not."""
    import torch
    import transformers  # noqa: F401

    import megatron_mm.hf.gate
    import megatron_mm.train
    import megatron_mm.training.check
    import megatron_mm.training.loop  # noqa: F401

    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    for tool in sorted((ROOT / "tools").glob("*.py")):
        runpy.run_path(str(tool), run_name="loaded")
    gc.freeze()  # or a fork copies what the collector only looks at


def run(mistake: Mistake, folder: Path, *, copy: bool = True) -> Ended:
    """Run a command in a copy of `folder`, after its preparations, and return how it ended."""
    own = folder.with_name("here") if copy else folder
    if copy:
        shutil.copytree(folder, own, copy_function=_copy)
    out, err = (folder.with_name(name) for name in ("stdout", "stderr"))
    child = os.fork()
    if child == 0:
        _become(mistake, own, out, err)
    status = _wait(child)
    stderr = "\n".join(line.split("\r")[-1] for line in err.read_text(errors="replace").splitlines())
    ended = Ended(status, out.read_text(errors="replace") if out.exists() else "", _named(stderr, own))
    if copy:
        shutil.rmtree(own)
    out.unlink(missing_ok=True)
    return ended


def _copy(source: str, target: str) -> None:
    """Copy a small file, which a command may write to, and link a large one, which none does."""
    (os.link if os.path.getsize(source) > LINKED_BYTES else shutil.copyfile)(source, target)


def _wait(child: int) -> int:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


def _become(mistake: Mistake, folder: Path, out: Path, err: Path) -> None:
    """Turn this fork into the command, and end as it does."""
    status = 99
    try:
        os.chdir(folder)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        typed, _, target = mistake.command.partition(" > ")
        typed, _, reader = typed.partition(" | ")
        os.dup2(_unread() if reader else os.open(target or out, os.O_WRONLY | os.O_CREAT), 1)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name in mistake.given:
            PREPARATIONS[name]()
        words = shlex.split(typed)
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            os.environ[name] = value
        status = _execute(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                status = 120  # as the interpreter ends when its last words are lost
        os._exit(status)


def _execute(words: list[str]) -> int:
    if words[0] != "python":
        return subprocess.run([str(ROOT / words[0]), *words[1:]]).returncode
    if words[1] == "-m":
        sys.argv = ["-m", *words[3:]]
        sys.modules.pop(words[2], None)
        runpy.run_module(words[2], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words[1:]
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    return 0


def _unread() -> int:
    """Return a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


def _named(text: str, folder: Path) -> str:
    """Return an answer with names for what differs between machines and runs."""
    text = text.replace(f"{folder}/", "").replace(str(folder), "HERE").replace(str(ROOT), "REPO")
    text = text.replace(socket.gethostname(), "HOST").replace(str(Path.home()), "HOME")
    text = re.sub(r"\b[0-9a-f]{12}\b", "HASH", text)
    text = re.sub(r"(holds|and) [\d,.]+ GiB", r"\1 N GiB", text)
    text = text.replace(f"{folder.with_name('folder')}/", "")
    text = re.sub(r"(has|says) \d+", r"\1 N", text)
    text = re.sub(r"line \d+ column \d+ \(char \d+\)", "line N, column N", text)
    text = re.sub(r"process \d+", "process PID", text)
    text = re.sub(r"(megatron-mm|torch|megatron-core) \d[\w.+]*", r"\1 VERSION", text)
    text = re.sub(r"[\d,.]+ ([GM]B) free", r"N \1 free", text)
    return re.sub(r"MASTER_PORT=\d{4,5} is in use", "MASTER_PORT=PORT is in use", text)


def answer_of(ended: Ended) -> str:
    """Return what a command answered, without what it logged before."""
    found = START.search(ended.stderr)
    return (ended.stderr[found.start() :] if found else ended.stderr).strip()


def _raise_in(place: str, error: Callable[[], BaseException], *, call: int = 1) -> None:
    """Let the `call`-th call of a function, 'module:name', raise."""
    import importlib

    module_name, _, name = place.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, leaf = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, leaf), iter(range(1, 1_000))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise error()
        return original(*args, **kwargs)

    setattr(owner, leaf, function)


def _cuda_memory() -> BaseException:
    """Return what torch raises when the memory of a GPU is full, as long as it is."""
    import torch

    return torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.15 GiB of which 3.00 MiB is "
        "free. Including non-PyTorch memory, this process has 79.10 GiB memory in use. Of the allocated memory 70.00 "
        "GiB is allocated by PyTorch, and 8.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated "
        "memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See "
        "documentation for Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html)"
    )


def _ctrl_c() -> BaseException:
    for _ in range(2):  # in a step the first one only asks
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.7)
    return AssertionError("Ctrl-C was not seen")


def _full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _edit(path: str, before: str, after: str) -> None:
    text = Path(path).read_text()
    assert before in text
    Path(path).write_text(text.replace(before, after, 1))


def _flip(path: str) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 1
    os.remove(path)  # it may be a link
    Path(path).write_bytes(data)


def _cut(path: str, *, keep: int | None = None) -> None:
    """Cut a file off after `keep` bytes, or half of it: what is said of JSON depends on where that is."""
    data = Path(path).read_bytes()
    os.remove(path)
    Path(path).write_bytes(data[: len(data) // 2 if keep is None else keep])


def _take_port() -> None:
    """Listen on a port, and give it out as that of rank 0."""
    global _listening
    _listening = socket.create_server(("127.0.0.1", 0))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_listening.getsockname()[1])}


def _refuse(path: str) -> None:
    """Let the system refuse a file, as it does for one without permissions: tests may run as root, whom none stops."""
    for owner, name in ((builtins, "open"), (io, "open"), (os, "open")):
        original = getattr(owner, name)

        def function(file: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            if str(file).endswith(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            return _original(file, *args, **kwargs)

        setattr(owner, name, function)


CHECKPOINT = "runs/mine/checkpoints/step_00000004"
PREPARATIONS: dict[str, Callable[[], object]] = {
    "a.yaml extends b.yaml, which extends a.yaml": lambda: (
        Path("a.yaml").write_text("extends: b.yaml\n"),
        Path("b.yaml").write_text("extends: a.yaml\n"),
    ),
    "own.yaml extends itself": lambda: Path("own.yaml").write_text("extends: own.yaml\n"),
    "own.yaml extends two presets": lambda: Path("own.yaml").write_text("extends: [tiny, mm_1b]\n"),
    "own.yaml extends a preset that is not there": lambda: Path("own.yaml").write_text("extends: big\n"),
    "own.yaml with a bracket that is not closed": lambda: Path("own.yaml").write_text("data: {train: [a, b}\n"),
    "own.yaml with a tab": lambda: Path("own.yaml").write_text("extends: tiny\ntraining:\n\tsteps: 3\n"),
    "own.yaml of bytes that are no text": lambda: Path("own.yaml").write_bytes(b"\xff\xfe\x00data"),
    "own.yaml is empty": lambda: Path("own.yaml").write_text(""),
    "own.yaml holds a list": lambda: Path("own.yaml").write_text("- tiny\n- data\n"),
    "own.yaml holds a number where a section belongs": lambda: Path("own.yaml").write_text("extends: tiny\ndata: 3\n"),
    "own.yaml has a misspelt section": lambda: Path("own.yaml").write_text("extends: tiny\ntrainning: {steps: 3}\n"),
    "own.yaml names a key that is a number": lambda: Path("own.yaml").write_text("extends: tiny\n5: 3\n"),
    "own.yaml says a key twice": lambda: Path("own.yaml").write_text(
        "extends: tiny\ntraining: {steps: 3}\ndata:\n  seq_len: 8\n  seq_len: 9\n"
    ),
    "own.yaml may not be read": lambda: (Path("own.yaml").write_text("extends: tiny\n"), _refuse("own.yaml")),
    "half of shards/train.bin": lambda: _cut("shards/train.bin"),
    "shards/train.idx is empty": lambda: Path("shards/train.idx").write_bytes(b""),
    "shards/train.bin is gone": lambda: os.remove("shards/train.bin"),
    "shards/train.json is cut off": lambda: _cut("shards/train.json", keep=9),
    "shards/train.json is a folder": lambda: (os.remove("shards/train.json"), os.mkdir("shards/train.json")),
    "shards/train.json lacks its counts": lambda: Path("shards/train.json").write_text("{}\n"),
    "shards/train.json says its version alone": lambda: Path("shards/train.json").write_text('{"version": 1}'),
    "shards/train.json holds a list": lambda: Path("shards/train.json").write_text("[]\n"),
    "a flipped bit in shards/train.bin": lambda: _flip("shards/train.bin"),
    "shards/train.bin may not be read": lambda: _refuse("shards/train.bin"),
    "twin is a copy of shards": lambda: shutil.copytree("shards", "twin"),
    "runs/file is a file": lambda: Path("runs/file").write_text("x"),
    "runs/mine without its config.yaml": lambda: os.remove(f"{CHECKPOINT}/config.yaml"),
    "both checkpoints are damaged": lambda: [
        _cut(f"runs/mine/checkpoints/step_0000000{step}/config.yaml") for step in (2, 4)
    ],
    "a checkpoint whose weights have a flipped bit": lambda: _flip(f"{CHECKPOINT}/__0_0.distcp"),
    "a checkpoint without its .metadata": lambda: os.remove(f"{CHECKPOINT}/.metadata"),
    "a checkpoint whose manifest is cut off": lambda: _cut(f"{CHECKPOINT}/manifest.json", keep=9),
    "a checkpoint without COMMITTED": lambda: os.remove(f"{CHECKPOINT}/COMMITTED"),
    "a checkpoint without tokenizer.json": lambda: os.remove(f"{CHECKPOINT}/tokenizer.json"),
    "shards made anew": lambda: small.write_shards(Path("shards").absolute(), seed=5),
    "another run is at work in runs/mine": lambda: _work_in("runs/mine"),
    "a run that is half done": lambda: shutil.rmtree(CHECKPOINT),
    "metrics.jsonl with a broken line": lambda: _edit("runs/mine/metrics.jsonl", '{"step": 2', '{"st": 2'),
    "metrics.jsonl of numbers": lambda: Path("runs/mine/metrics.jsonl").write_text("1\n2\n"),
    "metrics.jsonl of another program": lambda: Path("runs/mine/metrics.jsonl").write_text('{"epoch": 1}\n'),
    "metrics.jsonl of bytes that are no text": lambda: Path("runs/mine/metrics.jsonl").write_bytes(b"\xff\xfe\x00"),
    "metrics.jsonl is empty": lambda: Path("runs/mine/metrics.jsonl").write_text(""),
    "metrics.jsonl is a folder": lambda: (os.remove("runs/mine/metrics.jsonl"), os.mkdir("runs/mine/metrics.jsonl")),
    "tokenizer.json is a poem": lambda: Path("tokenizer.json").write_text("Roses are red\n"),
    "tokenizer.json is cut off": lambda: _cut("tokenizer.json"),
    "tokenizer.json is a folder": lambda: (os.remove("tokenizer.json"), os.mkdir("tokenizer.json")),
    "tokenizer.json may not be read": lambda: _refuse("tokenizer.json"),
    "prompts.jsonl is empty": lambda: Path("prompts.jsonl").write_text(""),
    "broken.png is no image": lambda: Path("broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)),
    "texts/b.pdf is no PDF": lambda: Path("texts/b.pdf").write_bytes(b"%PDF-1.7\n" + bytes(200)),
    "vit.safetensors is no file of weights": lambda: Path("vit.safetensors").write_bytes(b"weights" * 9),
    "vit.safetensors holds other tensors": lambda: _write_weights("vit.safetensors"),
    "export/text lacks a file": lambda: next(Path("export/text").glob("*.safetensors")).unlink(),
    "a flipped bit in export/text": lambda: _flip(str(next(Path("export/text").glob("*.safetensors")))),
    "export/text/config.json is cut off": lambda: _cut("export/text/config.json"),
    "MASTER_PORT is that of another program": _take_port,
    "a GPU's memory is full while building": lambda: _raise_in("megatron_mm.training.loop:build_state", _cuda_memory),
    "a GPU's memory is full in step 2": lambda: _raise_in("megatron_mm.training.loop:train_step", _cuda_memory, call=2),
    "the memory is full in an evaluation": lambda: _raise_in("megatron_mm.training.loop:evaluate", MemoryError),
    "the memory is full while reading": lambda: _raise_in("megatron_mm.data.loader:Loader.step", MemoryError),
    "the disk is full": lambda: _raise_in("megatron_mm.checkpoint.format:replacing", _full),
    "the disk is full at the settings": lambda: _raise_in("megatron_mm.config:save", _full),
    "the disk is full at every save": lambda: [
        _raise_in("megatron_mm.checkpoint.save:_make_folder", _full) for _ in range(3)
    ],
    "Ctrl-C while libraries load": lambda: _raise_in("megatron_mm.config:load", _ctrl_c),
    "Ctrl-C while the model is built": lambda: _raise_in("megatron_mm.training.loop:build_state", _ctrl_c),
    "Ctrl-C in step 1": lambda: _raise_in("megatron_mm.training.loop:train_step", _ctrl_c),
    "Ctrl-C in step 4": lambda: _raise_in("megatron_mm.training.loop:train_step", _ctrl_c, call=4),
    "Ctrl-C in preprocessing": lambda: _raise_in("megatron_mm.ingest.pipeline:_take_in", _ctrl_c),
    "Ctrl-C in an export": lambda: _raise_in("megatron_mm.hf.export:write_shard", _ctrl_c, call=2),
    "Ctrl-C while generating": lambda: _raise_in("megatron_mm.hf.generate:load_export", _ctrl_c),
    "the disk is full in an export": lambda: _raise_in("megatron_mm.hf.export:write_shard", _full),
    "the disk is full at the shards": lambda: _raise_in("megatron_mm.shards.writer:ShardWriter.add_batch", _full),
    "a defect": lambda: _raise_in("megatron_mm.training.loop:train_step", lambda: KeyError("weights")),
}
"""What was done before the command, by its name in mistakes.yaml."""


def _write_weights(path: str) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(2, 2)}, path)


def _work_in(run_dir: str) -> None:
    """Leave the heartbeat of another process of this host, which lives: the one that started this one."""
    import json

    from megatron_mm.training import processes

    parent = os.getppid()
    folder = Path(run_dir, "health")
    folder.mkdir(exist_ok=True)
    beat = {"rank": 0, "host": socket.gethostname(), "pid": parent, "process_started": processes.began(parent)}
    beat |= {"step": 3, "phase": "step", "beat": 7, "job": None}
    (folder / "rank_0.json").write_text(json.dumps(beat))
