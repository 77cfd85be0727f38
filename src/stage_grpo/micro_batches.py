"""Micro-batches: how many of a step's images go through the policy at a time, without changing the step.

TRL counts everything in forward passes of ``per_device_train_batch_size`` images. Passes of fewer images are as many
more of them, in the accumulation of a step and in the passes that one rollout serves: rollouts, prompts, random
streams, the images of a step and its mean loss stay what they were.
"""

from __future__ import annotations

import copy
from typing import Any

AUTO = "auto"
"""``micro_batch_size`` that is chosen by the memory that is free before training."""
COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
"""What :func:`in_micro_batches` changes."""


def check_values(config: Any) -> None:
    """Check the micro-batch size of a configuration; the command line gives a number as text.

    Raises:
        ValueError: If it does not divide the batch, or is asked for beside an option that looks at a whole pass.
    """
    size, batch = config.micro_batch_size, config.per_device_train_batch_size
    if isinstance(size, str) and size.isdecimal():
        config.micro_batch_size = size = int(size)
    if size is None:
        return
    if size != AUTO and (isinstance(size, bool) or size not in divisors(batch)):
        possible = ", ".join(str(divisor) for divisor in divisors(batch))
        raise ValueError(
            f"micro_batch_size={size!r} does not divide per_device_train_batch_size={batch}; use {possible}, or auto"
        )
    if config.top_entropy_quantile < 1:
        raise ValueError(
            f"micro_batch_size={size!r} does not go with top_entropy_quantile={config.top_entropy_quantile}, for "
            "which TRL compares the tokens of one pass; leave one of them out"
        )


def divisors(number: int) -> list[int]:
    """Divisors of a positive number, in rising order."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def in_micro_batches(config: Any, size: int) -> Any:
    """The same run in passes of fewer images.

    Args:
        config: The configuration, which stays as it is.
        size: Images in one pass of one process; a divisor of ``per_device_train_batch_size``.

    Returns:
        A copy with the counts that TRL goes by; what DeepSpeed was told already is not changed.
    """
    parts = config.per_device_train_batch_size // size
    config = copy.copy(config)
    config.micro_batch_size = config.per_device_train_batch_size = size
    config.gradient_accumulation_steps *= parts
    config.steps_per_generation *= parts
    return config
