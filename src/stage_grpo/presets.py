"""Tables behind the configuration: what a preset gives to each field, and what a field may be."""

from __future__ import annotations

from typing import Any

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

CHOICES = {
    # TRL looks at it in the first update, after a whole rollout.
    "loss_type": ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "entropy_reward_scope": ("top", "all"),
    "advantage_weight_normalization": ("none", "group"),
    "kl_weight_form": ("clipped", "graded"),
    "reward_aggregation": ("weighted_sum", "normalize_then_sum", "running"),
}
"""Fields that take one of a few names."""

NOT_NEGATIVE = (
    "beta",
    "learning_rate",
    "entropy_reward_weight",
    "entropy_loss_weight",
    "min_reward_std",
    "sample_steps",
)
"""Fields that must be 0 or more."""

UNSUPPORTED = {
    "use_vllm": (False, "vLLM has no image tokens and no guidance; the project's own rollout is used"),
    "use_transformers_continuous_batching": (False, "the project's own rollout is used"),
    "pad_to_multiple_of": (None, "all images have the same number of tokens"),
    "mask_truncated_completions": (False, "images have no end token, so every one would be masked"),
    "generation_kwargs": (None, "set guidance_scale, temperature, top_k, top_p or min_p instead"),
    "repetition_penalty": (1.0, "it has no meaning for image codes"),
    "model_init_kwargs": (None, "only the reference would take it; set dtype and attn_implementation, meant for both"),
    "resume_from_checkpoint": (None, "set resume: auto, a checkpoint folder, or never"),
    "enable_jit_checkpoint": (False, "a signal ends the run after its step, with a checkpoint, in any case"),
    "ds3_gather_for_generation": (True, "a rollout calls parts of the model, so all weights must be there"),
    "multi_objective_aggregation": ("sum_then_normalize", "set reward_aggregation: normalize_then_sum instead"),
    "log_completions": (False, "completions are image codes; set sample_steps to see images instead"),
}
"""TRL options that make no sense for images: value that must stay, and why."""
