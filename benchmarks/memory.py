"""Memory of this process, or of the GPU where there is one."""

import gc
import math
import re
from pathlib import Path

import torch

MARKS = Path("/proc/self/clear_refs")
"""Writing 5 there makes the system forget the process's peak."""


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif MARKS.exists():
        MARKS.write_text("5")


def forget_peak() -> None:
    """As `reset_peak`, after giving back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reset_peak()


def peak_bytes() -> float:
    """The most since the last reset; NaN where the system does not say."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def held_bytes() -> float:
    """What is held now; NaN where the system does not say."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else _status("VmRSS")


def _status(field: str) -> float:
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else math.nan
