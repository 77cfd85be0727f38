"""Everything a run can be told: one typed, early-validated config on top of TRL's.

Every field is a YAML key and a command-line flag of the same name. A method is a preset, and a preset is nothing but
values: each can be overridden alone, so every ablation is one value away.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from trl import GRPOConfig

from stage_grpo import guard_options, heldout_plan, micro_batches
from stage_grpo.config_parsing import OneLineParser, check_names, read_mapping
from stage_grpo.config_types import check_types
from stage_grpo.policy.base import PROMPT_TEMPLATES
from stage_grpo.presets import CHOICES, NOT_NEGATIVE, PRESETS, UNSUPPORTED
from stage_grpo.sampling import Sampling
from stage_grpo.weighting import options as weighting

logger = logging.getLogger(__name__)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class StageConfig(guard_options.GuardOptions, weighting.WeightingOptions, GRPOConfig):
    """Configuration of one training run. Fields not listed here are those of ``trl.GRPOConfig``.

    Fields left at ``None`` take the value of the ``preset``.

    Raises:
        ValueError: If a value, or a combination of values, cannot work; the message names field, value and remedy.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *GRPOConfig._VALID_DICT_FIELDS, "reward_options", "heldout_reward_options", "token_weighting_options"
    ]  # fmt: skip

    # Model and data
    model: str | None = _option(None, "Checkpoint folder in transformers format, or hub name.")
    dtype: str = _option("float32", "Dtype of the weights: float32 or bfloat16.")
    attn_implementation: str | None = _option(None, "Attention kernel, as in transformers; None chooses.")
    train_prompts: str | None = _option(None, "Prompt file to train on: .txt, .jsonl or .csv.")
    eval_prompts: str | None = _option(None, "Prompt file to evaluate on during training.")
    prompt_template: str = _option("janus", "Text around a prompt: janus (DeepSeek's) or t2i_r1.")
    image_size: int | None = _option(None, "Expected image size in pixels; checked against the checkpoint.")

    # Reference policy and averaged weights
    ref_model: str | None = _option(None, "Checkpoint of the reference policy; None: the one trained from.")
    ema_decay: float | None = _option(None, "Keep an exponential moving average of the weights, e.g. 0.999.")

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

    reward_aggregation: str = _option(
        "weighted_sum", "weighted_sum, normalize_then_sum (in the group), or running: by each one's usual spread."
    )
    overlap_rewards: bool | None = _option(None, "Rewards beside the reference's forward; None: yes on a GPU.")

    # Sampling
    guidance_scale: float = _option(5.0, "Classifier-free guidance while sampling; 1 is none.")
    guidance_in_scoring: bool = _option(False, "Score the guided distribution, the one that is sampled.")
    share_prompts: bool = _option(True, "Score a group with its prompt run once, where weights are whole.")
    micro_batch_size: int | str | None = _option(None, "Images in one pass of an update, or auto; None: the batch.")
    rollout_memory_gb: float | None = _option(None, "Memory of one chunk of a rollout, GB; None: from free memory.")

    # Method
    preset: str = _option("paper", "paper, released or grpo: values for the fields left at None.")
    entropy_reward_weight: float | None = _option(None, "lambda of the entropy reward; 0 switches it off.")
    entropy_reward_scope: str | None = _option(None, "Samples that receive it: top of the group, or all.")
    entropy_reward_center: bool | None = _option(None, "Subtract the mean over the group's top samples.")
    entropy_loss_weight: float | None = _option(None, "Weight of the entropy gap as a loss (Eq. 13, 14).")
    kl_on_zero_variance: bool | None = _option(None, "Whether groups without an advantage still feel the KL.")
    min_reward_std: float | None = _option(None, "Groups whose rewards spread no more get advantage 0.")

    # Held-out evaluation
    heldout_benchmark: str | None = _option(None, "Benchmark to test on while training, e.g. geneval; None: no test.")
    heldout_prompts: str | None = _option(None, "Its prompt file or folder; None: the official prompts.")
    heldout_steps: int = _option(50, "Test at step 0, every so many steps, and at the end.")
    heldout_measure: str | None = _option(None, "Measure to follow; None: the benchmark's headline.")
    heldout_num_images: int = _option(1, "Images of each prompt.")
    heldout_guidance_scale: float | None = _option(None, "Guidance of these images; None: as in training.")
    heldout_reward_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options by name of the rewards that score the test."}
    )
    heldout_keep_images: bool = _option(False, "Keep the images of all tests: not of the first, best and last alone.")
    keep_best: bool = _option(True, "Keep the policy that tested best in output_dir/best.")

    # Resuming
    resume: str = _option("auto", "auto (newest whole checkpoint of output_dir), a checkpoint folder, or never.")

    # Logging
    sample_steps: int = _option(10, "Save a grid of sampled images every so many steps; 0 never.")
    logging_steps: float = _option(1, "Log every so many steps.")

    # Defaults of TRL that differ here
    beta: float = _option(0.03, "KL coefficient.")
    learning_rate: float = _option(5e-6, "Initial learning rate.")
    loss_type: str = _option("grpo", "Loss of TRL; images have equal lengths, so grpo and dapo agree.")
    use_bias_correction_kl: bool = _option(False, "TRL's ratio on the KL; the published objective has none.")
    max_completion_length: int | None = _option(None, "Image tokens; taken from the checkpoint.")
    ddp_find_unused_parameters: bool | None = _option(False, "Search for unused weights under DDP; there are none.")

    def __post_init__(self) -> None:
        """Resolve the preset and check everything that can be checked without the model."""
        self._resolve_preset()
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.fp16
        # Pinned memory exists for GPUs alone; elsewhere torch only warns.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        self._check_counts()
        try:
            super().__post_init__()
        except ValueError as error:
            if "num_generations" not in str(error):
                raise
            raise ValueError(
                f"{error} It is per_device_train_batch_size={self.per_device_train_batch_size} x "
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} x {self.world_size} processes: "
                f"change one of them, or num_generations={self.num_generations}"
            ) from error
        if self.n_gpu > 1:  # one process, several GPUs: transformers would use nn.DataParallel, which TRL refuses
            self._n_gpu = 1
        self._check_values()
        self._check_method()
        self._check_rewards()
        self._check_models_and_data()
        heldout_plan.check_values(self)
        guard_options.check_values(self)
        micro_batches.check_values(self)
        weighting.check_values(self)

    @property
    def sampling(self) -> Sampling:
        """How images are drawn."""
        return Sampling(self.guidance_scale, self.temperature, self.top_k, self.top_p, self.min_p or 0.0)

    def _resolve_preset(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} is unknown; use one of {', '.join(PRESETS)}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, copy.copy(value))  # a list is this configuration's own

    def _check_counts(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "lora_r"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if (self.num_generations or 0) < 2:
            raise ValueError(
                f"num_generations={self.num_generations} must be at least 2: images of one prompt are compared"
            )
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1, or -1 to train num_train_epochs")

    def _check_values(self) -> None:
        _ = self.sampling
        for name, (value, why) in UNSUPPORTED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported for image policies: {why}")
        for name, names in {**CHOICES, "prompt_template": tuple(PROMPT_TEMPLATES)}.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(names)}")
        for name in NOT_NEGATIVE:
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value >= 0:
                raise ValueError(f"{name}={value!r} must be a number that is not negative")
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
        largest = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.loss_type == "cispo" and largest < 1:
            logger.warning(
                "loss_type=cispo multiplies every token's gradient by its ratio, but at most by epsilon_high=%g: that "
                "weakens the whole policy gradient; set epsilon_high, e.g. to 5.0 (ScaleRL, arXiv:2510.13786)",
                largest,
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
        if names and self.reward_weights is not None and len(self.reward_weights) != len(names):
            raise ValueError(f"reward_weights={self.reward_weights} must have one weight for each of rewards={names}")

    def _check_models_and_data(self) -> None:
        if self.eval_prompts and not self.do_eval and not self.eval_on_start:
            raise ValueError(
                f"eval_prompts={self.eval_prompts!r} does nothing with eval_strategy='no'; set it, e.g. to epoch"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must lie between 0 and 1, e.g. 0.999, or be left out")
        for name in ("ref_model", "sync_ref_model"):
            if getattr(self, name) and self.use_peft:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} does not go with use_peft, whose reference is the model without "
                    f"its adapters; leave {name} out, or train without adapters"
                )
            if getattr(self, name) and self.beta == 0:
                raise ValueError(f"{name}={getattr(self, name)!r} is not used with beta=0; set beta above 0")

    def to_json(self) -> dict[str, Any]:
        """The resolved values as plain JSON data, for the run folder."""
        return json.loads(self.to_json_string())


def parse_config(
    program: str, words: Sequence[str], num_processes: Callable[[StageConfig], int] | None = None
) -> StageConfig:
    """Read a configuration from ``[FILE.yaml] [--key value ...]``.

    Args:
        program: Name of the command, for its help.
        words: Command-line words; a first word that is no flag is the YAML file.
        num_processes: Tells the processes of a run that is to start elsewhere, from what the configuration says
            otherwise; None: the run is in the processes that are there.

    Raises:
        ValueError: If the file cannot be read or is not a YAML mapping, a key is unknown, or a value is wrong.
    """
    known = [option.name for option in fields(StageConfig)]
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if words and not words[0].startswith("-"):
        words.insert(0, "--config")
    if "--config" in words:
        file = "".join(words[words.index("--config") + 1 :][:1])
        content, where = read_mapping(file), f"configuration {file!r}"
        check_names(where, content, known)
        check_types(where, content, StageConfig)
    check_names("the command line", [word[2:].split("=")[0] for word in words if word.startswith("--")], known)
    kind = StageConfig if num_processes is None else _planned_for(num_processes)
    parser = OneLineParser(kind, prog=program, usage="%(prog)s [CONFIG.yaml] [--KEY VALUE ...]")
    try:
        config, rest = parser.parse_args_and_config(words, return_remaining_strings=True)
    except TypeError as error:
        raise ValueError(f"a value has the wrong type: {error}") from error
    if rest:
        raise ValueError(f"{' '.join(rest)!r} belongs to no key; give the YAML file first, then --key value")
    return config


def _planned_for(num_processes: Callable[[StageConfig], int]) -> type[StageConfig]:
    """A configuration that counts its batches as in a run of so many processes."""

    class PlannedConfig(StageConfig):
        @property
        def world_size(self) -> int:
            return num_processes(self)

    return PlannedConfig
