"""Checkpoints of Janus and Janus-Pro: DeepSeek's original format and transformers' format, either way."""

from stage_grpo.checkpoints.cache import as_transformers
from stage_grpo.checkpoints.convert import convert

__all__ = ["as_transformers", "convert"]
