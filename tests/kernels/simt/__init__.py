"""Runs the project's CUDA kernels on the host, with both sanitizers: see simt.h."""

import hashlib
import os
import struct
import subprocess
from pathlib import Path

import numpy as np
import nvidia.cu13
import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = Path(os.environ.get("MEGATRON_MM_CSRC", ROOT / "csrc" / "kernels"))
"""The kernels that are run; mutate.py names a broken copy here."""
CACHE = Path(os.environ.get("MEGATRON_MM_SIMT_CACHE", ROOT / "build" / "simt"))

FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
# What is left out takes long to compile; the address sanitizer sees null pointers and objects' bounds itself.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,vptr,object-size,return", "-fno-sanitize-recover=all"]
SECONDS = 60
"""An answer that takes longer is a hang."""


class Fault(Exception):
    """A kernel did what it must not: a line of simt.h's, or a sanitizer's report."""


def build(name: str) -> Path:
    """Return the program of `name`.cpp; what was compiled before from the same sources is not compiled again."""
    kernels = sorted(path for path in CSRC.iterdir() if path.name != "bindings.cpp")
    headers = [CSRC / "call.h", CSRC / "device.cuh"]
    parts = [_object("simt", [], headers[:1]), _object(name, SANITIZERS, kernels if name == "kernels" else headers)]
    program = CACHE / f"{parts[0].stem}-{parts[1].stem}"
    if not program.exists():
        _compile([*SANITIZERS, *map(str, parts)], program)
    return program


def _object(name: str, sanitizers: list[str], sources: list[Path]) -> Path:
    places = [f"-I{CSRC}", f"-I{HERE}", f"-isystem{Path(nvidia.cu13.__path__[0]) / 'include'}"]
    digest = hashlib.sha256(repr((FLAGS, sanitizers)).encode())
    for source in (HERE / f"{name}.cpp", HERE / "simt.h", *sources):
        digest.update(source.read_bytes())
    target = CACHE / f"{name}-{digest.hexdigest()[:12]}.o"
    if not target.exists():
        _compile([*FLAGS, *sanitizers, *places, "-c", str(HERE / f"{name}.cpp")], target)
    return target


def _compile(flags: list[str], target: Path) -> None:
    """Make `target`, whole or not at all: other processes may be at it too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f"{target.name}.{os.getpid()}")
    subprocess.run(["g++", *flags, "-o", str(draft)], check=True)
    draft.rename(target)


class Host:
    """A program that runs kernels; started anew after a fault."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.process: subprocess.Popen | None = None
        self.seed = 0
        """Order of blocks and threads: 0 as they are counted, 1 the opposite, else random."""
        self.offset = 0
        """Bytes by which every buffer is moved off its 16-byte alignment."""

    def launch(self, name: str, *arguments: Tensor | float | int | None) -> int:
        """Call the entry `name` and return its result. Tensors are copied in, and back into their storage.

        Raises Fault with what stopped the program.
        """
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        process = self._running()
        try:
            process.stdin.write(self._message(name, arguments))
            process.stdin.flush()
            (result,) = struct.unpack("q", process.stdout.read(8))
            for tensor in tensors:
                _copy_back(process.stdout.read(tensor.numel() * tensor.element_size()), tensor)
        except (BrokenPipeError, struct.error):
            self.process = None
            raise Fault(process.stderr.read().decode()) from None
        return result

    def close(self) -> None:
        """End the program."""
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait(SECONDS)

    def _running(self) -> subprocess.Popen:
        if self.process is None:
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            self.process = subprocess.Popen([str(self.program)], env=environment, **pipes)
        return self.process

    def _message(self, name: str, arguments: tuple) -> bytes:
        parts = [struct.pack("q", len(name)), name.encode(), struct.pack("qq", self.seed, len(arguments))]
        for argument in arguments:
            if argument is None:
                parts.append(struct.pack("q", ord("n")))
            elif isinstance(argument, Tensor):
                assert argument.is_contiguous()
                data = _bytes(argument).tobytes()
                parts += [struct.pack("qqq", ord("b"), len(data), self.offset), data]
            elif isinstance(argument, float):
                parts.append(struct.pack("qd", ord("f"), argument))
            else:
                parts.append(struct.pack("qq", ord("i"), argument))
        return b"".join(parts)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)


def _copy_back(data: bytes, tensor: Tensor) -> None:
    if data:
        _bytes(tensor)[:] = np.frombuffer(data, np.uint8)
