"""Whether the loss and the gradient of a step are finite, in all processes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class FiniteCheck:
    """Collects what one optimizer step showed, without waiting for a device before it is asked.

    Args:
        accelerator: The trainer's.

    Attributes:
        loss: Sum over the step's micro-batches on this process; None without any.
        grad_norm: Gradient norm of the step, the same in all processes.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.loss: float | None = None
        self.grad_norm: float | None = None
        self._sum: Tensor | None = None

    def add_loss(self, loss: Tensor) -> None:
        """Take in the loss of one micro-batch on this process."""
        self._sum = loss if self._sum is None else self._sum + loss

    def set_gradient(self, norm: Any) -> None:
        """Take in the gradient norm."""
        self.grad_norm = norm.item() if isinstance(norm, Tensor) else norm

    def close(self) -> bool:
        """End the step: whether a process saw something that is not finite. All processes call it together."""
        self.loss = None if self._sum is None else self._sum.item()
        self._sum = None
        # Infinite gradients are how a loss scaler finds its scale; it skips these steps itself.
        values = [self.loss] if self.accelerator.scaler is not None else [self.loss, self.grad_norm]
        is_broken = not all(value is None or math.isfinite(value) for value in values)
        if self.accelerator.num_processes == 1:
            return is_broken
        broken: Any = torch.tensor(float(is_broken), device=self.accelerator.device)
        return self.accelerator.reduce(broken, reduction="sum").item() > 0
