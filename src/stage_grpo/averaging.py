"""An exponential moving average of the weights that are trained, on the CPU.

Each process averages what it holds: a whole parameter alone and under DDP or ZeRO-1/2, its shard under FSDP2, its
partition under DeepSpeed ZeRO-3. An update therefore costs a copy to the CPU and no communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from stage_grpo.shards import LocalShards


class WeightAverage:
    """Averages of the trainable parameters: ``average = d * average + (1 - d) * parameter`` after each step.

    ``d = min(decay, (1 + n) / (10 + n))`` at the n-th update, n from 1: short runs are not ruled by where they began.
    That is the schedule of TensorFlow's ``ExponentialMovingAverage(num_updates=n)`` and of ``torch_ema``; diffusers'
    ``EMAModel`` has the same with n one lower, and d = 0 at first. The average starts at the weights found.

    Args:
        model: The model as training holds it: under FSDP2 and DeepSpeed after it was prepared. Not wrapped in DDP.
        decay: Largest d, between 0 and 1.

    Attributes:
        averages: By parameter name: float32, on the CPU, this process's shard of each.
        num_updates: Updates so far.

    Raises:
        ValueError: If the decay is not between 0 and 1, or if no parameter is trained.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} must lie between 0 and 1, e.g. 0.999")
        self.decay = decay
        self.num_updates = 0
        self._shards = LocalShards(model, trainable=True)
        if not self._shards.parameters:
            raise ValueError("the model has no trainable parameter to average; leave ema_decay out")
        self.averages = {
            name: shard.clone(memory_format=torch.contiguous_format) for name, shard in self._shards.masters()
        }
        self._is_swapped = False

    @property
    def next_decay(self) -> float:
        """The d of the next update."""
        n = self.num_updates + 1
        return min(self.decay, (1 + n) / (10 + n))

    def update(self) -> None:
        """Move the averages towards the present weights; call it after each optimizer step.

        Raises:
            RuntimeError: If called inside :meth:`swapped`, where the model holds the averages.
        """
        self._refuse_swapped("update")
        for name, present in self._shards.masters():
            self.averages[name].lerp_(present, 1 - self.next_decay)
        self.num_updates += 1

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model hold the averages, in its own dtype, inside a ``with``, and its own weights again after.

        All processes enter and leave together. Own weights wait on the CPU and come back bit for bit, also after an
        exception. Optimizer state, and the float32 masters that DeepSpeed keeps beside the weights, stay as they are.

        Raises:
            RuntimeError: If entered twice.
        """
        self._refuse_swapped("swapped")
        own = self._shards.copies()
        self._is_swapped = True
        try:
            self._shards.write(self.averages)
            yield
        finally:
            self._shards.write(own)
            self._is_swapped = False

    def save(self, folder: str | Path) -> None:
        """Write the averages as safetensors: one file a process, or one in all where no parameter is sharded."""
        metadata = {"num_updates": str(self.num_updates), "decay": repr(self.decay)}
        self._shards.save(folder, "average", self.averages, **metadata)

    def load(self, folder: str | Path) -> None:
        """Continue from averages that :meth:`save` wrote, with the decay this object was made with.

        Raises:
            ValueError: If the folder has no file for this process, or if the file is torn or lacks a tensor, has one
                too many or one of another shape.
        """
        tensors, metadata = self._shards.load(folder, "average")
        if not metadata.get("num_updates", "").isdigit():
            raise ValueError(f"{folder} holds tensors, but no averages: use another checkpoint")
        for name, average in self.averages.items():
            average.copy_(tensors[name])
        self.num_updates = int(metadata["num_updates"])

    def _refuse_swapped(self, name: str) -> None:
        if self._is_swapped:
            raise RuntimeError(f"{name}() inside swapped(), where the model holds the averages; leave the block first")


class AverageCallback(TrainerCallback):
    """Averages the weights while ``transformers.Trainer`` trains.

    The average is made when training begins: only then is the model sharded and restored from a checkpoint. It is
    updated at ``on_step_end``, which comes once an optimizer step (after the last micro-batch), before evaluating and
    saving. A step that a loss scaler skipped counts, with unchanged weights.

    Args:
        decay: As in :class:`WeightAverage`.
        resume_from: Folder to continue from, as in :meth:`WeightAverage.load`; may be set until training begins.

    Attributes:
        average: The average, ``None`` before training began.
    """

    def __init__(self, decay: float, resume_from: str | Path | None = None):
        self.decay = decay
        self.resume_from = resume_from
        self.average: WeightAverage | None = None

    def swapped(self) -> AbstractContextManager[None]:
        """:meth:`WeightAverage.swapped`; before training there is no average and the model keeps its weights."""
        return nullcontext() if self.average is None else self.average.swapped()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Start the average at the model's weights, or where ``resume_from`` left it."""
        self.average = WeightAverage(model, self.decay)
        if self.resume_from is not None:
            self.average.load(self.resume_from)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update the average."""
        assert self.average is not None, "transformers no longer calls on_train_begin before on_step_end"
        self.average.update()
