"""Image policies: one abstract contract, one file a model family."""

from stage_grpo.policy.base import PROMPT_TEMPLATES, ImagePolicy, PromptTemplate, left_pad
from stage_grpo.policy.loading import load_policy, load_tokenizer

__all__ = ["PROMPT_TEMPLATES", "ImagePolicy", "PromptTemplate", "left_pad", "load_policy", "load_tokenizer"]
