"""How commands end when they are interrupted, and what an exception stands for; tests/mistakes.yaml has the rest."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launch import run_alone, run_ranks
from small import small_config

from megatron_mm import config as configs
from megatron_mm import endings
from megatron_mm.errors import ConfigError, DataError, RunStopped, TakenOver

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 120.0


def start(*words: str, stderr: Path, **environment: str) -> subprocess.Popen:
    """Start a command as a terminal does, in a process group of its own that Ctrl-C goes to.

    Tests that are run in the background ignore Ctrl-C, and what they start would too.
    """
    own = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    with stderr.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *words],
            env=own,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_saves_and_ends_all_ranks_and_twice_ends_them_at_once(times: int, shards: Path, tmp_path: Path) -> None:
    from megatron_mm.checkpoint.format import step_of, whole_ones
    from megatron_mm.checkpoint.verify import find_damage

    settings = tmp_path / "settings.yaml"
    large = f"training.global_batch_size={4 if times == 1 else 128}"  # a step of some seconds: it is not waited for
    config = small_config(
        shards, tmp_path / "run", "training.steps=500", "checkpoint.interval=400", "data.prefetch_steps=1", large
    )
    settings.write_text(configs.to_yaml(config))
    # Below what the system gives to sockets that ask for any port: another test could be given one that was free.
    port = 20_000 + os.getpid() % 10_000
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [tmp_path / f"rank_{rank}" for rank in range(2)]
    ranks = [
        start("-m", "megatron_mm.train", str(settings), stderr=log, RANK=str(rank), LOCAL_RANK=str(rank), **place)
        for rank, log in enumerate(logs)
    ]
    metrics = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"grad_norm"' in metrics.read_text(), ranks[0])
    for press in range(times):
        time.sleep(press * 2 * endings.AGAIN_SECONDS)
        for _ in range(2):  # torchrun sends it again, at once, to ranks that the terminal has sent it to
            for process in ranks:
                os.killpg(process.pid, signal.SIGINT)
    assert [process.wait(WAIT_SECONDS) for process in ranks] == [130, 130]
    saved = whole_ones(tmp_path / "run/checkpoints")
    assert len(saved) == (times == 1)
    assert not [line for path in saved for line in find_damage(path)]
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"grad_norm"' in line]
    assert [step_of(path) for path in saved] == steps[-1:] * len(saved)
    for rank, log in enumerate(logs):
        lines = log.read_text().splitlines()
        assert "Traceback" not in log.read_text()
        assert lines[-1].startswith("stopped by Ctrl-C: " if rank == 0 else "[rank 1] stopped by Ctrl-C: ")
        left = "is saved, and the same command goes on from it." if saved else "so the same command starts anew."
        assert lines[-1].endswith(left)
    wait_for_nobody(ranks)


def wait_for_nobody(processes: list[subprocess.Popen]) -> None:
    """Pass when no process of these sessions is left: what they started has ended too."""
    deadline = time.monotonic() + WAIT_SECONDS
    sessions = {process.pid for process in processes}
    while any(session_of(process.pid) in sessions for process in psutil.process_iter()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def test_ctrl_c_in_preprocessing_is_one_line_from_all_workers(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "' + "a tall house by the lake " * 400 + '"}\n' * 1)
    lines.write_text(lines.read_text() * 4_000)
    tokenizer = ROOT / "examples/sample_data/tokenizer.json"
    command = ["tools/preprocess_data.py", "--input", str(lines), "--output-prefix", str(tmp_path / "new")]
    log = tmp_path / "stderr"
    slow = ["--tokenizer", str(tokenizer), "--tokenizer-engine", "reference", "--workers", "2"]
    process = start(str(ROOT / command[0]), *command[1:], *slow, stderr=log)
    wait_until(lambda: "preprocess:" in log.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(WAIT_SECONDS) == 130
    wait_for_nobody([process])
    said = log.read_text()
    assert "Traceback" not in said
    assert said.replace("\r", "\n").splitlines()[-1] == (
        "stopped by Ctrl-C: what is done is kept, and the same command goes on behind it."
    )


@pytest.mark.parametrize("command", ["tools/generate.py", "-m"])
def test_ctrl_c_while_libraries_load_is_one_line(command: str, tmp_path: Path) -> None:
    log = tmp_path / "stderr"
    words = ["-m", "megatron_mm.train", "tiny"] if command == "-m" else [str(ROOT / command), "export", "--text", "the"]
    process = start(*words, stderr=log)
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    assert process.wait(WAIT_SECONDS) in (130, -signal.SIGINT)  # a shell says 130 of both
    assert "Traceback" not in log.read_text()
    assert log.read_text().startswith("stopped by Ctrl-C")


def test_nobody_reads_a_report(tmp_path: Path) -> None:
    settings = tmp_path / "run" / "metrics.jsonl"
    settings.parent.mkdir()
    settings.write_text('{"step": 0, "layout": "DP1", "parameters": 1}\n')
    tool = f"{sys.executable} {ROOT}/tools/report_run.py {settings.parent} | head -n 0; exit ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", tool], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (ended.returncode, ended.stderr) == (141, "")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("a=1"), 2, "error: a=1"),
        (DataError("a.bin is cut short"), 3, "error: a.bin is cut short"),
        (TakenOver("by job 7"), 4, "TakenOver: by job 7"),
        (RunStopped("enough"), 75, "RunStopped: enough"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/a"), 2, "error: /data/a: Permission denied."),
        (OSError(errno.ENOSPC, "No space left on device"), 75, "StorageFailed: writing failed: No space left"),
        (OSError(errno.ESTALE, "Stale file handle", "/data/a"), 75, "StorageFailed: /data/a: Stale file handle."),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (MemoryError("Unable to allocate 3.00 TiB for an array"), 2, "error: out of memory: it asked for 3.00 TiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1073741824 bytes."), 75,
         "error: out of memory: it asked for 1.00 GiB"),
        (KeyError("x"), 1, "KeyError: 'x'\nThis is a defect of megatron_mm"),
    ],
)  # fmt: skip
def test_one_place_says_what_an_exception_stands_for(error: BaseException, status: int, said: str) -> None:
    found, message = endings.explain(error)
    assert found == status
    assert message.startswith(said)


@pytest.mark.parametrize(("error", "status"), [(None, 0), (DataError("a.bin: record 3"), 3), (TakenOver("by 7"), 4)])
def test_a_rank_leaves_its_status_where_its_launcher_asks(
    error: Exception | None, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end() -> None:
        if error is not None:
            raise error

    monkeypatch.setenv("MEGATRON_MM_STATUS_DIR", str(tmp_path / "status"))
    monkeypatch.setenv("RANK", "5")
    assert endings.run(end) == status
    said = endings.explain(error)[1].splitlines() if error else []
    assert (tmp_path / "status" / "rank_5").read_text().splitlines() == [str(status), *said]


def test_a_rank_whose_peer_has_gone_says_so() -> None:
    assert run_alone(_explain_lost) == (1, True), "a rank alone has no peer: it is a defect"
    assert run_ranks(2, _explain_lost) == [(75, False), (75, False)]


def _explain_lost() -> tuple[int, bool]:
    error = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    status, message = endings.explain(error)
    assert ("another rank has ended" in message) != ("defect" in message)
    return status, "defect" in message
