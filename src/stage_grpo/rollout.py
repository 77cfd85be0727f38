"""Sampling images from a policy: one engine for training and for inference.

``prefill`` runs each *unique* prompt once and hands its keys and values to all images of that prompt;
``decode_one_token`` then adds one image token to every row of a preallocated cache, both guidance branches in one
batch. Log-probabilities and entropies come from the logits that sampling computes anyway, in float32.

Randomness enters as an argument: one uniform number a token, drawn by ``sampling.image_uniforms`` from a stream of
its own for every image. A rollout can therefore be replayed, and an image does not depend on the batch it came in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from stage_grpo.policy.base import ImagePolicy, guide, left_pad, positions
from stage_grpo.sampling import Sampling, sample_codes

CPU_MEMORY_BUDGET = 2 * 1024**3
"""Bytes that one chunk of a rollout may take on a CPU, unless told otherwise."""


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
        tensors = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("codes", "logps", "entropies", "guided_logps", "guided_entropies")
        }
        return cls(prompt_ids=[ids for part in parts for ids in part.prompt_ids], **tensors)


class _PreallocatedLayer(CacheLayerMixin):
    """One layer's keys and values for P + T tokens, filled in place; attention sees the filled part alone."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, capacity: int):
        super().__init__()
        self.length = keys.shape[-2]
        self.keys = keys.new_empty((*keys.shape[:2], capacity, keys.shape[-1]))
        self.values = values.new_empty((*values.shape[:2], capacity, values.shape[-1]))
        self.keys[:, :, : self.length] = keys
        self.values[:, :, : self.length] = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the constructor allocated."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append in place and return views of what is filled."""
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what attention will see."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens stored so far."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.keys.shape[-2]


@dataclass
class _DecodeState:
    """What one decoding step needs: cache, mask over P + T tokens, next positions, last hidden states."""

    cache: Cache
    mask: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R 1"]
    hidden: Float[Tensor, "R H"]
    length: int


def prefill(policy: ImagePolicy, prompt_ids: list[list[int]], guided: bool) -> _DecodeState:
    """Run every unique prompt once and share the result among the rows of that prompt.

    Args:
        policy: The policy.
        prompt_ids: Prompt of each of the B rows, unpadded.
        guided: Whether to add the B unconditional rows behind the conditional ones.
    """
    unique: dict[tuple[int, ...], int] = {}
    rows = torch.tensor([unique.setdefault(tuple(ids), len(unique)) for ids in prompt_ids])
    ids, mask = (x.to(policy.device) for x in left_pad(list(unique), policy.pad_token_id))
    rows = rows.to(policy.device)
    if guided:
        ids = torch.cat([ids, policy.unconditional_ids(ids, mask)])
        mask, rows = mask.repeat(2, 1), torch.cat([rows, rows + len(unique)])
    prefix = DynamicCache(config=policy.backbone.config)
    outputs = policy.backbone(
        inputs_embeds=policy.embed_text(ids),
        attention_mask=mask,
        position_ids=positions(mask),
        past_key_values=prefix,
        use_cache=True,
    )
    capacity = ids.shape[1] + policy.num_image_tokens
    filled: list[Any] = prefix.layers
    layers: list[Any] = [_PreallocatedLayer(layer.keys[rows], layer.values[rows], capacity) for layer in filled]
    return _DecodeState(
        cache=Cache(layers=layers),
        mask=policy.attention_mask_with_image(mask)[rows],
        position_ids=mask.sum(dim=1, keepdim=True)[rows],
        hidden=outputs.last_hidden_state[rows, -1],
        length=ids.shape[1],
    )


def decode_one_token(policy: ImagePolicy, codes: Int[Tensor, " R"], state: _DecodeState) -> None:
    """Feed one code a row and advance the state in place.

    Args:
        policy: The policy.
        codes: The code just sampled, for every row (both guidance branches read the same code).
        state: State to advance.
    """
    state.length += 1
    outputs = policy.backbone(
        inputs_embeds=policy.embed_codes(codes[:, None]),
        attention_mask=state.mask[:, : state.length],
        position_ids=state.position_ids,
        past_key_values=state.cache,
        use_cache=True,
    )
    state.hidden = outputs.last_hidden_state[:, -1]
    state.position_ids = state.position_ids + 1


def _log_distribution(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logps = torch.log_softmax(logits / temperature, dim=-1)
    return logps, -(logps.exp() * logps).sum(dim=-1)


def _sample_rows(
    policy: ImagePolicy, prompt_ids: list[list[int]], uniforms: Float[Tensor, "B T"], sampling: Sampling
) -> Rollout:
    guided = sampling.guidance_scale != 1
    state = prefill(policy, prompt_ids, guided)
    num_rows, num_tokens = uniforms.shape
    codes = torch.empty((num_rows, num_tokens), dtype=torch.long, device=policy.device)
    logps, entropies, guided_logps, guided_entropies = torch.empty(
        (4, num_rows, num_tokens), dtype=torch.float32, device=policy.device
    )
    for t in range(num_tokens):
        logits = policy.image_logits(policy.project(state.hidden))
        conditional = logits[:num_rows]
        conditional_logps, entropies[:, t] = _log_distribution(conditional, sampling.temperature)
        sampled_logps, guided_entropies[:, t] = conditional_logps, entropies[:, t]
        if guided:
            mixed = guide(conditional, logits[num_rows:], sampling.guidance_scale)
            sampled_logps, guided_entropies[:, t] = _log_distribution(mixed, sampling.temperature)
        chosen = sample_codes(sampled_logps, uniforms[:, t], sampling)
        codes[:, t] = chosen
        logps[:, t] = conditional_logps.gather(-1, chosen[:, None]).squeeze(-1)
        guided_logps[:, t] = sampled_logps.gather(-1, chosen[:, None]).squeeze(-1)
        if t + 1 < num_tokens:
            decode_one_token(policy, chosen.repeat(2) if guided else chosen, state)
    return Rollout(prompt_ids, codes, logps, entropies, guided_logps, guided_entropies)


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
        return torch.cuda.mem_get_info(device)[0] // 2
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
) -> Rollout:
    """Sample one image a row.

    Args:
        policy: The policy; put in evaluation mode while sampling.
        prompt_ids: Prompt of each row from :meth:`ImagePolicy.encode_prompts`; equal prompts share their prefix.
        uniforms: Random numbers from ``sampling.image_uniforms``.
        sampling: Guidance, temperature and truncation.
        budget: Bytes one chunk of rows may take; by default :func:`memory_budget`.

    Raises:
        ValueError: If the numbers of prompts, of uniform rows or of tokens disagree.
    """
    if uniforms.shape != (len(prompt_ids), policy.num_image_tokens):
        raise ValueError(
            f"uniforms of shape {tuple(uniforms.shape)} do not fit {len(prompt_ids)} prompts of "
            f"{policy.num_image_tokens} image tokens; draw them with image_uniforms(keys, policy.num_image_tokens)"
        )
    longest = max(len(ids) for ids in prompt_ids)
    row_bytes = bytes_per_row(policy, longest, sampling.guidance_scale != 1)
    rows_per_chunk = (budget or memory_budget(policy.device)) // row_bytes
    was_training = policy.training
    policy.eval()
    try:
        parts = [
            _sample_rows(policy, prompt_ids[rows], uniforms[rows].to(policy.device), sampling)
            for rows in _chunks(len(prompt_ids), rows_per_chunk)
        ]
    finally:
        policy.train(was_training)
    return Rollout.cat(parts)


@torch.no_grad()
def decode_images(
    policy: ImagePolicy, codes: Int[Tensor, "B T"], budget: int | None = None
) -> UInt8[np.ndarray, "B height width 3"]:
    """Decode codes to RGB in chunks that fit the memory budget.

    Returns:
        Images on the CPU, 0 to 255.
    """
    per_chunk = (budget or memory_budget(policy.device)) // policy.decode_bytes_per_image
    parts = [policy.decode(codes[rows]).cpu().numpy() for rows in _chunks(len(codes), per_chunk)]
    return np.concatenate(parts)
