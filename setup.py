"""Builds csrc: the C++ index kernels where a compiler is, the CUDA kernels where nvcc is. Neither is required.

Without them the package installs all the same and runs its references; it says at start-up which it uses.
"""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CUDA_ARCHITECTURES = os.environ.get("MEGATRON_MM_CUDA_ARCHITECTURES", "80 90 100").split()
NVCC = shutil.which("nvcc")


def pybind11_include() -> str:
    import pybind11

    return pybind11.get_include()


def cpp_extension(name: str, folder: str, sources: list[str], headers: list[str]) -> Extension:
    return Extension(
        name,
        [f"csrc/{folder}/{source}" for source in sources],
        depends=[f"csrc/{folder}/{header}" for header in headers],
        include_dirs=[pybind11_include(), f"csrc/{folder}"],
        extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall"],
        language="c++",
        optional=True,  # a machine without a compiler gets the references
    )


class BuildExtensions(build_ext):
    """Compiles the .cu sources of an extension with nvcc and links them with the rest, CUDA's runtime included."""

    def build_extension(self, extension: Extension) -> None:
        kernels = [source for source in extension.sources if source.endswith(".cu")]
        extension.sources = [source for source in extension.sources if source not in kernels]
        for kernel in kernels:
            target = Path(self.build_temp) / Path(kernel).with_suffix(".cu.o").name
            target.parent.mkdir(parents=True, exist_ok=True)
            targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHITECTURES]
            flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "--threads", "2", *targets]
            subprocess.run([NVCC, *flags, "-c", kernel, "-o", str(target)], check=True)
            extension.extra_objects.append(str(target))
        super().build_extension(extension)


index_headers = ["checksums.h", "permutation.h", "packing.h", "token_index.h"]
extensions = [cpp_extension("megatron_mm.data._index", "index", ["bindings.cpp"], index_headers)]
if NVCC:
    headers = sorted(path.name for path in Path("csrc/kernels").glob("*.*h"))
    cuda = cpp_extension("megatron_mm.kernels._cuda", "kernels", ["bindings.cpp", "launch.cu"], headers)
    # A test compares it with the sources that lie beside the extension, so that no one measures an old build.
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path("csrc/kernels").iterdir()))).hexdigest()
    cuda.define_macros = [("MM_SOURCES", f'"{digest}"')]
    dry_run = subprocess.run([NVCC, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    tops = [line.split("TOP=")[1].strip() for line in dry_run.splitlines() if "TOP=" in line]
    home = Path(tops[0]).resolve() if tops else Path(os.path.realpath(NVCC)).parent.parent
    cuda.library_dirs = [str(home / "lib64"), str(home / "targets/x86_64-linux/lib")]
    cuda.libraries = ["cudart_static", "dl", "rt", "pthread"]
    extensions.append(cuda)

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtensions})
