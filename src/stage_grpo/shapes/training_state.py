"""Checkpoints of a pretraining stage, written whole or not at all, and the loop's schedule."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS = "weights.safetensors"
_STATE = "state.pt"


def save_state(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder` by new tensors and a state of plain values and tensors.

    The new checkpoint is complete on disk before the old one goes; a crash in between leaves one that
    `load_state` finds.
    """
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: value.detach().contiguous().clone() for name, value in tensors.items()}, fresh / _TENSORS)
    torch.save(state, fresh / _STATE)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read what `save_state` wrote, or None where there is nothing to resume from.

    Raises:
        ValueError: a checkpoint that cannot be read.
    """
    source = folder if folder.exists() else folder.with_name(folder.name + ".old")
    if not source.exists():
        return None
    try:
        return load_file(source / _TENSORS), torch.load(source / _STATE, weights_only=True)
    except Exception as error:
        raise ValueError(f"{source} is not a readable checkpoint ({error}): delete it to start anew") from error


def learning_rate_factor(step: int, num_steps: int, warmup: int, constant_share: float) -> float:
    """Factor in (0, 1] of the peak learning rate: linear warm-up, a plateau, then half a cosine down to 0.01.

    Args:
        step: steps done so far.
        num_steps: length of the run.
        warmup: steps of the rise.
        constant_share: share of the run after which the fall begins.
    """
    progress = max(0.0, (step / num_steps - constant_share) / (1 - constant_share))
    return min(1.0, (step + 1) / (warmup + 1)) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
