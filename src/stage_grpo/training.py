"""A training run from its configuration: load, train, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoProcessor, TrainerCallback

from stage_grpo.config import StageConfig
from stage_grpo.data import load_rows, to_dataset
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.preflight import build_rewards, check_files
from stage_grpo.rewards.base import Reward
from stage_grpo.trainer import StageTrainer
from stage_grpo.types import PromptRow

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Linear layers of the language model alone: the vision tower has layers of the same names."""


def train(config: StageConfig, callbacks: list[TrainerCallback] | None = None) -> Path:
    """Run one training and save the policy.

    Args:
        config: The whole configuration.
        callbacks: Further callbacks.

    Returns:
        The output folder: weights and processor in transformers format beside the files of
        ``stage_grpo.run_folder``.

    Raises:
        ValueError: If something the run needs is not configured or does not fit.
    """
    for name in ("model", "train_prompts", "rewards"):
        if getattr(config, name) is None:
            raise ValueError(f"{name} is not set; give it in the YAML file or as --{name}")
    check_files(config)
    rewards = build_rewards(config)
    out = Path(str(config.output_dir))
    train_rows = load_rows(str(config.train_prompts))
    eval_rows = load_rows(config.eval_prompts) if config.eval_prompts else []
    _check_prompts(config, train_rows, eval_rows)
    policy = load_policy(str(config.model), config.dtype, config.attn_implementation)
    processor = AutoProcessor.from_pretrained(policy.config.name_or_path)  # saved last, but better missed first
    _try_rewards(rewards, [*train_rows, *eval_rows], policy.image_size)
    trainer = StageTrainer(
        policy,
        rewards,
        config,
        to_dataset(train_rows),
        to_dataset(eval_rows) if eval_rows else None,
        load_tokenizer(policy),
        callbacks,
        peft_config=_lora(config) if config.use_peft else None,
    )
    trainer.train()
    trainer.save_model(str(out))
    if trainer.accelerator.is_main_process:
        processor.save_pretrained(out)
    return out


def _check_prompts(config: StageConfig, train_rows: list[PromptRow], eval_rows: list[PromptRow]) -> None:
    # TRL leaves incomplete batches out, so that with too few prompts not one step would be taken.
    needed = (config.generation_batch_size or 0) // (config.num_generations or 1)
    if len(train_rows) < needed:
        raise ValueError(
            f"train_prompts={config.train_prompts!r} holds {len(train_rows)} prompts, but one rollout takes {needed}; "
            "add prompts, or lower per_device_train_batch_size"
        )
    if config.do_eval and not eval_rows:
        raise ValueError("eval_strategy asks for evaluations, but eval_prompts is not set; set it or eval_strategy=no")


def _try_rewards(rewards: list[Reward], rows: list[PromptRow], image_size: int) -> None:
    """Score a blank picture of one prompt of each kind: what a reward cannot read should show before a rollout."""
    kinds = {str(row.metadata.get("tag")): row for row in rows}
    for row in kinds.values():
        for reward in rewards:
            try:
                reward.score([Image.new("RGB", (image_size, image_size))], [row.prompt], [row.metadata])
            except ValueError as error:
                raise ValueError(f"reward {reward.name!r} cannot score the prompt {row.prompt!r}: {error}") from error


def _lora(config: StageConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=LORA_TARGETS
    )
