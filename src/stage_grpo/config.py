"""Everything a run can be told: one typed, early-validated config on top of TRL's.

Every field is a YAML key and a command-line flag of the same name. A method is a preset, and a preset is nothing but
values: each can be overridden alone, so every ablation is one value away.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
import yaml
from trl import GRPOConfig, TrlParser

from stage_grpo.policy.base import PROMPT_TEMPLATES
from stage_grpo.rewards.registry import build_reward
from stage_grpo.sampling import Sampling

_STAGE = {
    "entropy_reward_weight": 0.4,
    "entropy_reward_scope": "top",
    "entropy_reward_center": False,
    "entropy_loss_weight": 0.0,
    "reweight_advantages": True,
    "advantage_weight_normalization": "none",
    "reweight_kl": True,
    "kl_weight_form": "clipped",
    "kl_weight_a": 0.5,
    "kl_weight_b": 0.5,
    "kl_weight_clip": [0.0, 1.0],
    "kl_on_zero_variance": True,
    "min_reward_std": 1e-3,
}
PRESETS: dict[str, dict[str, Any]] = {
    # The equations of arXiv 2509.25027, with the guard against noise in tied groups.
    "paper": _STAGE,
    # What the authors' code computes: M normalised, entropy bonus centred on the tops' mean, no guard.
    "released": {
        **_STAGE,
        "advantage_weight_normalization": "group",
        "entropy_reward_center": True,
        "min_reward_std": 0.0,
    },
    # Plain GRPO.
    "grpo": {**_STAGE, "entropy_reward_weight": 0.0, "reweight_advantages": False, "reweight_kl": False},
}
"""What each preset gives to the fields that were left at ``None``."""

_CHOICES = {
    "entropy_reward_scope": ("top", "all"),
    "advantage_weight_normalization": ("none", "group"),
    "kl_weight_form": ("clipped", "graded"),
}

_UNSUPPORTED = {
    "use_vllm": (False, "vLLM has no image tokens and no guidance; the project's own rollout is used"),
    "use_transformers_continuous_batching": (False, "the project's own rollout is used"),
    "pad_to_multiple_of": (None, "all images have the same number of tokens"),
    "mask_truncated_completions": (False, "images have no end token, so every one would be masked"),
    "generation_kwargs": (None, "set guidance_scale, temperature, top_k, top_p or min_p instead"),
    "repetition_penalty": (1.0, "it has no meaning for image codes"),
    "log_completions": (False, "completions are image codes; set sample_steps to see images instead"),
}
"""TRL options that make no sense for images: value that must stay, and why."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class StageConfig(GRPOConfig):
    """Configuration of one training run. Fields not listed here are those of ``trl.GRPOConfig``.

    Fields left at ``None`` take the value of the ``preset``.

    Raises:
        ValueError: If a value, or a combination of values, cannot work; the message names field, value and remedy.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*GRPOConfig._VALID_DICT_FIELDS, "reward_options"]

    # Model and data
    model: str | None = _option(None, "Checkpoint folder in transformers format, or hub name.")
    dtype: str = _option("float32", "Dtype of the weights: float32 or bfloat16.")
    attn_implementation: str | None = _option(None, "Attention kernel, as in transformers; None chooses.")
    train_prompts: str | None = _option(None, "Prompt file to train on: .txt, .jsonl or .csv.")
    eval_prompts: str | None = _option(None, "Prompt file to evaluate on during training.")
    prompt_template: str = _option("janus", "Text around a prompt: janus (DeepSeek's) or t2i_r1.")
    image_size: int | None = _option(None, "Expected image size in pixels; checked against the checkpoint.")

    # LoRA
    use_peft: bool = _option(False, "Train LoRA adapters; the reference is the model without them.")
    lora_r: int = _option(16, "Rank of the adapters.")
    lora_alpha: int = _option(32, "Scale of the adapters.")
    lora_dropout: float = _option(0.0, "Dropout of the adapters.")

    # Rewards
    rewards: list[str] | None = field(
        default=None, metadata={"help": "Names of rewards, or module:function of your own."}
    )
    reward_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options by reward name, e.g. {shapes: {strict: true}}."}
    )

    # Sampling
    guidance_scale: float = _option(5.0, "Classifier-free guidance while sampling; 1 is none.")
    guidance_in_scoring: bool = _option(False, "Score the guided distribution, the one that is sampled.")
    rollout_memory_gb: float | None = _option(None, "Memory of one chunk of a rollout, GB; None: from free memory.")

    # Method
    preset: str = _option("paper", "paper, released or grpo: values for the fields left at None.")
    entropy_reward_weight: float | None = _option(None, "lambda of the entropy reward; 0 switches it off.")
    entropy_reward_scope: str | None = _option(None, "Samples that receive it: top of the group, or all.")
    entropy_reward_center: bool | None = _option(None, "Subtract the mean over the group's top samples.")
    entropy_loss_weight: float | None = _option(None, "Weight of the entropy gap as a loss (Eq. 13, 14).")
    reweight_advantages: bool | None = _option(None, "Multiply advantages by M (Eq. 7, 8).")
    advantage_weight_normalization: str | None = _option(None, "none (the paper) or group (the released code).")
    reweight_kl: bool | None = _option(None, "Multiply the KL of each token by its similarity weight.")
    kl_weight_form: str | None = _option(None, "clipped (the paper) or graded.")
    kl_weight_a: float | None = _option(None, "a of the KL weight.")
    kl_weight_b: float | None = _option(None, "b of the KL weight.")
    kl_weight_clip: list[float] | None = field(
        default=None, metadata={"help": "Bounds of Sim + 1 in the clipped KL weight."}
    )
    kl_on_zero_variance: bool | None = _option(None, "Whether groups without an advantage still feel the KL.")
    min_reward_std: float | None = _option(None, "Groups whose rewards spread no more get advantage 0.")

    # Logging
    sample_steps: int = _option(10, "Save a grid of sampled images every so many steps; 0 never.")
    logging_steps: float = _option(1, "Log every so many steps.")

    # Defaults of TRL that differ here
    beta: float = _option(0.03, "KL coefficient.")
    learning_rate: float = _option(5e-6, "Initial learning rate.")
    loss_type: str = _option("grpo", "Loss of TRL; images have equal lengths, so grpo and dapo agree.")
    use_bias_correction_kl: bool = _option(False, "TRL's ratio on the KL; the published objective has none.")
    max_completion_length: int | None = _option(None, "Image tokens; taken from the checkpoint.")

    def __post_init__(self) -> None:
        """Resolve the preset and check everything that can be checked without the model."""
        self._resolve_preset()
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.fp16
        # Pinned memory exists for GPUs alone; elsewhere torch only warns.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self._check_groups()
        super().__post_init__()
        self._check_values()
        self._check_method()
        self._check_rewards()
        self._check_paths()

    @property
    def sampling(self) -> Sampling:
        """How images are drawn."""
        return Sampling(self.guidance_scale, self.temperature, self.top_k, self.top_p, self.min_p or 0.0)

    def _resolve_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is unknown; use one of {', '.join(PRESETS)}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _check_groups(self) -> None:
        for name in ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    def _check_values(self) -> None:
        _ = self.sampling
        for name, (value, why) in _UNSUPPORTED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported for image policies: {why}")
        for name, names in {**_CHOICES, "prompt_template": tuple(PROMPT_TEMPLATES)}.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(names)}")
        for name in ("beta", "entropy_reward_weight", "entropy_loss_weight", "min_reward_std", "sample_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r} is not supported; use float32 or bfloat16")
        if self.rollout_memory_gb is not None and self.rollout_memory_gb <= 0:
            raise ValueError(f"rollout_memory_gb={self.rollout_memory_gb} must be above 0, or None to choose")

    def _check_method(self) -> None:
        for name in ("entropy_reward_weight", "entropy_loss_weight"):
            if getattr(self, name) > 0 and self.beta == 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs the reference policy's entropy, but beta=0 loads no "
                    f"reference; set beta above 0 or {name}=0"
                )
        if self.kl_weight_clip is None or len(self.kl_weight_clip) != 2:
            raise ValueError(f"kl_weight_clip={self.kl_weight_clip} must be two numbers, lower and upper")
        if self.kl_weight_clip[0] > self.kl_weight_clip[1]:
            raise ValueError(f"kl_weight_clip={self.kl_weight_clip} must be in order, lower before upper")

    def _check_rewards(self) -> None:
        # A YAML list stays a list; the command line gives one string when there is one name.
        given: Any = self.rewards or []
        names = [given] if isinstance(given, str) else list(given)
        self.rewards = names or None
        options = self.reward_options or {}
        if not isinstance(options, dict):
            raise ValueError(f"reward_options={options!r} must map reward names to their options")
        for name in options:
            if name not in names:
                raise ValueError(f"reward_options names {name!r}, which is not among rewards={names}")
        for name in names:
            build_reward(name, options.get(name))
        if names and self.reward_weights is not None and len(self.reward_weights) != len(names):
            raise ValueError(f"reward_weights={self.reward_weights} must have one weight for each of rewards={names}")

    def _check_paths(self) -> None:
        for name in ("train_prompts", "eval_prompts"):
            value = getattr(self, name)
            if value is not None and not Path(value).is_file():
                raise ValueError(f"{name}={value!r} is not a readable file; give a .txt, .jsonl or .csv of prompts")

    def to_json(self) -> dict[str, Any]:
        """The resolved values as plain JSON data, for the run folder."""
        return json.loads(self.to_json_string())


class OneLineParser(TrlParser):
    """TRL's parser of YAML files and flags, reporting an error as ``ValueError`` instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the message.

        Raises:
            ValueError: Always.
        """
        raise ValueError(message)


def parse_config(program: str, words: Sequence[str]) -> StageConfig:
    """Read a configuration from ``[FILE.yaml] [--key value ...]``.

    Args:
        program: Name of the command, for its help.
        words: Command-line words; a first word that is no flag is the YAML file.

    Raises:
        ValueError: If the file cannot be read or is not a YAML mapping, a key is unknown, or a value is wrong.
    """
    words = list(words)
    if words and not words[0].startswith("-"):
        words[:1] = ["--config", words[0]]
    config_class: Any = StageConfig
    parser = OneLineParser(config_class, prog=program, usage="%(prog)s [CONFIG.yaml] [--KEY VALUE ...]")
    try:
        (config,) = parser.parse_args_and_config(words)
    except yaml.YAMLError as error:
        raise ValueError(f"{words[1]} is not valid YAML: {error}") from error
    except TypeError as error:
        raise ValueError(f"a value has the wrong type: {error}") from error
    return config
