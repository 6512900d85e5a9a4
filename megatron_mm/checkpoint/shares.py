"""A rank's share of a copy: a file of tensors, and its way from one node to another over TCP."""

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mm.storage import READ_BYTES

TRANSFER_SECONDS = 120.0
"""How long a transfer may stand still before it is given up."""
ALIGNMENT = 64
"""Bytes that each tensor of a share begins at a multiple of."""


def name_of_share(rank: int) -> str:
    """Return the name of a rank's share in a copy."""
    return f"rank_{rank:05d}.bin"


def serve(listener: socket.socket, key: str, files: Mapping[str, Path], count: int = 1 << 30) -> None:
    """Answer those who know the key and ask for one of `files`, `count` times in all or until nobody comes."""
    listener.settimeout(TRANSFER_SECONDS)
    while count:
        try:
            connection, _ = listener.accept()
        except OSError:  # nobody comes any more
            return
        with connection:
            try:
                connection.settimeout(TRANSFER_SECONDS)
                asked_key, name = (
                    _receive(connection, 32).decode(),
                    _receive(connection, len(name_of_share(0))).decode(),
                )
                if not secrets.compare_digest(asked_key, key):
                    continue
                count -= 1
                if name in files:  # otherwise who asked sees the end
                    with files[name].open("rb") as file:
                        connection.sendall(os.fstat(file.fileno()).st_size.to_bytes(8, "big"))
                        connection.sendfile(file)
            except (OSError, ValueError):  # who asked says so
                continue


def pull(path: Path, address: str, port: int, key: str) -> str:
    """Write the file of the same name of another rank to `path`, and return its SHA-256. Raises OSError."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
    with socket.create_connection((address, port), timeout=TRANSFER_SECONDS) as connection, path.open("wb") as file:
        connection.sendall(key.encode() + path.name.encode())
        left = int.from_bytes(_receive(connection, 8), "big")
        while left:
            count = connection.recv_into(buffer[: min(left, READ_BYTES)])
            if not count:
                raise ConnectionError(f"{address} closed the connection {left} bytes before the end of {path.name}")
            digest.update(buffer[:count])
            file.write(buffer[:count])
            left -= count
    return digest.hexdigest()


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the other side has closed the connection")
        data += part
    return data


def write_share(path: Path, tensors: Mapping[str, Tensor], *, own: Any) -> str:
    """Write tensors of the CPU and `own`, plain data, to a file, and return its SHA-256.

    The file begins with the length of its header (8 bytes) and the header: JSON of each tensor's name, type, shape and
    place behind the header.
    """
    listed, place = [], 0
    for name, tensor in tensors.items():
        listed.append((name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), place))
        place += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    header = json.dumps({"own": own, "tensors": listed}).encode()
    header += b" " * (-(len(header) + 8) % ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for part in (len(header).to_bytes(8, "big") + header, *map(_bytes_of, tensors.values())):
            padding = bytes(-len(part) % ALIGNMENT)
            for piece in (part, padding):
                file.write(piece)
                digest.update(piece)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_share(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a share, which are not to be changed, and what was written beside them.

    They are in the memory of the file. Its bytes are taken to be whole. Raises OSError.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "big")
        header = json.loads(file.read(length))
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)[8 + length :]
    tensors = {}
    for name, kind, shape, place in header["tensors"]:
        dtype = getattr(torch, kind)
        size = torch.Size(shape).numel() * dtype.itemsize
        tensors[name] = data[place : place + size].view(dtype).view(shape)
    return tensors, header["own"]
