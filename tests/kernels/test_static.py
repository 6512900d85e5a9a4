"""What the compiler made of the kernels: read from the extension that lies in the package, for every architecture.

ptxas's figures come from `cuobjdump -res-usage`, the accesses from its SASS; it comes with triton.
"""

import hashlib
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import triton

from megatron_mm.kernels import native

CSRC = Path(__file__).parents[2] / "csrc" / "kernels"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

REGISTERS = {
    "assemble_forward": 32,
    "assemble_backward": 40,
    "token_rows": 32,
    "token_rows_tiles": 48,
    "token_rows_carries": 40,
    "swiglu_forward": 40,
    "swiglu_backward": 40,
    "rms_norm_forward": 64,
    "rms_norm_backward": 128,
    "mqa_rope_forward": 64,
    "mqa_rope_backward": 168,
    "cross_entropy_statistics": 40,
    "cross_entropy_combine": 40,
    "cross_entropy_backward": 40,
}
"""Registers of a thread, at most: 32 leave a multiprocessor full of threads, 64 half full, 128 a quarter. rms_norm's
backward pass keeps a row and its gradients, mqa_rope's with a norm those of two weights: 158 registers in BF16."""
SHARED_BYTES = {"rms_norm_forward": 128, "rms_norm_backward": 128, "cross_entropy_statistics": 256}
NARROW = {
    "assemble_forward": {("LDG", 32)},  # media_row
    "assemble_backward": {("LDG", 32)},
    "token_rows": {("LDG", 64)},  # ids
    "token_rows_tiles": {("LDG", 64)},  # ids and their order
    "token_rows_carries": {("LDG", 64)},
    "rms_norm_forward": {("STG", 32)},  # the inverse root mean square of a row
    "rms_norm_backward": {("LDG", 32)},
    # the weight of a norm, from cache; in FP32 on sm_80 the compiler splits one of its two stores into four
    "mqa_rope_forward": {("LDG", 16), ("LDG", 32), ("STG", 32)},
    "mqa_rope_backward": {("LDG", 16), ("LDG", 32), ("STG", 32)},  # and partial sums, once a warp
    "cross_entropy_statistics": {("LDG", 16), ("LDG", 32), ("LDG", 64), ("STG", 32)},  # label, mask, statistics
    "cross_entropy_backward": {("LDG", 32), ("LDG", 64)},  # of a row: gradient, log_z, mask, label
}
"""(instruction, bits) of global accesses that a kernel for aligned rows may have beside those of 128 bits."""

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def dump(what: str) -> dict[tuple[str, str], str]:
    """Return what cuobjdump says of each (kernel, architecture); a kernel is its name and its template's arguments."""
    command = [str(CUOBJDUMP), what, native.library().__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts, arch, key = {}, "", None
    for line in text.splitlines():
        if found := re.match(r"\s*arch = (\w+)", line):
            arch, key = found[1], None
        elif found := re.match(r"\s*Function\s*:?\s*(\S+?):?$", line):
            key = (kernel_name(found[1]), arch)
            parts[key] = ""
        elif key:
            parts[key] += line + "\n"
    return parts


def kernel_name(mangled: str) -> str:
    """Return 'swiglu_forward bf16 8' of a mangled name."""
    base, rest = re.search(r"\d([a-z_]+)_kernel(.*)", mangled).groups()
    dtype = "bf16" if rest.startswith("I13__nv_bfloat16") else "fp32"
    width = re.search(r"Li(\d+)E", rest)
    norm = re.search(r"Lb([01])E", rest)
    return " ".join([base, dtype, width[1] if width else "1", *(("norm",) if norm and norm[1] == "1" else ())])


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str], dict[str, int]]:
    return {
        key: {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
        for key, text in dump("-res-usage").items()
    }


@pytest.fixture(scope="module")
def accesses() -> dict[tuple[str, str], Counter]:
    """Return how often each kernel has each (instruction, bits) on global or local memory."""
    counts = {}
    for key, text in dump("-sass").items():
        found = re.findall(r"\b(LDG|STG|LDL|STL)\.?([\w.]*)", text)
        counts[key] = Counter((name, access_bits(flags)) for name, flags in found)
    return counts


def access_bits(flags: str) -> int:
    return next((int(bits) for bits in re.findall(r"\b[US]?(128|64|16|8)\b", flags)), 32)


def test_the_extension_is_of_these_sources() -> None:
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(CSRC.iterdir()))).hexdigest()
    assert digest == native.library().SOURCES, "csrc/kernels has changed: python setup.py build_ext --inplace"


def test_every_kernel_is_there_for_every_architecture(usage: dict) -> None:
    assert {arch for _, arch in usage} == set(ARCHITECTURES)
    assert {name.split()[0] for name, _ in usage} == set(REGISTERS)
    for arch in ARCHITECTURES:
        # (FP32, BF16) x (wide, narrow) of each but combine, and mqa_rope's backward pass with and without a norm
        assert sum(own == arch for _, own in usage) == 4 * (len(REGISTERS) - 1) + 1 + 4


def test_registers_stack_and_shared_memory_are_within_bounds(usage: dict) -> None:
    for (name, arch), used in usage.items():
        kernel = name.split()[0]
        assert used["REG"] <= REGISTERS[kernel], (name, arch, used)
        assert used["STACK"] == used["LOCAL"] == 0, (name, arch, used)  # no spills, no arrays in local memory
        # From Hopper on the runtime keeps 1,024 bytes of each block to itself.
        assert used["SHARED"] - (0 if arch == "sm_80" else 1024) <= SHARED_BYTES.get(kernel, 0), (name, arch, used)


def test_aligned_rows_move_16_bytes_at_a_time(accesses: dict) -> None:
    for (name, arch), counts in accesses.items():
        kernel, _, width = name.split()[:3]
        assert not any(instruction in ("LDL", "STL") for instruction, _ in counts), (name, arch, counts)
        if width == "1":
            continue
        assert counts["LDG", 128] > 0, (name, arch, counts)
        assert counts["STG", 128] > 0 or kernel == "cross_entropy_statistics", (name, arch, counts)
        narrow = {access for access in counts if access[1] != 128}
        assert narrow <= NARROW.get(kernel, set()), (name, arch, counts)
