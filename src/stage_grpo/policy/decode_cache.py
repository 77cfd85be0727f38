"""Keys and values of a decoding step, filled in place: as they grow, or of fixed shapes for a CUDA graph.

No row is padded. Rows of a batch are sorted by the length of their prompts, and each stands at the beginning of its
part of the cache, so that the place of a token is its position.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

KeysAndValues = tuple[Tensor, Tensor]


class DecodeCache(abc.ABC):
    """What a decoding step needs of a cache."""

    num_branches: int
    """2 with guidance, whose second branch is unconditional, otherwise 1."""

    @property
    @abc.abstractmethod
    def positions(self) -> Int[Tensor, " B"]:
        """Position of the token that is being decoded, the same in both branches."""

    @abc.abstractmethod
    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store keys and values of one token a row, and attend to everything so far.

        Args:
            layer: Index of the layer.
            queries: The r query heads of each of the hk key heads, (R, hk, r, d); rows are branches times B.
            keys: Keys to store, (R, hk, d).
            values: Values to store, (R, hk, d).

        Returns:
            What attention gives, (R, hk, r, d).
        """

    @abc.abstractmethod
    def advance(self) -> None:
        """Move to the next position."""


class Decoder(abc.ABC):
    """A family's own decoding step, see :meth:`~stage_grpo.policy.base.ImagePolicy.make_decoder`."""

    @abc.abstractmethod
    def prefill(
        self, prompts: Sequence[Float[Tensor, "_ _ H"]]
    ) -> list[tuple[list[KeysAndValues], Float[Tensor, "_ H"]]]:
        """Run whole prompts.

        Args:
            prompts: Embeddings of prompts, those of one length together: (n, P, H).

        Returns:
            For each of them keys and values of every layer, (n, hk, P, d), and the last hidden states.
        """

    @abc.abstractmethod
    def step(self, codes: Int[Tensor, " B"], cache: DecodeCache) -> Float[Tensor, "R E"]:
        """Feed one code a row, in all branches, and return the inputs of the image head's last layer."""

    @abc.abstractmethod
    def features(self, hidden: Float[Tensor, "R H"]) -> Float[Tensor, "R E"]:
        """Inputs of the head's last layer, from the backbone's last hidden states."""

    @abc.abstractmethod
    def logits(self, features: Float[Tensor, "n E"]) -> Float[Tensor, "n V"]:
        """Logits over the codebook, float32."""


@dataclass(frozen=True)
class Prefix:
    """Keys and values of prompts of one length, before the first image token.

    Attributes:
        rows: Rows of the batch (of B images) that have these prompts.
        prompt_of_row: For each of these rows, its prompt among the U unique ones.
        layers: Keys and values of each layer, (branches, U, heads, P, head_dim).
    """

    rows: slice
    prompt_of_row: Int[Tensor, " n"]
    layers: list[tuple[Float[Tensor, "b U h P d"], Float[Tensor, "b U h P d"]]]

    @property
    def length(self) -> int:
        """P: tokens of each prompt."""
        return self.layers[0][0].shape[-2]


def equal_lengths(prompt_ids: Sequence[Sequence[int]]) -> list[slice]:
    """Rows of equal length, of prompts sorted by length."""
    bounds = [0]
    for _, rows in groupby(prompt_ids, key=len):
        bounds.append(bounds[-1] + sum(1 for _ in rows))
    return [slice(start, stop) for start, stop in pairwise(bounds)]


class GrowingCache(DecodeCache):
    """Attention sees what is filled, by views of the rows of each length: no mask, nothing read in vain.

    The result of a row depends on that row alone, in every bit, as far as the matrix products do not mix rows.
    """

    def __init__(self, prefixes: Sequence[Prefix], num_image_tokens: int):
        self.prefixes = list(prefixes)
        self.num_filled = 0
        self.lengths = _lengths(prefixes)
        self.num_branches = prefixes[0].layers[0][0].shape[0]
        self._layers = [
            [_Allocated.of(prefix, i, num_image_tokens) for prefix in prefixes] for i in range(len(prefixes[0].layers))
        ]

    @property
    def positions(self) -> Int[Tensor, " B"]:
        """Position of the token that is being decoded, the same in both branches."""
        return self.lengths + self.num_filled

    def attend(
        self, layer: int, queries: Float[Tensor, "R hk r d"], keys: Float[Tensor, "R hk d"], values: Tensor
    ) -> Float[Tensor, "R hk r d"]:
        """Append keys and values of one token a row, and attend to everything so far.

        Args:
            layer: Index of the layer.
            queries: The r query heads of each of the hk key heads; rows are branches times B.
            keys: Keys to append.
            values: Values to append, of the same shape.
        """
        parts = self._layers[layer]
        if len(parts) == 1:
            return parts[0].attend(self.prefixes[0].length + self.num_filled, queries, keys, values)
        shape = (self.num_branches, -1)
        queries, keys, values = (x.unflatten(0, shape) for x in (queries, keys, values))
        out = torch.empty_like(queries)
        for prefix, part in zip(self.prefixes, parts):
            rows = [x[:, prefix.rows].flatten(0, 1) for x in (queries, keys, values)]
            done = part.attend(prefix.length + self.num_filled, *rows)
            out[:, prefix.rows] = done.unflatten(0, shape)
        return out.flatten(0, 1)

    def advance(self) -> None:
        """Count the token that all layers have seen."""
        self.num_filled += 1


@dataclass
class _Allocated:
    """Keys and values of one layer and of rows of one length."""

    keys: Float[Tensor, "R h L d"]
    values: Float[Tensor, "R h L d"]

    @classmethod
    def of(cls, prefix: Prefix, layer: int, num_image_tokens: int) -> _Allocated:
        """Allocate room for the image behind the prompts, and copy each prompt to its rows."""
        return cls(*(_spread(prefix, kind, prefix.length + num_image_tokens) for kind in prefix.layers[layer]))

    def attend(self, slot: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store one token a row at a slot and attend up to it."""
        self.keys[:, :, slot] = keys
        self.values[:, :, slot] = values
        seen = slice(slot + 1)
        return nn.functional.scaled_dot_product_attention(queries, self.keys[:, :, seen], self.values[:, :, seen])


class FixedCache(DecodeCache):
    """Attention sees a window of fixed size through a mask; the step is a function of ``positions`` alone.

    Shapes and addresses stay the same from step to step, which is what a CUDA graph needs. Repeating a step without
    :meth:`advance` changes nothing.

    Attributes:
        window: How much of the cache attention reads; at least the largest position plus one.
    """

    def __init__(self, prefixes: Sequence[Prefix], num_image_tokens: int):
        lengths = _lengths(prefixes)
        self.num_branches = prefixes[0].layers[0][0].shape[0]
        self._positions = lengths
        self.capacity = self.window = max(prefix.length for prefix in prefixes) + num_image_tokens
        self._rows = torch.arange(self.num_branches * len(lengths), device=lengths.device)
        self._slots = torch.arange(self.capacity, device=lengths.device)
        self._layers = [
            tuple(self._joined([(prefix, prefix.layers[i][kind]) for prefix in prefixes]) for kind in (0, 1))
            for i in range(len(prefixes[0].layers))
        ]

    @property
    def positions(self) -> Int[Tensor, " B"]:
        """Position of the token that is being decoded, always the same tensor."""
        return self._positions

    def _joined(self, parts: list[tuple[Prefix, Tensor]]) -> Tensor:
        whole = [_spread(*part, self.capacity).unflatten(0, (self.num_branches, -1)) for part in parts]
        for (prefix, _), room in zip(parts, whole):
            # What a mask hides must still be a number: 0 times NaN is NaN.
            room[..., prefix.length :, :].zero_()
        return torch.cat(whole, dim=1).flatten(0, 1) if len(whole) > 1 else whole[0].flatten(0, 1)

    def attend(
        self, layer: int, queries: Float[Tensor, "R hk r d"], keys: Float[Tensor, "R hk d"], values: Tensor
    ) -> Float[Tensor, "R hk r d"]:
        """Store keys and values at ``positions`` and attend to everything up to there, see :class:`GrowingCache`."""
        places = self.positions.repeat(self.num_branches)
        stored_keys, stored_values = self._layers[layer]
        stored_keys[self._rows, :, places] = keys
        stored_values[self._rows, :, places] = values
        return nn.functional.scaled_dot_product_attention(
            queries,
            stored_keys[:, :, : self.window],
            stored_values[:, :, : self.window],
            attn_mask=self._mask(places),
        )

    def _mask(self, places: Int[Tensor, " R"]) -> Bool[Tensor, "R 1 1 W"]:
        return (self._slots[: self.window] <= places[:, None])[:, None, None]

    def advance(self) -> None:
        """Move to the next position, in place."""
        self._positions += 1


def _lengths(prefixes: Sequence[Prefix]) -> Int[Tensor, " B"]:
    device = prefixes[0].prompt_of_row.device
    return torch.cat([torch.full((len(p.prompt_of_row),), p.length, device=device) for p in prefixes])


def _spread(prefix: Prefix, kind: Float[Tensor, "b U h P d"], capacity: int) -> Float[Tensor, "R h L d"]:
    """Copy the keys or values of each prompt to its rows."""
    branches, _, heads, length, width = kind.shape
    whole = kind.new_empty((branches, len(prefix.prompt_of_row), heads, capacity, width))
    whole[..., :length, :] = kind[:, prefix.prompt_of_row]
    return whole.flatten(0, 1)
