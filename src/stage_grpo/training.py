"""A training run from its configuration: load, train, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, TrainerCallback

from stage_grpo.config import StageConfig
from stage_grpo.data import load_rows, to_dataset
from stage_grpo.policy import load_policy, load_tokenizer
from stage_grpo.rewards.registry import build_reward
from stage_grpo.trainer import StageTrainer

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
    out = Path(str(config.output_dir))
    train_dataset = to_dataset(load_rows(str(config.train_prompts)))
    eval_dataset = to_dataset(load_rows(config.eval_prompts)) if config.eval_prompts else None
    rewards = [build_reward(name, _options(config).get(name)) for name in config.rewards or []]
    policy = load_policy(str(config.model), config.dtype, config.attn_implementation)
    trainer = StageTrainer(
        policy,
        rewards,
        config,
        train_dataset,
        eval_dataset,
        load_tokenizer(policy),
        callbacks,
        peft_config=_lora(config) if config.use_peft else None,
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(str(out))
    if trainer.accelerator.is_main_process:
        AutoProcessor.from_pretrained(str(config.model)).save_pretrained(out)
    return out


def _options(config: StageConfig) -> dict[str, Any]:
    return config.reward_options if isinstance(config.reward_options, dict) else {}


def _lora(config: StageConfig) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=LORA_TARGETS
    )
