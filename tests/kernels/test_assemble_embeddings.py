"""Embedding assembly: the operator against its reference, and the CUDA source run on the host against both."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import nvidia.cu13
import pytest
import torch
from torch import Tensor

from megatron_mm.errors import ConfigError
from megatron_mm.kernels import ops, reference

CSRC = Path(__file__).parents[2] / "csrc" / "kernels"
SHAPES = [(1, 1, 0), (1, 4, 1), (7, 8, 3), (33, 20, 33), (64, 128, 0), (50, 37, 12), (0, 8, 0)]
"""(num_tokens, hidden, num_media): empty, odd and unaligned ones included."""


def operands(shape: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    num_tokens, hidden, num_media = shape
    generator = torch.Generator().manual_seed(num_tokens * 1000 + hidden)
    draw = lambda *size: torch.randn(*size, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    positions = torch.randperm(num_tokens, generator=generator)[:num_media]
    return {
        "tokens": draw(num_tokens, hidden),
        "text_type": draw(hidden),
        "features": draw(num_media, hidden),
        "positions": positions,
    }


def slow(tokens: Tensor, text_type: Tensor, features: Tensor, positions: Tensor) -> Tensor:
    """Row by row, in float64."""
    rows = []
    for row in range(tokens.shape[0]):
        hits = (positions == row).nonzero().flatten().tolist()
        rows.append(features[hits[0]].double() if hits else tokens[row].double() + text_type.double())
    return torch.stack(rows) if rows else tokens.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("native", [False, True], ids=["reference", "operator"])
def test_forward_and_gradients_are_those_of_the_slow_form(shape: tuple[int, int, int], native: bool) -> None:
    ours, theirs = operands(shape), operands(shape)
    if native:
        found = ops.native_assemble_embeddings(*ours.values())[0]
    else:
        found = reference.assemble_embeddings(**ours)
    expected = slow(**theirs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (found * weight).sum().backward()
    (expected * weight.double()).sum().backward()
    for name in ("tokens", "text_type", "features"):
        slow_gradient = torch.zeros_like(theirs[name]) if theirs[name].grad is None else theirs[name].grad
        torch.testing.assert_close(ours[name].grad, slow_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 8, 3), (5, 4, 0)], ids=str)
def test_the_operator_is_well_formed(shape: tuple[int, int, int]) -> None:
    torch.library.opcheck(ops.native_assemble_embeddings, tuple(operands(shape).values()))


def test_the_choice_of_kernels_is_explicit() -> None:
    cpu = torch.device("cpu")
    assert ops.select("auto", cpu) == "reference"
    assert ops.select("reference", cpu) == "reference"
    with pytest.raises(ConfigError, match=r"training\.kernels=native, but"):
        ops.select("native", cpu)


HARNESS = """
#include "assemble_embeddings.cuh"
using namespace megatron_mm;

// Runs every (row, group) in the order of `threads`, as blocks and threads of a GPU may come in any.
template <typename scalar_t, int WIDTH>
static void run(bool backward, int64_t count, const int64_t* threads, int64_t hidden, void** p) {
  const int32_t* rows = static_cast<const int32_t*>(p[3]);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = threads[i] / (hidden / WIDTH), group = threads[i] % (hidden / WIDTH);
    if (backward)
      assemble_backward<scalar_t, WIDTH>(row, group, hidden, (scalar_t*)p[0], rows, (scalar_t*)p[1], (scalar_t*)p[2]);
    else
      assemble_forward<scalar_t, WIDTH>(row, group, hidden, (scalar_t*)p[0], (scalar_t*)p[1], (scalar_t*)p[2], rows,
                                        (scalar_t*)p[4]);
  }
}

extern "C" void run_host(bool bf16, bool wide, bool backward, int64_t count, const int64_t* threads, int64_t hidden,
                         void** pointers) {
  if (bf16 && wide) run<__nv_bfloat16, 8>(backward, count, threads, hidden, pointers);
  if (bf16 && !wide) run<__nv_bfloat16, 1>(backward, count, threads, hidden, pointers);
  if (!bf16 && wide) run<float, 4>(backward, count, threads, hidden, pointers);
  if (!bf16 && !wide) run<float, 1>(backward, count, threads, hidden, pointers);
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The device functions of the .cuh, compiled by g++ over CUDA's host headers, which come with torch."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "harness.cpp").write_text(HARNESS)
    headers = Path(nvidia.cu13.__path__[0]) / "include"
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-fno-sanitize-recover=undefined",
    ]
    flags += ["-fsanitize=undefined", "-static-libubsan", f"-I{CSRC}", f"-isystem{headers}"]
    command = ["g++", *flags, str(folder / "harness.cpp"), "-o", str(folder / "harness.so")]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / "harness.so"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("shape", [(1, 8, 1), (7, 16, 3), (33, 64, 33), (20, 8, 0)], ids=str)
def test_the_cuda_source_computes_the_reference(
    host: ctypes.CDLL, dtype: torch.dtype, wide: bool, order: int, shape: tuple[int, int, int]
) -> None:
    num_tokens, hidden, num_media = shape
    data = {name: tensor.detach() for name, tensor in operands(shape, dtype).items()}
    media_row = ops._media_rows(data["tokens"], data["positions"])
    threads = num_tokens * (hidden // ((16 // dtype.itemsize) if wide else 1))
    schedule = np.arange(threads) if order == 0 else np.random.default_rng(order).permutation(threads)

    def launch(backward: bool, *tensors: Tensor) -> None:
        assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
        pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
        place = ctypes.c_void_p(np.ascontiguousarray(schedule).ctypes.data)
        kind = ctypes.c_bool(dtype == torch.bfloat16)
        size = ctypes.c_int64(threads)
        host.run_host(kind, ctypes.c_bool(wide), ctypes.c_bool(backward), size, place, ctypes.c_int64(hidden), pointers)

    out = torch.full_like(data["tokens"], torch.nan)
    launch(False, data["tokens"], data["text_type"], data["features"], media_row, out)
    assert torch.equal(out, reference.assemble_embeddings(**data))
    gradient = torch.randn(num_tokens, hidden).to(dtype)
    tokens, features = torch.full_like(gradient, torch.nan), torch.full_like(data["features"], torch.nan)
    launch(True, gradient, tokens, features, media_row)
    expected = ops.native_assemble_backward(gradient, media_row, num_media)
    assert torch.equal(tokens, expected[0])
    assert torch.equal(features, expected[1])


def ptxas(tmp_path: Path) -> str:
    """Compile for every architecture and return what ptxas says of registers, stack and spills."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)]
    flags = ["-std=c++17", "-O3", "-Xptxas", "-v", "-c", *targets]
    source, target = str(CSRC / "assemble_embeddings.cu"), str(tmp_path / "kernel.o")
    return subprocess.run(["nvcc", *flags, source, "-o", target], capture_output=True, text=True, check=True).stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_it_compiles_for_every_architecture_without_spills(tmp_path: Path) -> None:
    report = ptxas(tmp_path)
    for arch in (80, 90, 100):
        assert f"for 'sm_{arch}'" in report
    spills = [line for line in report.splitlines() if "spill" in line]
    assert len(spills) == 3 * 8  # architectures x (forward, backward) x (FP32, BF16) x (wide, narrow)
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spills)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_extension_is_built_where_nvcc_is() -> None:
    assert ops._cuda is not None
    assert ops._cuda.assemble_forward.__doc__ is not None
