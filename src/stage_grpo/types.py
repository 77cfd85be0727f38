"""Shapes, array aliases and the small value types that every other module may import.

Dimension legend, used in every annotation of the project:

====  =====================================================================
B     completions held by this process
N     completions held by all processes together
G     completions of one prompt: a *group* (``num_generations``)
P     prompt tokens, left-padded
T     image tokens of one completion (36 in the shapes world, 576 for Janus-Pro at 384 px)
V     entries of the image codebook (512 and 16,384)
D     length of one code vector (8)
F     reward functions
====  =====================================================================
"""

from __future__ import annotations

from typing import Any, NamedTuple

Metadata = dict[str, Any]
"""GenEval-style description of what a prompt asks for: ``{"tag", "include", "exclude"?, ...}``."""


class Box(NamedTuple):
    """One detected object: corners in pixels (y grows downwards) and a confidence in [0, 1]."""

    x1: float
    y1: float
    x2: float
    y2: float
    confidence: float


class PromptRow(NamedTuple):
    """One prompt and what it asks for."""

    prompt: str
    metadata: Metadata
