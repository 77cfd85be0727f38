"""Weights of reward models: which there are, getting them, and where they lie.

A reward asks :func:`folder` for the ready folder of its weights; ``stage weights get NAME`` makes it.
"""

from stage_grpo.weights.cache import MissingWeightsError, cache_folder, folder, get, is_present
from stage_grpo.weights.catalog import WEIGHTS, WeightEntry, WeightFile, get_entry

__all__ = [
    "WEIGHTS",
    "MissingWeightsError",
    "WeightEntry",
    "WeightFile",
    "cache_folder",
    "folder",
    "get",
    "get_entry",
    "is_present",
]
