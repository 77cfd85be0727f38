"""TRL's GRPO trainer in micro-batches: how large they are, and checkpoints that do not depend on it."""

from __future__ import annotations

import copy
import heapq
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, str_to_bool
from datasets import Dataset
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

from stage_grpo.config import StageConfig
from stage_grpo.devices import free_bytes
from stage_grpo.gathering import image_policy
from stage_grpo.micro_batches import AUTO, COUNTS, in_micro_batches
from stage_grpo.planning.micro_batch import largest_that_fits, needed_bytes
from stage_grpo.planning.setting import Setting
from stage_grpo.planning.sizes import sizes_of
from stage_grpo.resumable import ResumableTrainer

logger = logging.getLogger(__name__)

NUM_LONG_PROMPTS = 32
"""Prompts with the most letters, among which the one with the most tokens is looked for."""


class MicroBatchedTrainer(ResumableTrainer):
    """GRPO in passes of ``micro_batch_size`` images. Checkpoints count as configured, so any size continues them."""

    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(self, *, model: Any, args: StageConfig, train_dataset: Dataset, processing_class: Any, **kwargs: Any):
        self._configured = args
        if args.micro_batch_size is not None:
            size = args.micro_batch_size
            if size == AUTO:
                size = choose_size(args, image_policy(model), train_dataset, processing_class)
            args = in_micro_batches(args, int(size))
            _tell_deepspeed(args)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs
        )

    def _save_rest(self, folder: Path) -> None:
        with self._as_configured():
            super()._save_rest(folder)

    def _restore_rest(self, folder: Path) -> None:
        with self._as_configured():
            super()._restore_rest(folder)

    @contextmanager
    def _as_configured(self) -> Iterator[None]:
        """Count arguments, place and buffered rollout in passes of the configured batch."""
        args, configured = self.args, copy.copy(self.args)
        for name in (*COUNTS, "micro_batch_size"):
            setattr(configured, name, getattr(self._configured, name))
        parts = args.steps_per_generation // configured.steps_per_generation
        self.args, self._step = configured, self._step // parts
        self._cut_buffer()
        try:
            yield
        finally:
            self.args, self._step = args, self._step * parts
            self._cut_buffer()

    def _cut_buffer(self) -> None:
        if self._buffered_inputs is not None and len(self._buffered_inputs) != self.args.steps_per_generation:
            self._buffered_inputs = split_again(self._buffered_inputs, self.args.steps_per_generation)


def split_again(passes: Sequence[dict[str, Any]], num_passes: int) -> list[dict[str, Any]]:
    """Cut a rollout that was cut into passes into another number of them.

    Args:
        passes: Tensors by name, as TRL buffers them: one row a sample, or one number for the whole rollout.
        num_passes: How many there shall be; their rows keep their order.
    """

    def joined(values: list[Any]) -> Any:
        return torch.cat(values) if isinstance(values[0], Tensor) and values[0].ndim else values[0]

    whole = {name: joined([one[name] for one in passes]) for name in passes[0]}
    return split_tensor_dict(whole, num_passes)


def choose_size(args: StageConfig, policy: Any, dataset: Dataset, tokenizer: Any) -> int:
    """Choose the largest micro-batch that the free memory holds on every process, and log it.

    Weights that are not on the device yet, gradients, optimizer and reference are counted by arithmetic: TRL has to
    know the size before any of them is there.

    Args:
        args: The configuration.
        policy: The policy that will be trained.
        dataset: Rows with a ``prompt``.
        tokenizer: The checkpoint's.

    Returns:
        A divisor of ``per_device_train_batch_size``, the same on every process; 1 if nothing fits.
    """
    free = free_bytes(args.device)
    if args.device.type == "cpu":
        free //= args.world_size  # processes of one machine share it
    prompts = heapq.nlargest(NUM_LONG_PROMPTS, set(dataset["prompt"]), key=len)
    longest = max(map(len, policy.encode_prompts(tokenizer, prompts, args.prompt_template)))
    mixed = bool(args.bf16 or args.fp16)
    run = Setting(args, sizes_of(policy), args.world_size, _parallel(args), free, longest, mixed)
    is_loaded = policy.device.type == args.device.type
    size = min(gather_object([largest_that_fits(run, free, is_loaded) or 0]))
    if args.process_index == 0:
        _tell(args, size, needed_bytes(run, max(size, 1), is_loaded), free)
    return max(size, 1)


def _tell(args: StageConfig, size: int, needed: int, free: int) -> None:
    batch, memory = args.per_device_train_batch_size, f"about {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free"
    if size:
        passes = batch // size
        logger.warning("micro_batch_size auto: %d of %d images at a time x %d, %s", size, batch, passes, memory)
        return
    remedy = "stage plan lists what would help" if args.gradient_checkpointing else "set gradient_checkpointing: true"
    logger.warning("micro_batch_size auto: 1 of %d images at a time may not fit, %s; %s", batch, memory, remedy)


def _parallel(args: StageConfig) -> str:
    """How the run is spread, in the plan's names."""
    plugin: Any = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        offloaded = str(plugin.hf_ds_config.get_value("zero_optimization.offload_optimizer.device")) == "cpu"
        return "zero3_offload" if offloaded else "zero3"
    if plugin is not None:
        return "zero2"
    # accelerate's launcher says it by this variable alone until the trainer has made its accelerator.
    is_fsdp = bool(args.fsdp) or bool(str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")))
    return "fsdp2" if is_fsdp else "ddp"


def _tell_deepspeed(args: StageConfig) -> None:
    """Renew what transformers has filled into DeepSpeed's configuration, where it is given as a key of the run."""
    if not args.deepspeed:
        return
    from accelerate.utils import DeepSpeedPlugin
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(args.deepspeed)
    args.hf_deepspeed_config.trainer_config_process(args)
    args.deepspeed_plugin = DeepSpeedPlugin(hf_ds_config=args.hf_deepspeed_config)
