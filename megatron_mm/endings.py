"""How a command of this package ends: what it says, and its exit status. One place decides, for training and tools.

0     it is done, or stopped early as it was asked to
2     the user mends it: a setting, a path, more memory than there is. `error: ...` says what, and how
3     a file is damaged, or not what it should be. `error: ...` names it
4     another job has taken the run over, and goes on with it
75    the world stopped it (EX_TEMPFAIL): storage, network, another rank, a run that would do harm; another try may go
      better
1     a defect of this package, the one thing that shows a traceback
86    nothing moved any more (training/watch.py)
130   Ctrl-C
141   nobody reads what it prints (`| head`)

Where MEGATRON_MM_STATUS_DIR names a folder, a rank that ends leaves there a file rank_N with its status and, on the
lines after it, what it said: a launcher sees of many ranks only the largest status, of killed ones too.
"""

import argparse
import contextlib
import difflib
import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import NoReturn

from megatron_mm import printable
from megatron_mm.errors import ConfigError, DataError, RunStopped, TakenOver, is_passing, of_system

DEFECT, MENDABLE, DAMAGED, TAKEN_OVER, INTERRUPTED, UNREAD = 1, 2, 3, 4, 130, 141
STOPPED = os.EX_TEMPFAIL
GRACE_SECONDS = 10.0
"""What a command may take to end after Ctrl-C: its main thread may wait for a rank that has left, and never see it."""
AGAIN_SECONDS = 0.5
"""Ctrl-C that comes again sooner is the same one: a launcher sends on to its ranks what the terminal has sent them."""
CPU_MEMORY = (
    *("can't allocate memory", "Cannot allocate memory", "bad_alloc", "not enough memory"),
    *("Storage size calculation overflowed", "numel: integer multiplication overflow"),
)
"""How torch, and the libraries under it, say of a CPU that its memory is full, in a RuntimeError."""
LOST = ("Connection closed by peer", "Connection reset", "Broken pipe", "Timed out waiting", "gloo")
"""How gloo says, in a RuntimeError, that another rank is gone."""
STATUSES: dict[type[Exception], int] = {
    ConfigError: MENDABLE,
    DataError: DAMAGED,
    TakenOver: TAKEN_OVER,
    RunStopped: STOPPED,
}
"""The exit status of each kind of error; the first that fits."""
SMALLER = "Close other programs, or take a machine with more memory."


class Parser(argparse.ArgumentParser):
    """Reads a command line; what is wrong with it is said as any other mistake is."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one paragraph, and end with the status of a mistake."""
        options = [option for action in self._actions for option in action.option_strings]
        wrong = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        near = [match for one in wrong for match in difflib.get_close_matches(one, options, n=1)]
        hint = f" Did you mean {near[0]}?" if near else ""
        said = printable.message(f"error: {message}.{hint} `{self.prog} --help` explains all arguments.")
        leave_status(MENDABLE, said)
        self.exit(MENDABLE, f"{said}\n")


def run(command: Callable[[], object], *, memory: str = SMALLER) -> int:
    """Run a command, say on stderr why it ended if it did not come to its end, and return its exit status.

    `memory` says what to do when there is too little of it. Whatever knows more of where the command was, or of what it
    leaves behind, says so in a note on the exception.
    """
    with printable.guarded_streams(), _interruptible():
        printable.set_up_logging(prefix=_who())
        try:
            command()
            sys.stdout.flush()
        except BaseException as error:
            if isinstance(error, SystemExit | GeneratorExit):
                raise
            status, message = explain(error, memory=memory)
            _say(message)
            leave_status(status, message)
            _give_up_output()
            return status
    leave_status(0, "")
    return 0


def leave_status(status: int, message: str) -> None:
    """Leave how this rank ends, and what it said, for whoever has started it and named a folder for that."""
    if folder := os.environ.get("MEGATRON_MM_STATUS_DIR"):
        path = Path(folder, f"rank_{_rank()}")
        with contextlib.suppress(OSError):  # it has been said, and nothing else can be done
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(f"{status}\n{printable.message(message)}\n" if message else f"{status}\n")
            os.replace(partial, path)


@contextlib.contextmanager
def note(*, stop: Callable[[], str] = lambda: "the same command starts anew", disk: str = "") -> Iterator[None]:
    """Let what ends the body say more: of Ctrl-C, what is left behind and how to go on; of a disk, what is written."""
    try:
        yield
    except KeyboardInterrupt as error:
        error.add_note(stop())
        raise
    except OSError as error:
        if disk:
            error.add_note(disk)
        raise


def at_least(least: int, *, below: int = 2**63) -> Callable[[str], int]:
    """Return what reads a whole number from a command line: `least` or more, and no more than a computer's word."""

    def whole_number(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) < below:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of {least} or more")

    return whole_number


def _give_up_output() -> None:
    """Let what was printed and cannot be written go, where the interpreter would try again as it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def explain(error: BaseException, *, memory: str = SMALLER) -> tuple[int, str]:
    """Return the exit status that an exception stands for, and what to say of it."""
    notes = "; ".join(getattr(error, "__notes__", []))
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, f"stopped by Ctrl-C: {notes or 'the same command starts anew'}."
    for kind, status in STATUSES.items():
        if isinstance(error, kind):
            return status, f"error: {error}" if status in (MENDABLE, DAMAGED) else f"{type(error).__name__}: {error}"
    if (asked := _memory_asked(error)) is not None:
        status, text = asked
        return status, f"error: out of memory{f' {notes}' if notes else ''}: {text} {memory}"
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return UNREAD, ""
    if isinstance(error, OSError) and (error.filename is not None or is_passing(error)):
        return explain(of_system(error, where=notes))
    if _is_lost_rank(error):
        first = str(error).strip().splitlines()[0]
        return STOPPED, f"{type(error).__name__}: another rank has ended, or the network failed ({first}). See its log."
    report = f"This is a defect of megatron_mm, not a mistake of yours. Please report it: {_versions()}."
    return DEFECT, printable.Shown(f"{printable.traced(error)}\n{report}")


def _memory_asked(error: BaseException) -> tuple[int, str] | None:
    """Return the status of what lacks memory, and how much was asked for and is there; None if it is something else.

    A CPU's memory is shared with others, who may need less at the next try; no try gets more than there is in all.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):  # its message goes on for ten lines
        facts = re.search(r"Tried to allocate.*?memory in use\.", str(error), re.DOTALL)
        return MENDABLE, " ".join(facts[0].split()) if facts else " ".join(str(error).split())[:300]
    by_torch = isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_MEMORY)
    by_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if not (isinstance(error, MemoryError) or by_torch or by_system):
        return None
    wanted, asked = 0.0, "more"
    if amount := re.search(r"allocate (\d+) bytes", str(error)):
        wanted, asked = float(amount[1]), _gib(int(amount[1]))
    elif amount := re.search(r"allocate ([\d.]+) ([KMGTPE]?)i?B", str(error)):
        wanted = float(amount[1]) * 1024.0 ** " KMGTPE".index(amount[2] or " ")
        asked = f"{amount[1]} {amount[0].split()[-1]}"
    import psutil  # a library of the system's figures, that only this path needs

    held, there = psutil.Process().memory_info().rss, psutil.virtual_memory()
    hopeless = wanted > there.total or "integer multiplication overflow" in str(error) or "size calcul" in str(error)
    text = f"it asked for {asked} of the CPU's memory; this process holds {_gib(held)}, and {_gib(there.available)} are"
    return MENDABLE if hopeless else STOPPED, f"{text} free."


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


def _is_lost_rank(error: BaseException) -> bool:
    """Tell whether an exception says that another rank, or the way to it, is gone."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized() or dist.get_world_size() == 1:
        return False
    by_gloo = type(error) is RuntimeError and any(text in str(error) for text in LOST)
    return by_gloo or isinstance(error, dist.DistError)


def _versions() -> str:
    packages = ("megatron-mm", "torch", "megatron-core")
    found = {name: metadata.version(name) for name in packages if _is_installed(name)}
    return ", ".join(f"{name} {version}" for name, version in found.items())


def _is_installed(name: str) -> bool:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))
    return False


def _say(message: str) -> None:
    """Print why this process ends; each rank prints, for torchrun ends the others as soon as one has failed."""
    if message:
        with contextlib.suppress(OSError):
            print(f"{_who()}{printable.message(message)}", file=sys.stderr, flush=True)


def _who() -> str:
    """Return what each line of a rank but the first begins with."""
    rank = os.environ.get("RANK", "0")
    return f"[rank {rank}] " if rank.isdecimal() and rank.strip("0") else ""


class _Interrupts:
    """Knows what Ctrl-C has asked for. Two see each one: the main thread's handler, which may be blocked for long, and
    a thread, which decides."""

    def __init__(self) -> None:
        self.gently: Callable[[], None] | None = None
        """What the first Ctrl-C calls instead of ending the command."""
        self._asked: float | None = None
        self.now = False
        """Whether the command is to end now."""

    def arrive(self) -> None:
        """Take note of one Ctrl-C."""
        if self.gently is None:
            self.now = True
        elif self._asked is None:
            self._asked = time.monotonic()
            self.gently()
        elif time.monotonic() - self._asked > AGAIN_SECONDS:
            self.now = True


_interrupts = _Interrupts()


@contextlib.contextmanager
def gently(ask: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C inside call `ask`, from another thread, and only the next one end the command."""
    _interrupts.gently = ask
    try:
        yield
    finally:
        _interrupts.gently = None


def _rank() -> str:
    rank = os.environ.get("RANK", "0")
    return rank if rank.isdecimal() else "0"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt once, and pass when it comes again: a launcher sends it again and again.

    A main thread that waits in a collective sees no signal; the process then ends by itself GRACE_SECONDS later, as it
    would if it were killed, which no file here minds.
    """
    global _interrupts
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # nohup: it is ignored
        yield
        return
    _interrupts = _Interrupts()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, _interrupt)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # also written while the main thread is blocked
    threading.Thread(target=_see_interrupts, args=(reading, _interrupts), name="interrupts", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writing)
        if signal.getsignal(signal.SIGINT) is _interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _interrupts.gently is None or _interrupts.now:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt


def _see_interrupts(reading: int, interrupts: _Interrupts) -> None:
    """Take note of each Ctrl-C, and end the process GRACE_SECONDS after one that is to end it, if it is still there."""
    while not interrupts.now:
        if not (numbers := os.read(reading, 16)):
            os.close(reading)
            return
        for number in numbers:
            if number == signal.SIGINT and not interrupts.now:
                interrupts.arrive()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # its handler may have come before this thread
    threading.Event().wait(GRACE_SECONDS)
    message = "stopped by Ctrl-C: what it waited for did not end. Checkpoints are as they were."
    _say(message)
    leave_status(INTERRUPTED, message)
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def out_of_reach_of_ctrl_c() -> Iterator[None]:
    """Let processes that are started inside never see Ctrl-C, which a terminal sends to all: their parent decides."""
    resource_tracker.ensure_running()  # or multiprocessing starts it with the first process, and lets signals in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say_unless_interrupted(kind: type[BaseException], error: BaseException, trace: object) -> None:
    """Be quiet about Ctrl-C while a command still imports what it needs."""
    if issubclass(kind, KeyboardInterrupt):
        _say("stopped by Ctrl-C before it began: nothing was touched.")
    else:
        sys.__excepthook__(kind, error, trace)  # type: ignore[arg-type]


sys.excepthook = _say_unless_interrupted
