"""Sampling images from a policy: one engine for training and for inference.

Each *unique* prompt is run once and shared by all images of that prompt; then each step adds one image token to every
row, both guidance branches in one batch (``policy.steps``). Log-probabilities and entropies come from the logits that
sampling computes anyway, in float32.

Randomness enters as an argument: one uniform number a token, drawn by ``sampling.image_uniforms`` from a stream of
its own for every image. A rollout can therefore be replayed, and an image does not depend on the batch it came in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from stage_grpo.devices import free_bytes
from stage_grpo.policy.base import ImagePolicy, guide
from stage_grpo.policy.steps import Steps, begin
from stage_grpo.sampling import Sampling, draw_codes

Record = Literal["both", "conditional", "guided", "nothing"]
_TENSORS = ("codes", "logps", "entropies", "guided_logps", "guided_entropies")
CPU_MEMORY_BUDGET = 2 * 1024**3
"""Bytes that one chunk of a rollout may take on a CPU, unless told otherwise."""
CPU_DECODE_BUDGET = 64 * 1024**2
"""The same for images being decoded: more than the processor's cache holds is no faster."""


@dataclass(frozen=True)
class Rollout:
    """Images as codes, with what sampling knew of them.

    Attributes:
        prompt_ids: Token ids of each row's prompt, unpadded.
        codes: Sampled codebook indices.
        logps: Log-probabilities of the codes in the conditional distribution, nats, at the sampling temperature.
        entropies: Entropies of the conditional distribution, nats.
        guided_logps: The same of the guided distribution that was sampled from (before top-k, top-p and min-p).
        guided_entropies: Entropies of the guided distribution.
    """

    prompt_ids: list[list[int]]
    codes: Int[Tensor, "B T"]
    logps: Float[Tensor, "B T"]
    entropies: Float[Tensor, "B T"]
    guided_logps: Float[Tensor, "B T"]
    guided_entropies: Float[Tensor, "B T"]

    @classmethod
    def cat(cls, parts: Sequence[Rollout]) -> Rollout:
        """Join rollouts of consecutive rows."""
        tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        return cls(prompt_ids=[ids for part in parts for ids in part.prompt_ids], **tensors)

    def in_order(self, order: Sequence[int]) -> Rollout:
        """Put rows back in their places.

        Args:
            order: For each row of this rollout, its place.
        """
        places = sorted(range(len(order)), key=order.__getitem__)
        tensors = {name: getattr(self, name)[places] for name in _TENSORS}
        return Rollout(prompt_ids=[self.prompt_ids[i] for i in places], **tensors)


@dataclass(frozen=True)
class _Recorder:
    """Log-probabilities and entropies of one distribution, filled step by step; NaN where nobody asked for them."""

    logps: Float[Tensor, "B T"]
    entropies: Float[Tensor, "B T"]
    is_wanted: bool

    @classmethod
    def new(cls, like: Int[Tensor, "B T"], is_wanted: bool) -> _Recorder:
        """Allocate records for the codes of a rollout."""
        logps, entropies = torch.full((2, *like.shape), torch.nan, dtype=torch.float32, device=like.device)
        return cls(logps, entropies, is_wanted)

    def add(self, t: int, logps: Tensor, probabilities: Tensor, chosen: Tensor) -> None:
        """Record what is wanted of the distribution of step t."""
        if self.is_wanted:
            self.logps[:, t] = logps.gather(-1, chosen[:, None]).squeeze(-1)
            self.entropies[:, t] = -(probabilities * logps).sum(dim=-1)


def _sample_rows(
    steps: Steps, prompt_ids: list[list[int]], uniforms: Float[Tensor, "B T"], sampling: Sampling, record: Record
) -> Rollout:
    num_rows, num_tokens = uniforms.shape
    guided = sampling.guidance_scale != 1
    codes = torch.empty((num_rows, num_tokens), dtype=torch.long, device=uniforms.device)
    sampled = _Recorder.new(codes, record in ("both", "guided") or (not guided and record == "conditional"))
    conditional = _Recorder.new(codes, record in ("both", "conditional")) if guided else sampled
    for t in range(num_tokens):
        # The head's last layer is linear: mixing its inputs gives the guided logits without the unconditional ones.
        features = steps.features.float()
        if guided:
            plain, unconditional = features.chunk(2)
            features = guide(plain, unconditional, sampling.guidance_scale)
            features = torch.cat([features, plain]) if conditional.is_wanted else features
        logits = steps.logits(features)
        if sampling.temperature != 1:
            logits /= sampling.temperature
        logps = torch.log_softmax(logits, dim=-1)
        probabilities = logps.exp()
        chosen = draw_codes(probabilities[:num_rows], uniforms[:, t], sampling)
        codes[:, t] = chosen
        sampled.add(t, logps[:num_rows], probabilities[:num_rows], chosen)
        if guided:
            conditional.add(t, logps[num_rows:], probabilities[num_rows:], chosen)
        if t + 1 < num_tokens:
            steps.advance(chosen)
    return Rollout(prompt_ids, codes, conditional.logps, conditional.entropies, sampled.logps, sampled.entropies)


def bytes_per_row(policy: ImagePolicy, num_prompt_tokens: int, guided: bool) -> int:
    """Estimate what one image of a rollout takes: keys and values of its branches and the logits of one step."""
    config = policy.backbone.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    num_tokens = num_prompt_tokens + policy.num_image_tokens
    branches = 2 if guided else 1
    itemsize = policy.get_output_embeddings().weight.dtype.itemsize
    cache = branches * config.num_hidden_layers * 2 * kv_heads * head_dim * num_tokens * itemsize
    # Logits of the branches, and about six (rows, V) temporaries while sampling, in float32.
    logits = (branches + 6) * policy.get_output_embeddings().weight.shape[0] * 4
    return cache + logits


def memory_budget(device: torch.device) -> int:
    """Bytes a chunk of rows may take: half of what is free on a GPU, ``CPU_MEMORY_BUDGET`` on a CPU."""
    if device.type == "cuda":
        return free_bytes(device) // 2
    return CPU_MEMORY_BUDGET


def _chunks(num_rows: int, rows_per_chunk: int) -> Iterator[slice]:
    """Split rows into the fewest chunks that fit, of nearly equal size."""
    num_chunks = math.ceil(num_rows / max(1, rows_per_chunk))
    bounds = [round(i * num_rows / num_chunks) for i in range(num_chunks + 1)]
    yield from (slice(start, stop) for start, stop in pairwise(bounds))


@torch.no_grad()
def rollout(
    policy: ImagePolicy,
    prompt_ids: list[list[int]],
    uniforms: Float[Tensor, "B T"],
    sampling: Sampling,
    budget: int | None = None,
    record: Record = "both",
) -> Rollout:
    """Sample one image a row.

    Args:
        policy: The policy; put in evaluation mode while sampling.
        prompt_ids: Prompt of each row from :meth:`ImagePolicy.encode_prompts`; equal prompts share their prefix.
        uniforms: Random numbers from ``sampling.image_uniforms``.
        sampling: Guidance, temperature and truncation.
        budget: Bytes one chunk of rows may take; by default :func:`memory_budget`.
        record: Which log-probabilities and entropies are wanted: of both distributions, of the conditional or of the
            guided one, or nothing but codes. Others are NaN; leaving them out saves time.

    Raises:
        ValueError: If the numbers of prompts, of uniform rows or of tokens disagree.
    """
    if uniforms.shape != (len(prompt_ids), policy.num_image_tokens):
        raise ValueError(
            f"uniforms of shape {tuple(uniforms.shape)} do not fit {len(prompt_ids)} prompts of "
            f"{policy.num_image_tokens} image tokens; draw them with image_uniforms(keys, policy.num_image_tokens)"
        )
    guided = sampling.guidance_scale != 1
    longest = max(len(ids) for ids in prompt_ids)
    rows_per_chunk = (budget or memory_budget(policy.device)) // bytes_per_row(policy, longest, guided)
    # Rows of equal length stand together, so that none is padded.
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    was_training = policy.training
    policy.eval()
    try:
        decoder = policy.make_decoder(longest + policy.num_image_tokens)
        parts = []
        for rows in _chunks(len(prompt_ids), rows_per_chunk):
            chunk = order[rows]
            steps = begin(policy, decoder, [prompt_ids[i] for i in chunk], guided)
            numbers = uniforms[chunk].to(policy.device)
            parts.append(_sample_rows(steps, [prompt_ids[i] for i in chunk], numbers, sampling, record))
            del steps  # before the next chunk's cache is allocated
    finally:
        policy.train(was_training)
    return Rollout.cat(parts).in_order(order)


@torch.no_grad()
def decode_images(
    policy: ImagePolicy, codes: Int[Tensor, "B T"], budget: int | None = None
) -> UInt8[np.ndarray, "B height width 3"]:
    """Decode codes to RGB in chunks that fit the memory budget.

    Returns:
        Images on the CPU, 0 to 255.
    """
    if policy.device.type == "cpu":
        budget = min(budget or CPU_DECODE_BUDGET, CPU_DECODE_BUDGET)
    per_chunk = (budget or memory_budget(policy.device)) // policy.decode_bytes_per_image
    parts = [policy.decode(codes[rows]).cpu().numpy() for rows in _chunks(len(codes), per_chunk)]
    return np.concatenate(parts)
