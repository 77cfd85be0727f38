"""What depends on the device: the memory that is free, and a clock that waits for its work."""

from __future__ import annotations

import time

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take.

    Of a GPU what nobody holds, and what PyTorch's allocator holds for this process without using it. Of a machine
    what no program uses: a cache of files gives way.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return psutil.virtual_memory().available


def clock(device: torch.device) -> float:
    """Seconds of a clock, read when the device has done all that it was given: a GPU works on behind Python."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
