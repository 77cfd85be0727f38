"""How much a run does: images, tokens, operations, bytes on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from stage_grpo.config import StageConfig
from stage_grpo.data import load_rows
from stage_grpo.planning.setting import Setting


@dataclass(frozen=True)
class Work:
    """What a run does. Operations are those of matrix products, a multiplication and an addition counting as two.

    Attributes:
        num_steps: Optimizer steps; None if they follow from a prompt file that is not there.
        images_per_rollout: Images that all processes sample at a time.
        prompts_per_rollout: Groups of them.
        rollouts_per_step: Below 1 where a rollout serves several steps.
        rollout_flops: Operations to sample images, of a step in the mean, as those below.
        reference_flops: Operations to score them with the reference.
        update_flops: Operations of forward and backward passes over them.
        checkpoint_bytes: Size of one checkpoint.
        num_checkpoints: Checkpoints that stand on the disk at most, the one being written among them.
        weights_bytes: Size of the weights alone.
        final_bytes: Size of the weights that the run leaves: the last, the best, and for a moment the one before it.
    """

    num_steps: int | None
    images_per_rollout: int
    prompts_per_rollout: int
    rollouts_per_step: Fraction
    rollout_flops: int
    reference_flops: int
    update_flops: int
    checkpoint_bytes: int
    num_checkpoints: int
    weights_bytes: int
    final_bytes: int

    @property
    def images_per_step(self) -> Fraction:
        """Images that are sampled for one step, in the mean."""
        return self.images_per_rollout * self.rollouts_per_step

    @property
    def prompts_per_step(self) -> Fraction:
        """Groups of them."""
        return self.prompts_per_rollout * self.rollouts_per_step

    @property
    def num_rollouts(self) -> int | None:
        """Rollouts of the run."""
        return None if self.num_steps is None else math.ceil(self.num_steps * self.rollouts_per_step)

    @property
    def flops_per_step(self) -> int:
        """All operations of a step."""
        return self.rollout_flops + self.reference_flops + self.update_flops

    @property
    def disk_bytes(self) -> int:
        """What the output folder may take."""
        return self.num_checkpoints * self.checkpoint_bytes + self.final_bytes


def work(run: Setting) -> Work:
    """Count the work of a run."""
    config = run.config
    images = run.num_gpus * run.num_rollout_rows
    prompts = images // int(config.num_generations or 1)
    rollouts = Fraction(config.gradient_accumulation_steps, _passes_of_rollout(run))
    image_flops = forward_flops(run)
    passes = 2 if config.use_peft else 3  # weights that are not trained need no gradient of their own
    recomputed = 1 if config.gradient_checkpointing else 0
    steps = _num_steps(run, prompts)
    weights = _weights_on_disk(run)
    return Work(
        num_steps=steps,
        images_per_rollout=images,
        prompts_per_rollout=prompts,
        rollouts_per_step=rollouts,
        rollout_flops=int(rollouts * (images * decode_flops(run) + prompts * prefill_flops(run))),
        reference_flops=int(rollouts * images * image_flops) if config.beta != 0 else 0,
        update_flops=int(rollouts * images * config.num_iterations * image_flops * (passes + recomputed)),
        checkpoint_bytes=_checkpoint_bytes(run),
        num_checkpoints=_num_checkpoints(run, steps),
        weights_bytes=weights,
        final_bytes=weights * (3 if config.heldout_benchmark and config.keep_best else 1),
    )


def _passes_of_rollout(run: Setting) -> int:
    """Passes of a process over its batch that one rollout serves."""
    return int(run.config.steps_per_generation or 1) * run.config.num_iterations


def _branches(run: Setting) -> int:
    return 2 if run.config.guidance_scale != 1 else 1


def _attention(run: Setting, num_queries: int, num_keys: int) -> int:
    """Scores and sums of all layers. The masks of padded prompts hide no work from the kernels."""
    return 4 * run.sizes.text.num_hidden_layers * run.sizes.attention_width * num_queries * num_keys


def prefill_flops(run: Setting) -> int:
    """Operations to run one prompt, in all branches of the guidance, before its images are sampled."""
    tokens = run.num_prompt_tokens
    return _branches(run) * (2 * run.sizes.layers_matmul * tokens + _attention(run, tokens, tokens))


def decode_flops(run: Setting) -> int:
    """Operations to sample one image after its prompt, in all branches of the guidance.

    The last code is not fed again; every code is drawn from the image head.
    """
    sizes, tokens = run.sizes, run.sizes.policy.num_image_tokens
    fed = 2 * (sizes.layers_matmul + sizes.code_matmul) * (tokens - 1)
    lengths = range(run.num_prompt_tokens + 1, run.num_prompt_tokens + tokens)
    return _branches(run) * (fed + 2 * sizes.head_matmul * tokens + _attention(run, 1, sum(lengths)))


def forward_flops(run: Setting) -> int:
    """Operations to score one image once: prompt and codes through the language model, codes through the head."""
    sizes, tokens = run.sizes, run.sizes.policy.num_image_tokens
    last = run.sizes.policy.get_output_embeddings().weight.numel()
    fed = run.sequence - 1  # the last code predicts nothing
    branch = 2 * sizes.layers_matmul * fed + 2 * sizes.code_matmul * (tokens - 1)
    branch += 2 * (sizes.head_matmul - last) * tokens
    # Guidance mixes the inputs of the head's last layer, which therefore runs once.
    return run.branches_scored * (branch + _attention(run, fed, fed)) + 2 * last * tokens


def _num_steps(run: Setting, prompts_per_rollout: int) -> int | None:
    config = run.config
    if config.max_steps > 0:
        return config.max_steps
    try:
        num_prompts = len(load_rows(str(config.train_prompts)))
    except ValueError:
        return None
    passes = num_prompts // prompts_per_rollout * _passes_of_rollout(run)  # prompts that fill no rollout are left out
    return math.ceil(config.num_train_epochs * math.ceil(passes / config.gradient_accumulation_steps))


def _weights_on_disk(run: Setting) -> int:
    if run.config.use_peft:
        return run.trainable * run.trainable_bytes
    return run.trainable * run.trainable_bytes + run.frozen * run.frozen_bytes


def _checkpoint_bytes(run: Setting) -> int:
    """Weights and averages, and unless ``save_only_model`` the optimizer; the rest is a few megabytes.

    DeepSpeed writes, beside the whole weights and its optimizer's float32 states, the parameters that it holds: all of
    them in ZeRO-2, the frozen ones in ZeRO-3, of adapters only the adapters.
    """
    trained = run.trainable * run.trainable_bytes
    frozen = 0 if run.config.use_peft else run.frozen * run.frozen_bytes
    averages = 4 * run.trainable if run.config.ema_decay is not None else 0
    size = _weights_on_disk(run) + averages
    if run.config.save_only_model:
        return size
    if not run.is_zero:
        return size + 2 * trained
    return size + 12 * run.trainable + frozen + (trained if run.parallel == "zero2" else 0)


def _num_checkpoints(run: Setting, num_steps: int | None) -> int:
    config = run.config
    if config.save_strategy == "no":
        return 0
    written = math.ceil(num_steps / steps_between_saves(config, num_steps)) if num_steps else 1
    goes_back = config.guard == "rollback"
    written += goes_back  # checkpoint-0
    # Beside those of the limit the one being written, and the one of the best held-out test.
    beside = 1 + (goes_back and config.heldout_benchmark is not None)
    return written if config.save_total_limit is None else min(config.save_total_limit + beside, written)


def steps_between_saves(config: StageConfig, num_steps: int | None) -> float:
    """Optimizer steps from one checkpoint to the next; at least 1."""
    return config.save_steps if config.save_steps >= 1 else max(1, config.save_steps * (num_steps or 0))
