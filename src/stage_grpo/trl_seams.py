"""Where TRL and an image policy meet: the rollout function, the reference's class, the completed arguments.

``tests/test_trl_seams.py`` states what is relied on, and fails with a readable message when TRL changes it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

from peft import PeftModel
from PIL import Image
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer
from trl.trainer.utils import create_model_from_path

from stage_grpo.config import StageConfig
from stage_grpo.policy.base import ImagePolicy
from stage_grpo.rollout import decode_images, rollout
from stage_grpo.sampling import image_uniforms

if TYPE_CHECKING:
    from stage_grpo.trainer import StageTrainer

ENTROPY_REWARD = "entropy"
"""Name of the entropy reward's column among the reward functions."""


def image_policy(model: Any) -> Any:
    """Return the :class:`ImagePolicy` inside a possible PEFT wrapper."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def sample_images(prompts: list[str], trainer: StageTrainer) -> dict[str, Any]:
    """TRL's ``rollout_func``: sample and decode one image a prompt.

    Returns:
        ``prompt_ids``, ``completion_ids`` (codes) and ``logprobs`` as TRL asks, and for the rewards
        ``generated_images`` (PIL, RGB) and ``policy_entropy`` (mean over the image's tokens, nats).
    """
    args: Any = trainer.args
    outline = image_policy(trainer.accelerator.unwrap_model(trainer.model))
    prompt_ids = outline.encode_prompts(trainer.processing_class, prompts, args.prompt_template)
    uniforms = image_uniforms(trainer.rollout_keys(len(prompts)), outline.num_image_tokens)
    budget = None if args.rollout_memory_gb is None else int(args.rollout_memory_gb * 1e9)
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    ) as unwrapped:
        policy = image_policy(unwrapped)
        with trainer.timed("rollout"), trainer.accelerator.autocast():
            sampled = rollout(policy, prompt_ids, uniforms, args.sampling, budget)
        with trainer.timed("decode"):
            images = [Image.fromarray(pixels) for pixels in decode_images(policy, sampled.codes, budget)]
    guided = args.guidance_in_scoring
    entropies = sampled.guided_entropies if guided else sampled.entropies
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": sampled.codes.tolist(),
        "logprobs": (sampled.guided_logps if guided else sampled.logps).tolist(),
        "generated_images": images,
        "policy_entropy": entropies.mean(dim=1).tolist(),
    }


@contextmanager
def reference_of(policy: ImagePolicy) -> Iterator[None]:
    """Let TRL build the reference as a policy of the same class.

    TRL looks the class up in the checkpoint's config, which names the plain transformers model: that one would score
    image codes with the text head, silently.
    """
    policy_class: Any = type(policy)
    build = partial(create_model_from_path, architecture=policy_class)
    with mock.patch.object(grpo_trainer, "create_model_from_path", build):
        yield


def entropy_placeholder(prompts: list[str], **_: Any) -> list[float]:
    """Keep a column for the entropy reward, which needs all others and is filled in after they are gathered."""
    return [0.0] * len(prompts)


entropy_placeholder.__name__ = ENTROPY_REWARD


def complete_args(args: StageConfig, policy: ImagePolicy, num_rewards: int) -> StageConfig:
    """Complete the arguments with what the checkpoint and the method decide."""
    args = copy.copy(args)
    args.max_completion_length = policy.num_image_tokens
    # TRL would cast the *text* head; scoring runs the image head in float32 in any case.
    args.cast_lm_head_to_fp32 = False
    if args.entropy_reward_weight:
        args.reward_weights = [*(args.reward_weights or [1.0] * num_rewards), args.entropy_reward_weight]
    return args


def check_policy(policy: Any, args: StageConfig) -> None:
    """Refuse a policy that does not fit the arguments.

    Raises:
        ValueError: If it is no image policy, makes other images than asked for, or cannot be loaded as reference.
    """
    if not isinstance(policy, ImagePolicy):
        raise ValueError(
            f"model is a {type(policy).__name__}, not an ImagePolicy; load it with JanusPolicy.from_pretrained"
        )
    if args.max_completion_length not in (None, policy.num_image_tokens):
        raise ValueError(
            f"max_completion_length={args.max_completion_length}, but this checkpoint makes images of "
            f"{policy.num_image_tokens} tokens; leave it unset"
        )
    if args.image_size not in (None, policy.image_size):
        raise ValueError(
            f"image_size={args.image_size}, but this checkpoint makes images of {policy.image_size} px "
            f"({policy.num_image_tokens} tokens); use another checkpoint or leave image_size unset"
        )
    if args.beta != 0 and not policy.config.name_or_path:
        raise ValueError(
            "the reference policy is loaded from where the policy came from, and this one came from memory; "
            "save it with save_pretrained and load it again, or set beta=0"
        )
