"""Sharded weights (DeepSpeed ZeRO-3, FSDP2): gathered for the rollout, kept together where tied, saved whole.

A rollout calls parts of the model a thousand times outside the model's own ``forward``. The hooks that gather sharded
weights would fire for each of these calls, or not at all, so the weights are gathered once around the whole rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar
from unittest import mock

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

if TYPE_CHECKING:
    from stage_grpo.trainer import StageTrainer

Result = TypeVar("Result")


def image_policy(model: Any) -> Any:
    """Return the :class:`ImagePolicy` inside a possible PEFT wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


class ShardedTrainer(GRPOTrainer):
    """What sharding an image policy needs and transformers and TRL do not do; without sharding it changes nothing."""

    args: Any  # a StageConfig: TRL's own annotations would hide its fields
    model: Any

    @cached_property
    def policy(self) -> Any:
        """The bare policy, whatever parallelism and adapters wrap around it: the same object all along."""
        return image_policy(self.accelerator.unwrap_model(self.model))

    def create_accelerator_and_postprocess(self) -> None:
        """Create accelerate's objects as transformers does, and keep FSDP2 from rounding log-probabilities.

        accelerate asks FSDP2 to cast what the model returns to the dtype of the mixed precision. Log-probabilities
        in bfloat16 move in steps of 0.03 nats: ratios, KL and entropies would be noise.

        Raises:
            ValueError: If FSDP is asked for in its first version.
        """
        super().create_accelerator_and_postprocess()
        plugin = self._fsdp_plugin
        if plugin is not None and plugin.fsdp_version != 2:
            raise ValueError(
                f"fsdp_version={plugin.fsdp_version} is not supported: its weights cannot be gathered for a rollout; "
                "set fsdp_version: 2 in the accelerate configuration, as configs/accelerate/fsdp2.yaml does"
            )
        if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
            plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        policy = self.policy
        _forget_unused_renames(policy)
        with nullcontext() if self._fsdp_plugin is None else _heads_as_fsdp2_wants_them(policy):
            return super()._prepare_for_training(*args, **kwargs)

    @property
    def can_share_prompts(self) -> bool:
        """Whether scoring may run prompts apart from images: no weights gathered twice, no activations recomputed."""
        is_sharded = self.is_fsdp_enabled or is_deepspeed_zero3_enabled()
        return not is_sharded and not self.args.gradient_checkpointing

    @property
    def _fsdp_plugin(self) -> Any:
        return getattr(self.accelerator.state, "fsdp_plugin", None)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy as transformers does, under FSDP2 whatever form its checkpoints have.

        With sharded checkpoints, which are the default of FSDP2, transformers saves no weights here, silently.
        """
        super().save_model(output_dir, _internal_call)
        plugin = self._fsdp_plugin
        if plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
            state_dict: Any = self.accelerator.get_state_dict(self.model)
            self._save(output_dir, state_dict=state_dict)


def with_whole_weights(trainer: StageTrainer, work: Callable[[Any], Result]) -> Result:
    """Run a piece of work on the policy while this process holds all of its weights.

    All processes must call it together. Gradients are off. Memory for one whole copy of the weights is needed on
    every process for the duration.

    Args:
        trainer: The trainer, whose model may be wrapped in any way.
        work: Receives the bare policy.

    Returns:
        What ``work`` returns.
    """
    args: Any = trainer.args
    wrapped: Any = trainer.model_wrapped
    with (
        torch.no_grad(),
        unwrap_model_for_generation(
            wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as unwrapped,
    ):
        if isinstance(unwrapped, FSDPModule):
            plugin: Any = trainer.accelerator.state.fsdp_plugin
            return _unsharded(unwrapped, lambda: work(image_policy(unwrapped)), bool(plugin.reshard_after_forward))
        return work(image_policy(unwrapped))


def _unsharded(root: Any, work: Callable[[], Result], reshard_after_forward: bool) -> Result:
    """Run work as if it were the forward of an FSDP2 model, with every unit gathered from beginning to end.

    TRL leaves FSDP2 models as they are. Each unit would gather and free its weights at each call, 576 times an image;
    and a unit that is called before the root takes itself for the root.
    """
    units: list[Any] = [module for module in root.modules() if isinstance(module, FSDPModule)]
    results: list[Result] = []

    def forward() -> None:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        results.append(work())

    try:
        with mock.patch.object(root, "forward", forward):
            root()
    finally:
        for unit in units:
            unit.set_reshard_after_forward(reshard_after_forward, recurse=False)
            unit.reshard()
        # As fully_shard does: the root's weights are wanted again at once, by the backward pass.
        root.set_reshard_after_forward(False, recurse=False)
    return results[0]


def _forget_unused_renames(policy: Any) -> None:
    """Drop renames of old checkpoint formats that loading did not use.

    Saving reverts the list. Under ZeRO-3 transformers keeps all of it, and would write names that other tools do not
    know. Elsewhere it has done this itself.
    """
    conversions = getattr(policy, "_weight_conversions", None)
    if conversions is not None:
        policy._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]


@contextmanager
def _heads_as_fsdp2_wants_them(policy: Any) -> Iterator[None]:
    """Choose what accelerate takes for the output embeddings while it divides the policy into FSDP2's units.

    They become a unit of their own, or share one with the input embeddings where both hold the same parameter, which
    FSDP2 demands. An image policy would name its image head. That one has to stay in the root's unit: it is read
    without being called, so that a unit of its own would leave it sharded, in another precision than the reference's.
    And the tie, if there is one, is with the text head.

    Args:
        policy: The bare policy, not yet sharded.
    """
    embedding = policy.get_input_embeddings()
    tied = [
        module
        for module in policy.modules()
        if module is not embedding and any(p is embedding.weight for p in module.parameters(recurse=False))
    ]
    with mock.patch.object(policy, "get_output_embeddings", lambda: tied[0] if tied else None):
        yield
