"""What depends on the machine: cores and memory that are free, and a clock that waits for a device's work."""

from __future__ import annotations

import os
import platform
import time
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def num_cores() -> int:
    """Cores that this process may use: a container or a scheduler may give it fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_vendor() -> str:
    """Who made the processor, as it says itself ("AuthenticAMD", "GenuineIntel"); empty where it does not say."""
    if os.path.exists("/proc/cpuinfo"):  # Linux
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("vendor_id")]
        return names[0] if names else ""
    return platform.processor().rpartition(" ")[2]  # Windows: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD"


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take.

    Of a GPU what nobody holds, and what PyTorch's allocator holds for this process without using it. Of a machine
    what no program uses: a cache of files gives way.
    """
    if device.type == "cuda":
        import torch

        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def clock(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given: a GPU works on behind Python."""
    if device.type == "cuda":
        import torch

        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
