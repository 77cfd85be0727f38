"""A run as far as its cost depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from stage_grpo.config import StageConfig
from stage_grpo.planning.sizes import PolicySizes

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Linear layers of the language model alone: the vision tower has layers of the same names."""
PARALLEL = ("zero3", "zero2", "ddp", "fsdp2", "zero3_offload")
"""Ways to spread a run over processes, named like the files of ``configs/accelerate``."""


@dataclass(frozen=True)
class Setting:
    """A run as far as memory depends on it.

    Attributes:
        config: The configuration.
        sizes: Sizes of the policy, in the configuration's dtype.
        num_gpus: Processes, one GPU each.
        parallel: One of ``PARALLEL``.
        gpu_bytes: Memory of a GPU.
        num_prompt_tokens: Length of the longest prompt with its template.
        mixed: Whether the run computes in 16 bits, as it does by default on a GPU.
    """

    config: StageConfig
    sizes: PolicySizes
    num_gpus: int
    parallel: str
    gpu_bytes: float
    num_prompt_tokens: int
    mixed: bool

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed runs it."""
        return self.parallel.startswith("zero")

    @property
    def is_sharded(self) -> bool:
        """Whether parameters are spread over the GPUs."""
        return self.parallel in ("zero3", "zero3_offload", "fsdp2")

    @property
    def low(self) -> int:
        """Bytes of a number that is computed with."""
        return 2 if self.mixed else 4

    @property
    def trainable(self) -> int:
        """Parameters with a gradient and an optimizer state."""
        if self.config.use_peft:
            return self.sizes.lora_parameters(self.config.lora_r, LORA_TARGETS)
        return self.sizes.language_model

    @property
    def frozen(self) -> int:
        """Parameters without."""
        return self.sizes.total - (0 if self.config.use_peft else self.trainable)

    @property
    def frozen_bytes(self) -> int:
        """Bytes of one frozen parameter: DeepSpeed casts the whole model, everything else leaves it as loaded."""
        return self.low if self.is_zero else self.loaded

    @property
    def trainable_bytes(self) -> int:
        """Bytes of one trained parameter, without the optimizer's master copy."""
        if self.is_zero:
            return self.low
        # accelerate casts what FSDP2 trains to float32, and PEFT what it adds.
        return 4 if self.config.use_peft or self.parallel == "fsdp2" else self.loaded

    @property
    def sequence(self) -> int:
        """Tokens of a prompt and its image."""
        return self.num_prompt_tokens + self.sizes.policy.num_image_tokens

    @property
    def scored_tokens(self) -> int:
        """Tokens that go through the policy in one micro-batch."""
        rows = self.config.per_device_train_batch_size * self.branches_scored
        return rows * self.sequence

    @property
    def num_rollout_rows(self) -> int:
        """Images that one process samples at a time."""
        return self.config.per_device_train_batch_size * int(self.config.steps_per_generation or 1)

    def share(self, count: int) -> int:
        """One process's part of ``count`` things."""
        return -(-count // self.num_gpus)

    @property
    def loaded(self) -> int:
        """Bytes of a number as the checkpoint is loaded."""
        return {"float32": 4, "bfloat16": 2}[self.config.dtype]

    @property
    def stream(self) -> int:
        """Bytes of a number between the layers."""
        return self.low if self.is_zero or self.parallel == "fsdp2" else self.loaded

    @property
    def branches_scored(self) -> int:
        """Passes through the language model to score one image."""
        return 2 if self.config.guidance_in_scoring and self.config.guidance_scale != 1 else 1

    @property
    def has_reference(self) -> bool:
        """Whether a second model is loaded; with adapters the reference is the model without them."""
        return self.config.beta != 0 and not self.config.use_peft
