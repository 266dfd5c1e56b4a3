# SPDX-License-Identifier: Apache-2.0
"""Builds lrc_kernels._C with CMake and Ninja, without any torch header.

In: csrc/, a C++ compiler, nvcc where there is one, and LRC_CUDA, LRC_CUDA_ARCHS, LRC_BUILD_DIR, MAX_JOBS from the
environment (see lrc_kernels/env.py). Out: one extension module next to the Python files.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def stop(reason: str) -> None:
    raise SystemExit(f"lrc_kernels: {reason}")


def check_toolchain() -> None:
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        stop(
            f"no C++ compiler found (looked for {', '.join(compilers)}): run `sudo apt-get install g++` (Debian, "
            "Ubuntu) or `sudo dnf install gcc-c++` (Fedora, RHEL)"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        stop(
            f"no Python.h in {sysconfig.get_path('include')}: run `sudo apt-get install python3-dev` (Debian, Ubuntu) "
            "or `sudo dnf install python3-devel` (Fedora, RHEL)"
        )


def find_nvcc() -> str | None:
    wanted = os.environ.get("LRC_CUDA", "")
    if wanted not in ("", "0", "1"):
        stop(f"LRC_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = next(filter(None, (shutil.which("nvcc", path=f"{home}/bin") for home in homes)), None)
    nvcc = nvcc or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and wanted == "1":
        stop("LRC_CUDA=1 asks for the CUDA kernels but no nvcc was found (set CUDA_HOME)")
    if nvcc is None:
        notice = "no nvcc found, building the CPU kernels only (set CUDA_HOME to build the CUDA kernels)"
        print(f"lrc_kernels: {notice}", flush=True)
    return nvcc


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        check_toolchain()
        nvcc = find_nvcc()
        # The tools come from the Python packages, found even where the environment's bin folder is not on PATH.
        import cmake
        import ninja
        import pybind11

        # setuptools' own build_temp is deleted after an editable install; a fixed folder makes rebuilds incremental.
        default = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build = Path(os.environ.get("LRC_BUILD_DIR") or default).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            *(f"-S{ROOT}", f"-B{build}", "-GNinja", f"-DCMAKE_INSTALL_PREFIX={target}"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
            *(f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", f"-DLRC_CUDA={'ON' if nvcc else 'OFF'}"),
        ]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        if archs := os.environ.get("LRC_CUDA_ARCHS"):
            configure.append(f"-DLRC_CUDA_ARCHS={archs}")
        cache = build / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            configure.append("--fresh")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        program = str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
        for step in (configure, ["--build", str(build), "--target", "install", "-j", jobs]):
            if subprocess.call([program, *step]) != 0:
                hint = f" with {nvcc}; LRC_CUDA=0 builds the CPU kernels only" if nvcc else ""
                stop(f"CMake failed{hint}; its error stands above")


setup(ext_modules=[Extension("lrc_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
