"""The contract of a token weighting.

A weighting sees one batch of finished, scored images and says how much each of their tokens counts in the loss. It is
a subclass of :class:`TokenWeighting`, or any plain function ``weights(codes, advantages, entropies, step)`` that
returns one number a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

WeightFunction = Callable[..., Any]
"""``weights(codes, advantages, entropies, step) -> (N, T)``, with further keyword parameters as options."""


@dataclass(frozen=True)
class TokenBatch:
    """What is known of the sampled images of all processes; nothing carries gradient.

    Attributes:
        code_vectors: Codebook vectors of the sampled codes.
        codes: Sampled codebook indices, in raster order.
        advantages: Group advantages, groups contiguous; exactly 0 for groups whose rewards tie.
        rewards: Weighted sums of the rewards, raw whatever their aggregation; NaN where a sample could not be scored.
        entropies: The policy's entropies while sampling, nats.
        logps: The policy's log-probabilities of the codes while sampling, nats.
        num_generations: G.
        grid: Rows and columns of image tokens; rows x columns = T.
        step: Optimiser steps taken so far.
        ref_logps: The reference policy's log-probabilities of the codes, nats; None where no reference is loaded.

    Entropies and log-probabilities are of the conditional distribution, or of the guided one with
    ``guidance_in_scoring``.
    """

    code_vectors: Float[Tensor, "N T D"]
    codes: Int[Tensor, "N T"]
    advantages: Float[Tensor, " N"]
    rewards: Float[Tensor, " N"]
    entropies: Float[Tensor, "N T"]
    logps: Float[Tensor, "N T"]
    num_generations: int
    grid: tuple[int, int]
    step: int
    ref_logps: Float[Tensor, "N T"] | None = None


@dataclass(frozen=True)
class TokenWeights:
    """What a weighting says. :meth:`TokenWeighting.weigh` checks it, in words that name the weighting.

    Attributes:
        advantage_weights: (N, T), multiplier of each token's advantage; None leaves advantages alone.
        kl_weights: (N, T), multiplier of each token's KL coefficient, at least 0; None leaves the KL alone.
        logged: Further values, (N, T) or (N,); their mean and spread are logged as ``NAME/mean`` and ``NAME/std``.
    """

    advantage_weights: Tensor | None = None
    kl_weights: Tensor | None = None
    logged: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class NoOptions:
    """The options of a weighting that has none."""


class TokenWeighting(ABC):
    """Weighs tokens. A subclass writes ``compute``, and ``Options`` if it has any.

    Every process computes the weights of the whole batch and keeps its own part: a weighting that draws random numbers
    must draw the same ones on each, e.g. seeded by ``batch.step``.

    Attributes:
        name: How the weighting is called in error messages; the class's name where none is given.
        Options: A frozen dataclass whose ``__post_init__`` checks its values; ``self.options`` is one.
        needs_reference: Whether ``compute`` reads ``ref_logps``, so that ``beta`` must not be 0.
    """

    name: str
    Options: ClassVar[type[Any]] = NoOptions
    needs_reference: bool = False

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "name"):
            cls.name = cls.__name__

    def __init__(self, options: Any = None):
        self.options = self.Options() if options is None else options

    @abstractmethod
    def compute(self, batch: TokenBatch) -> TokenWeights:
        """Weigh the tokens of a batch. Called without gradient."""

    @torch.no_grad()
    def weigh(self, batch: TokenBatch) -> TokenWeights:
        """What ``compute`` says, checked, in the advantages' dtype and on their device.

        Raises:
            ValueError: If ``compute`` gives weights of another shape, weights that are not finite, KL weights below 0,
                or values to log of another shape.
        """
        found = self.compute(batch)
        if not isinstance(found, TokenWeights):
            raise ValueError(f"token weighting {self.name!r} gave a {type(found).__name__}; return TokenWeights(...)")
        kl_weights = self._checked("kl_weights", found.kl_weights, batch)
        if kl_weights is not None and kl_weights.min() < 0:
            raise ValueError(
                f"token weighting {self.name!r} gave kl_weights down to {kl_weights.min().item():.3g}, which would "
                "push the policy away from its reference; keep them at least 0"
            )
        for name, values in found.logged.items():
            if values.shape not in (batch.codes.shape, batch.codes.shape[:1]):
                raise ValueError(
                    f"token weighting {self.name!r} logs {name} of shape {tuple(values.shape)}; give "
                    f"{tuple(batch.codes.shape)} or {tuple(batch.codes.shape[:1])}"
                )
        return TokenWeights(
            self._checked("advantage_weights", found.advantage_weights, batch), kl_weights, found.logged
        )

    def _checked(self, field_name: str, weights: Tensor | None, batch: TokenBatch) -> Tensor | None:
        if weights is None:
            return None
        if weights.shape != batch.codes.shape:
            raise ValueError(
                f"token weighting {self.name!r} gave {field_name} of shape {tuple(weights.shape)}; return a tensor of "
                f"shape {tuple(batch.codes.shape)}, one weight a token"
            )
        weights = weights.to(batch.advantages)
        if not weights.isfinite().all():
            count = int((~weights.isfinite()).sum())
            raise ValueError(
                f"token weighting {self.name!r} gave {field_name} that are not finite for {count} tokens; give such "
                "tokens the weight 0"
            )
        return weights


class NoWeighting(TokenWeighting):
    """Every token counts alike, as in plain GRPO, and nothing is computed."""

    name = "none"

    def compute(self, batch: TokenBatch) -> TokenWeights:
        """Weigh nothing."""
        return TokenWeights()


class FunctionWeighting(TokenWeighting):
    """A plain function ``weights(codes, advantages, entropies, step)``; what it returns multiplies the advantages.

    Args:
        function: The function.
        options: Its further keyword parameters.
    """

    def __init__(self, function: WeightFunction, options: Mapping[str, Any] | None = None):
        super().__init__()
        self.name = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self._keywords = dict(options or {})

    def compute(self, batch: TokenBatch) -> TokenWeights:
        """Call the function."""
        weights = self._function(batch.codes, batch.advantages, batch.entropies, batch.step, **self._keywords)
        return TokenWeights(advantage_weights=torch.as_tensor(weights))
