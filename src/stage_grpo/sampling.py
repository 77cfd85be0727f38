"""How a code is drawn: guidance, temperature, truncation, and one stream of random numbers an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the guided distribution.

    Attributes:
        guidance_scale: Classifier-free guidance; 1 samples the conditional branch and skips the other.
        temperature: Divides the guided logits.
        top_k: Keep the k most probable codes; 0 keeps all.
        top_p: Keep the smallest set of codes whose probability reaches this share.
        min_p: Drop codes less probable than this share of the most probable one.

    Raises:
        ValueError: If a value is out of its range.
    """

    guidance_scale: float = 5.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Check every range."""
        if self.guidance_scale < 1 or not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be at least 1 (1 is no guidance)")
        if self.temperature <= 0 or not math.isfinite(self.temperature):
            raise ValueError(f"temperature={self.temperature} must be above 0; to be greedy set top_k=1")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all codes) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]; 1 keeps all codes")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1); 0 keeps all codes")


def image_uniforms(keys: Sequence[Sequence[int]], num_image_tokens: int) -> Float[Tensor, "B T"]:
    """Draw the random numbers of a rollout: one stream an image, named by a tuple of integers.

    Args:
        keys: One tuple of non-negative integers an image, e.g. ``(seed, prompt index, image index)``. Equal keys give
            equal streams, whatever else is in the batch.
        num_image_tokens: T.

    Returns:
        Uniform numbers in [0, 1), float64.
    """
    return torch.from_numpy(np.stack([np.random.default_rng(tuple(key)).random(num_image_tokens) for key in keys]))


def sample_codes(logps: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], sampling: Sampling) -> Int[Tensor, " B"]:
    """Draw codes by inverting the cumulative distribution at one uniform number a row.

    Args:
        logps: Log-probabilities of the guided distribution at the sampling temperature.
        uniforms: Numbers in [0, 1).
        sampling: Which codes to keep.
    """
    return draw_codes(logps.exp(), uniforms, sampling)


def draw_codes(
    probabilities: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"], sampling: Sampling
) -> Int[Tensor, " B"]:
    """Draw codes as :func:`sample_codes` does, from probabilities.

    Args:
        probabilities: Probabilities of the guided distribution at the sampling temperature; left as they are.
        uniforms: Numbers in [0, 1).
        sampling: Which codes to keep.
    """
    if sampling.min_p > 0:
        keep = probabilities >= sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities * keep
    if sampling.top_k > 0:
        kept = probabilities.topk(min(sampling.top_k, probabilities.shape[-1]), dim=-1)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, kept.indices, kept.values)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered * (before < sampling.top_p * ordered.sum(dim=-1, keepdim=True))
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    # float64: over 16,384 codes a float32 sum loses the improbable ones.
    cdf = probabilities.cumsum(dim=-1, dtype=torch.float64)
    threshold = uniforms.to(cdf)[:, None] * cdf[:, -1:]
    return torch.searchsorted(cdf, threshold, right=True).squeeze(-1).clamp(max=cdf.shape[-1] - 1)
