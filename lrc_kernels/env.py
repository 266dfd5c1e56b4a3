# SPDX-License-Identifier: Apache-2.0
"""Every environment variable of the project, and the report that a bug report needs: `python -m lrc_kernels.env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from pathlib import Path

VARIABLES = {
    "LRC_BACKEND": "force one backend for every op: cuda, triton, cpu, reference (attention: flash_attn, aten, cudnn)",
    "LRC_CHECK": "1 also checks the values of device tensors, which synchronises (default 0)",
    "LRC_CUDA": "build: 0 leaves the CUDA kernels out, 1 demands them (default: built where nvcc is found)",
    "LRC_CUDA_ARCHS": "build: GPU architectures in CMake's notation (default 80-real;90a-real;90-virtual)",
    "LRC_BUILD_DIR": "build: CMake's build folder (default build/cmake-<python>-<platform>)",
    "LRC_REQUIRE_CHROMIUM": "tests: 1 fails instead of skipping where Chromium is missing (default 0)",
}
# Best first. The first three are other people's attention kernels: the flash-attn packages, and what torch ships.
BACKENDS = ("flash_attn", "aten", "cudnn", "cuda", "triton", "cpu", "reference")

# The package imports this module before `python -m` runs it a second time; it holds no state, so that is harmless.
warnings.filterwarnings("ignore", message="'lrc_kernels.env' found in sys.modules", category=RuntimeWarning)


def backend() -> str | None:
    """The backend that `LRC_BACKEND` forces, or None when it is unset or empty.

    Raises:
        ValueError: a name that is not a backend.
    """
    name = os.environ.get("LRC_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"LRC_BACKEND must be one of {', '.join(BACKENDS)} or unset, got {name!r}")
    return name


def check() -> bool:
    """Whether `LRC_CHECK=1` asks for checks of the values of device tensors.

    Raises:
        ValueError: a value other than 0 and 1.
    """
    return _flag("LRC_CHECK")


def _flag(name: str) -> bool:
    value = os.environ.get(name) or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0, 1 or unset, got {value!r}")
    return value == "1"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].removeprefix("NVRM version: ") if path.exists() else "no NVIDIA driver"


def cpu_name() -> str:
    """The processor's model name where Linux tells it, else what Python calls the platform."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def report() -> str:
    """Versions, devices, the backends of each op with the reason why one cannot run here, and the variables set."""
    import torch

    import lrc_kernels
    from lrc_kernels import native
    from lrc_kernels.backend import describe

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if not (torch.version.cuda or torch.version.hip):
        built_for = "CPU only"
    lines = [
        f"lrc_kernels  {lrc_kernels.__version__} ({Path(lrc_kernels.__file__).parent})",
        f"python       {platform.python_version()} on {platform.platform()}",
        f"torch        {torch.__version__} ({built_for})",
        *(f"{package:<12} {_version(package)}" for package in ("triton", "numpy")),
        f"driver       {_driver()}",
        f"cpu          {cpu_name()}, {os.cpu_count()} cores, kernels use {native.cpu_isa()}",
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        lines.append(f"cuda:{index:<7} {device.name}, sm_{device.major}{device.minor}, {memory:.0f} GiB")
    for op, backends in describe().items():
        lines += ["", f"lrc::{op}"]
        lines += [f"  {name:<10} {'yes' if reason is None else f'no: {reason}'}" for name, reason in backends.items()]
    lines += ["", *(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ)]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    print(report())
