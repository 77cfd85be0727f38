"""Reinforcement learning of autoregressive image models: STAGE, GRPO and their relatives.

Names are imported on first use, so that ``import stage_grpo.objective`` costs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "ImagePipeline": "stage_grpo.generation.pipeline",
    "JanusPolicy": "stage_grpo.policy.janus",
    "StageConfig": "stage_grpo.config",
    "StageTrainer": "stage_grpo.trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
