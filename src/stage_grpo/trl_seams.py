"""Where TRL and an image policy meet: the rollout function, the reference's class, the completed arguments.

``tests/test_trl_seams.py`` states what is relied on, and fails with a readable message when TRL changes it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftConfig
from PIL import Image
from torch import Tensor
from trl.trainer import grpo_trainer
from trl.trainer.utils import create_model_from_path

from stage_grpo.config import StageConfig
from stage_grpo.gathering import with_whole_weights
from stage_grpo.planning.setting import LORA_TARGETS
from stage_grpo.policy.base import ImagePolicy
from stage_grpo.policy.loading import load_policy
from stage_grpo.rollout import Rollout, decode_images, rollout
from stage_grpo.run_folder import StepSamples
from stage_grpo.sampling import image_uniforms
from stage_grpo.weighting.base import TokenBatch

if TYPE_CHECKING:
    from stage_grpo.trainer import StageTrainer

# TRL prints everything it knows of a sample without a score, tensors included; the reward has said why it has none.
logging.getLogger(grpo_trainer.__name__).addFilter(
    lambda record: "All reward functions returned None" not in str(record.msg)
)

ENTROPY_REWARD = "entropy"
"""Name of the entropy reward's column among the reward functions."""


def sample_images(prompts: list[str], trainer: StageTrainer) -> dict[str, Any]:
    """TRL's ``rollout_func``: sample and decode one image a prompt.

    Returns:
        ``prompt_ids``, ``completion_ids`` (codes) and ``logprobs`` as TRL asks, and for the rewards
        ``generated_images`` (PIL, RGB) and ``policy_entropy`` (mean over the image's tokens, nats). The trainer
        weighs tokens by ``code_vectors`` ((T, D), float32), read here because the codebook may be sharded, and
        ``policy_entropies`` ((T,), nats).
    """
    args: Any = trainer.args
    outline = trainer.policy  # its weights may be spread over processes
    prompt_ids = outline.encode_prompts(trainer.processing_class, prompts, args.prompt_template)
    uniforms = image_uniforms(trainer.rollout_keys(len(prompts)), outline.num_image_tokens)
    budget = None if args.rollout_memory_gb is None else int(args.rollout_memory_gb * 1e9)
    guided = args.guidance_in_scoring

    def draw(policy: Any) -> tuple[Rollout, list[Image.Image], Tensor]:
        with trainer.timed("rollout"), trainer.accelerator.autocast():
            record = "guided" if guided else "conditional"
            sampled = rollout(policy, prompt_ids, uniforms, args.sampling, budget, record)
        with trainer.timed("decode"):
            images = [Image.fromarray(pixels) for pixels in decode_images(policy, sampled.codes, budget)]
        return sampled, images, policy.code_vectors(sampled.codes)

    sampled, images, vectors = with_whole_weights(trainer, draw)
    # Not before the gathered weights are let go: rewards need memory of their own.
    trainer.reward_threads.start(images, prompts)
    entropies = sampled.guided_entropies if guided else sampled.entropies
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": sampled.codes.tolist(),
        "logprobs": (sampled.guided_logps if guided else sampled.logps).tolist(),
        "generated_images": images,
        "policy_entropy": entropies.mean(dim=1).tolist(),
        "policy_entropies": list(entropies),
        "code_vectors": list(vectors),
    }


def token_batch(
    trainer: StageTrainer, rows: list[dict[str, Any]], output: dict[str, Any], rewards: Tensor, num_generations: int
) -> TokenBatch:
    """Gather what a token weighting may look at: the images of all processes.

    Args:
        trainer: The trainer.
        rows: This process's samples with what :func:`sample_images` told of them.
        output: What TRL made of them.
        rewards: Weighted sums of the rewards of all processes' samples, (N,).
        num_generations: G.
    """
    gather: Any = trainer.accelerator.gather
    ref_logps = output.get("ref_per_token_logps")
    return TokenBatch(
        code_vectors=gather(torch.stack([row["code_vectors"] for row in rows])),
        codes=gather(output["completion_ids"]),
        advantages=gather(output["advantages"]),
        rewards=rewards,
        entropies=gather(torch.stack([row["policy_entropies"] for row in rows])),
        logps=gather(output["sampling_per_token_logps"]),
        num_generations=num_generations,
        grid=trainer.policy.grid,
        step=trainer.state.global_step,
        ref_logps=None if ref_logps is None else gather(ref_logps),
    )


def step_samples(
    trainer: StageTrainer, rows: list[dict[str, Any]], weights: dict[str, Tensor], rewards: Tensor, group: int
) -> StepSamples:
    """This process's images of a step, for the run folder.

    Args:
        trainer: The trainer.
        rows: As in :func:`token_batch`.
        weights: Advantages and weights of this process's tokens.
        rewards: As in :func:`token_batch`.
        group: G.
    """
    first = trainer.accelerator.process_index * len(rows)
    return StepSamples(
        prompts=[row["prompt"] for row in rows],
        images=[row["generated_images"] for row in rows],
        rewards=rewards[first : first + len(rows)].tolist(),
        advantages=weights["advantages"].float().reshape(len(rows), -1).mean(dim=1).tolist(),
        grid=trainer.policy.grid,
        weights=weights["advantage_weights"].tolist() if "advantage_weights" in weights else None,
        num_generations=group,
    )


@contextmanager
def reference_of(policy: ImagePolicy, ref_model: str | None = None, synced: bool = False) -> Iterator[None]:
    """Let TRL build the reference as a policy of the same class.

    TRL looks the class up in the checkpoint's config, which names the plain transformers model: that one would score
    image codes with the text head, silently.

    Args:
        policy: The policy that is trained.
        ref_model: Checkpoint of the reference, as :func:`stage_grpo.policy.load_policy` takes it; None: the one that
            the policy came from.
        synced: Whether weights of the policy will be mixed into the reference, so that all shapes must agree.

    Raises:
        ValueError: Inside, when the reference is built: if it cannot be loaded or is no model of the same images.
    """
    policy_class: Any = type(policy)

    def build(source: str, **options: Any) -> Any:
        if ref_model is None:
            reference = create_model_from_path(source, architecture=policy_class, **options)
        else:
            reference = _load_reference(ref_model, options.get("dtype", "float32"), options.get("attn_implementation"))
            check_reference(reference, policy, ref_model, synced)
        # Guided scoring blanks prompts with the pad token, which the policy may owe to its tokenizer.
        reference.config.get_text_config().pad_token_id = policy.config.get_text_config().pad_token_id
        return reference

    with mock.patch.object(grpo_trainer, "create_model_from_path", build):
        yield


def _load_reference(ref_model: str, dtype: Any, attn_implementation: str | None) -> Any:
    try:
        return load_policy(ref_model, dtype, attn_implementation)
    except ValueError as error:
        raise ValueError(f"ref_model={ref_model!r} cannot be the reference policy: {error}") from error


def check_reference(reference: ImagePolicy, policy: ImagePolicy, ref_model: str, synced: bool = False) -> None:
    """Refuse a reference whose log-probabilities would not be of the policy's prompts and images.

    Args:
        reference: The reference as loaded.
        policy: The policy that is trained.
        ref_model: Where the reference came from, for the message.
        synced: As in :func:`reference_of`.

    Raises:
        ValueError: If the two differ in family, codebook size, number of image tokens or vocabulary size; for a synced
            reference, in any shape.
    """
    sizes = [_sizes(reference, synced), _sizes(policy, synced)]
    for name in dict.fromkeys([*sizes[1], *sizes[0]]):
        found, wanted = (size.get(name, "none") for size in sizes)
        if found != wanted:
            raise ValueError(
                f"ref_model={ref_model!r} does not go with the policy {policy.config.name_or_path!r}: its {name} is "
                f"{found}, that of the policy {wanted}; give a checkpoint of the same family and sizes"
            )


def _sizes(policy: ImagePolicy, with_parameters: bool) -> dict[str, Any]:
    sizes = {
        "class": type(policy).__name__,
        "codebook size": policy.get_output_embeddings().out_features,
        "number of image tokens": policy.num_image_tokens,
        "vocabulary size": policy.config.get_text_config().vocab_size,
    }
    if with_parameters:  # under ZeRO-3 the shape of a parameter is kept apart from what this process holds of it
        named: Any = policy
        sizes |= {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named.named_parameters()}
    return sizes


def entropy_placeholder(prompts: list[str], **_: Any) -> list[float]:
    """Keep a column for the entropy reward, which needs all others and is filled in after they are gathered."""
    return [0.0] * len(prompts)


entropy_placeholder.__name__ = ENTROPY_REWARD


def lora_config(args: StageConfig) -> LoraConfig:
    """The adapters that ``use_peft`` stands for."""
    return LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=LORA_TARGETS
    )


def chosen_adapters(model: Any, args: StageConfig, peft_config: PeftConfig | None) -> PeftConfig | None:
    """The adapters to add to a model: those that are given, else those of the arguments, if any.

    Raises:
        ValueError: If a reference is named, which with adapters would not be used.
    """
    if peft_config is None and args.use_peft:
        peft_config = lora_config(args)
    if args.ref_model is not None and (peft_config is not None or is_peft_model(model)):
        raise ValueError(
            f"ref_model={args.ref_model!r} does not go with adapters, whose reference is the model without them; "
            "leave ref_model out, or train without adapters"
        )
    return peft_config


def complete_args(args: StageConfig, policy: ImagePolicy, reward_names: Sequence[str]) -> StageConfig:
    """Complete the arguments with what the checkpoint and the method decide.

    Raises:
        ValueError: If a reward has the name of the entropy reward beside it.
    """
    args = copy.copy(args)
    args.max_completion_length = policy.num_image_tokens
    # TRL would cast the *text* head; scoring runs the image head in float32 in any case.
    args.cast_lm_head_to_fp32 = False
    if args.reward_aggregation == "normalize_then_sum":
        args.multi_objective_aggregation = "normalize_then_sum"
    if args.entropy_reward_weight:
        if ENTROPY_REWARD in reward_names:
            raise ValueError(
                f"a reward is called {ENTROPY_REWARD!r}, as is the entropy reward beside it, and both would be logged "
                "as one; give it another name, or set entropy_reward_weight=0"
            )
        args.reward_weights = [*(args.reward_weights or [1.0] * len(reward_names)), args.entropy_reward_weight]
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
    if args.beta != 0 and args.ref_model is None and not policy.config.name_or_path:
        raise ValueError(
            "the reference policy is loaded from where the policy came from, and this one came from memory; "
            "name its checkpoint as ref_model, save it with save_pretrained and load it again, or set beta=0"
        )
