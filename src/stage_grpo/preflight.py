"""What a run needs of this machine before it starts: files and rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage_grpo.config import StageConfig
from stage_grpo.rewards.base import Reward
from stage_grpo.rewards.registry import build_reward


def check_files(config: StageConfig) -> None:
    """Refuse paths that cannot be what they should be.

    Raises:
        ValueError: If a path is missing or of the wrong kind; the message names key, path and remedy.
    """
    for name in ("train_prompts", "eval_prompts"):
        value = getattr(config, name)
        if value is not None and not Path(value).is_file():
            raise ValueError(f"{name}={value!r} is not a readable file; give a .txt, .jsonl or .csv of prompts")
    if config.output_dir and Path(config.output_dir).is_file():
        raise ValueError(f"output_dir={config.output_dir!r} is a file; name a folder, which need not exist")


def build_rewards(config: StageConfig) -> list[Reward]:
    """Build the rewards of a run, each with its options.

    Raises:
        ValueError: If a reward is unknown or cannot be imported, or rejects its options.
    """
    options: dict[str, Any] = config.reward_options if isinstance(config.reward_options, dict) else {}
    return [build_reward(name, options.get(name)) for name in config.rewards or []]
