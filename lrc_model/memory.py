# SPDX-License-Identifier: Apache-2.0
"""Memory of a GPU, else of the process and the machine: how much there is, and the most that some code uses."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch


def forget_peak(device: torch.device | str) -> None:
    """Start to measure anew. Where the system lets no process forget its peak (outside of Linux), nothing changes."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device | str) -> int:
    """Bytes at the peak since `forget_peak`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    # macOS counts in bytes, other systems in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def total_memory(device: torch.device | str) -> int:
    """Bytes of the GPU, else of the machine."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
