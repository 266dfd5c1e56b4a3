# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/**/*.cu for the host, against the emulation in include/, and loads the result."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


class HostKernels:
    """The compiled kernels: `call("gather_rows", tensors and numbers)`, in either order of threads."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))

    def call(self, name: str, *args: Any, reverse: bool = False) -> None:
        """Raises RuntimeError with the message of the C++ exception."""
        function = getattr(self.library, f"host_{name}")
        function.restype = ctypes.c_char_p
        self.library.host_reverse_order(int(reverse))
        message = function(*map(_to_c, args))
        if message is not None:
            raise RuntimeError(message.decode())


def _to_c(value: Any) -> Any:
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, (list, tuple)):
        return (ctypes.c_int64 * len(value))(*value)
    return ctypes.c_int64(value)


@pytest.fixture(scope="session")
def compile_for_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compile_for_host(sources, name, flags) -> a shared object; skips where there is no C++ compiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "c++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler (apt-get install g++)")

    def build(sources: list[Path], name: str, flags: tuple[str, ...] = ()) -> Path:
        folder = tmp_path_factory.mktemp("cuda_on_host")
        include = [f"-I{path}" for path in (HERE / "include", ROOT / "csrc" / "include")]

        def run(*command: str | Path) -> None:
            done = subprocess.run([compiler, *FLAGS, *flags, *map(str, command)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr

        def compiled(source: Path) -> Path:
            target = folder / f"{source.parent.name}_{source.stem}.o"
            run(*include, "-x", "c++", "-c", source, "-o", target)
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            run("-shared", *pool.map(compiled, sources), "-o", folder / name)
        return folder / name

    return build


@pytest.fixture(scope="session")
def host_kernels(
    compile_for_host: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> HostKernels:
    sources = [*sorted((ROOT / "csrc").glob("*/*.cu")), HERE / "emulation_check.cu", HERE / "driver.cpp"]
    if not hasattr(pytestconfig, "workerinput"):
        return HostKernels(compile_for_host(sources, "kernels.so"))
    # Of pytest-xdist's processes, the first to come compiles for all of them: it takes every core for a minute.
    shared = tmp_path_factory.getbasetemp().parent / "cuda_on_host.so"
    with shared.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not shared.exists():
            compile_for_host(sources, "kernels.so").rename(shared)
    return HostKernels(shared)
