"""Settings of the tiny policy's pretraining."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


def _field(default, help_text: str):
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class PretrainConfig:
    """How the tiny policy is made from nothing. The defaults made the shipped one.

    Raises:
        ValueError: a count below 1, or a rate or share out of its range.
    """

    out: str = _field("outputs/tiny-janus-shapes", "folder for the policy, with checkpoints to resume from in it")
    seed: int = _field(0, "seed of everything random")
    threads: int = _field(1, "CPU threads")
    save_every: int = _field(200, "steps between checkpoints")
    tokenizer_steps: int = _field(4000, "steps of the image tokenizer")
    tokenizer_batch_size: int = _field(16, "pictures a step of the image tokenizer")
    tokenizer_lr: float = _field(2e-3, "peak learning rate of the image tokenizer")
    tokenizer_foreground: float = _field(8.0, "loss weight of pixels on and next to shapes, background being 1")
    num_scenes: int = _field(40000, "captioned scenes that the policy learns from")
    policy_steps: int = _field(3600, "steps of the language model")
    policy_batch_size: int = _field(64, "captioned scenes a step of the language model")
    policy_lr: float = _field(3e-3, "peak learning rate of the language model")
    policy_bf16: bool = _field(True, "multiply matrices in bfloat16 while the language model trains")
    policy_foreground: float = _field(25.0, "loss weight of tokens on shapes at the start; 1 from half time on")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "out":
                if not value:
                    raise ValueError("out is empty: name a folder")
            elif item.name == "seed":
                if value < 0:
                    raise ValueError(f"seed={value} must be 0 or more")
            elif value <= 0 and not isinstance(value, bool):
                raise ValueError(f"{item.name}={value} must be above 0")
