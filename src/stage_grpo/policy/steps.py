"""A rollout as steps: prompts once, then one code a row after the other.

``prefill`` runs each *unique* prompt once and hands its keys and values to all images of that prompt; then every step
adds one image token to all rows, both guidance branches in one batch. :class:`GenericSteps` calls the policy's
backbone and is right for every model; :class:`DecoderSteps` calls the family's own decoding step.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from stage_grpo.policy.base import ImagePolicy, left_pad, positions
from stage_grpo.policy.decode_cache import Decoder, FixedCache, GrowingCache, Prefix, equal_lengths
from stage_grpo.policy.graphed import FixedStep


class Steps(abc.ABC):
    """What sampling needs: features of the next token, their logits, and a way on."""

    features: Tensor
    """Inputs of the image head's last layer for the next token, (R, E): conditional rows, then unconditional ones."""

    @abc.abstractmethod
    def advance(self, codes: Int[Tensor, " B"]) -> None:
        """Feed the codes that were sampled, one an image."""

    @abc.abstractmethod
    def logits(self, features: Float[Tensor, "n E"]) -> Float[Tensor, "n V"]:
        """Logits over the codebook in float32."""


def begin(policy: ImagePolicy, decoder: Decoder | None, prompt_ids: Sequence[Sequence[int]], guided: bool) -> Steps:
    """Run the prompts.

    Args:
        policy: The policy.
        decoder: Its own decoding step, or None.
        prompt_ids: Prompt of each row, unpadded, sorted by length.
        guided: Whether to add the unconditional rows.
    """
    if decoder is None:
        return GenericSteps(policy, prompt_ids, guided)
    return DecoderSteps(policy, decoder, prompt_ids, guided)


class DecoderSteps(Steps):
    """Steps by a decoder. On a GPU they have fixed shapes and are replayed as CUDA graphs."""

    def __init__(
        self,
        policy: ImagePolicy,
        decoder: Decoder,
        prompt_ids: Sequence[Sequence[int]],
        guided: bool,
        fixed: bool | None = None,
    ):
        """Run the prompts.

        Args:
            policy: The policy.
            decoder: Its decoding step.
            prompt_ids: Prompt of each row, sorted by length.
            guided: Whether to add the unconditional rows.
            fixed: Whether shapes are fixed; None: on a GPU.
        """
        prefixes, hidden = run_prefixes(policy, decoder, prompt_ids, guided)
        self.decoder = decoder
        self.features = decoder.features(hidden)
        fixed = policy.device.type == "cuda" if fixed is None else fixed
        if fixed:
            self._step: Any = FixedStep(decoder, FixedCache(prefixes, policy.num_image_tokens), len(prompt_ids))
        else:
            self.cache = GrowingCache(prefixes, policy.num_image_tokens)
            self._step = self._grow

    def _grow(self, codes: Int[Tensor, " B"]) -> Float[Tensor, "R E"]:
        features = self.decoder.step(codes, self.cache)
        self.cache.advance()
        return features

    def advance(self, codes: Int[Tensor, " B"]) -> None:
        """Feed one code an image."""
        self.features = self._step(codes)

    def logits(self, features: Float[Tensor, "n E"]) -> Float[Tensor, "n V"]:
        """Logits in float32."""
        return self.decoder.logits(features)


def run_prefixes(
    policy: ImagePolicy, decoder: Decoder, prompt_ids: Sequence[Sequence[int]], guided: bool
) -> tuple[list[Prefix], Float[Tensor, "R H"]]:
    """Run every unique prompt once, without padding.

    Args:
        policy: The policy.
        decoder: Its decoding step.
        prompt_ids: Prompt of each row, sorted by length.
        guided: Whether to run the unconditional prompts too.

    Returns:
        Keys and values of the prompts of each length, and the last hidden states of all rows.
    """
    slices, prompts, prompt_of_row = equal_lengths(prompt_ids), [], []
    for rows in slices:
        unique: dict[tuple[int, ...], int] = {}
        index = [unique.setdefault(tuple(ids), len(unique)) for ids in prompt_ids[rows]]
        ids = torch.tensor(list(unique), device=policy.device)
        if guided:
            ids = torch.cat([ids, policy.unconditional_ids(ids, torch.ones_like(ids))])
        prompts.append(policy.embed_text(ids))
        prompt_of_row.append(torch.tensor(index, device=policy.device))
    branches = (2 if guided else 1, -1)
    prefixes, hidden = [], []
    for rows, index, (layers, last) in zip(slices, prompt_of_row, decoder.prefill(prompts)):
        spread = [(keys.unflatten(0, branches), values.unflatten(0, branches)) for keys, values in layers]
        prefixes.append(Prefix(rows, index, spread))
        hidden.append(last.unflatten(0, branches)[:, index])
    return prefixes, torch.cat(hidden, dim=1).flatten(0, 1)


def _run(
    policy: ImagePolicy, ids: Int[Tensor, "n P"], mask: Int[Tensor, "n P"]
) -> tuple[DynamicCache, Float[Tensor, "n H"]]:
    cache = DynamicCache(config=policy.backbone.config)
    outputs = policy.backbone(
        inputs_embeds=policy.embed_text(ids),
        attention_mask=mask,
        position_ids=positions(mask),
        past_key_values=cache,
        use_cache=True,
    )
    return cache, outputs.last_hidden_state[:, -1]


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
class DecodeState:
    """What one decoding step needs: cache, mask over P + T tokens, next positions, last hidden states."""

    cache: Cache
    mask: Int[Tensor, "R L"]
    position_ids: Int[Tensor, "R 1"]
    hidden: Float[Tensor, "R H"]
    length: int


def prefill(policy: ImagePolicy, prompt_ids: Sequence[Sequence[int]], guided: bool) -> DecodeState:
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
    prefix, last = _run(policy, ids, mask)
    capacity = ids.shape[1] + policy.num_image_tokens
    filled: list[Any] = prefix.layers
    layers: list[Any] = [_PreallocatedLayer(layer.keys[rows], layer.values[rows], capacity) for layer in filled]
    return DecodeState(
        cache=Cache(layers=layers),
        mask=policy.attention_mask_with_image(mask)[rows],
        position_ids=mask.sum(dim=1, keepdim=True)[rows],
        hidden=last[rows],
        length=ids.shape[1],
    )


class GenericSteps(Steps):
    """Steps by the policy's backbone."""

    def __init__(self, policy: ImagePolicy, prompt_ids: Sequence[Sequence[int]], guided: bool):
        self.policy, self.num_branches = policy, 2 if guided else 1
        self.state = prefill(policy, prompt_ids, guided)
        self.features = policy.project(self.state.hidden)

    def advance(self, codes: Int[Tensor, " B"]) -> None:
        """Feed one code an image."""
        state = self.state
        state.length += 1
        embedded = self.policy.embed_codes(codes.repeat(self.num_branches)[:, None])
        outputs = self.policy.backbone(
            inputs_embeds=embedded.to(state.hidden.dtype),  # autocast rounds what comes out of its layers
            attention_mask=state.mask[:, : state.length],
            position_ids=state.position_ids,
            past_key_values=state.cache,
            use_cache=True,
        )
        state.hidden = outputs.last_hidden_state[:, -1]
        state.position_ids = state.position_ids + 1
        self.features = self.policy.project(state.hidden)

    def logits(self, features: Float[Tensor, "n E"]) -> Float[Tensor, "n V"]:
        """Logits in float32."""
        return self.policy.image_logits(features)
