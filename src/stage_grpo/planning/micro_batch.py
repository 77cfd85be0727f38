"""The size of a micro-batch by the memory that is free, with the arithmetic of the plan."""

from __future__ import annotations

import dataclasses

from stage_grpo.micro_batches import divisors, in_micro_batches
from stage_grpo.planning.memory import training_bytes
from stage_grpo.planning.setting import Setting

MARGIN = 0.8
"""Share of the free memory that is planned with: libraries allocate more than is computed with, and in pieces."""


def in_passes_of(run: Setting, size: int) -> Setting:
    """The same run with so many images in one pass."""
    return dataclasses.replace(run, config=in_micro_batches(run.config, size))


def needed_bytes(run: Setting, size: int, is_loaded: bool = False) -> int:
    """Bytes that training adds to one GPU with so many images in one pass.

    Args:
        run: The run with its batch as configured.
        size: A divisor of ``per_device_train_batch_size``.
        is_loaded: Whether the policy's weights are there already.
    """
    return training_bytes(in_passes_of(run, size), is_loaded)


def largest_that_fits(run: Setting, free: float, is_loaded: bool = False) -> int | None:
    """The most images in one pass that need no more than ``MARGIN`` of what is free.

    Args:
        run: The run with its batch as configured.
        free: Free bytes of a GPU.
        is_loaded: Whether the policy's weights are there already, and not counted in ``free``.

    Returns:
        A divisor of ``per_device_train_batch_size``; None if one image is too many.
    """
    sizes = reversed(divisors(run.config.per_device_train_batch_size))
    return next((size for size in sizes if needed_bytes(run, size, is_loaded) <= MARGIN * free), None)
