"""Critical tokens: only the first tokens, those at edges of the entropy map and those that differ in the group count.

GCPO, arXiv:2509.22485. Its letters: Z_init, Z_struct and Z_sim are the three sets, K their sizes, H the entropy, S the
similarity, w the dynamic advantage weight. Where the paper leaves something open, the authors' code decides
(github.com/zghhui/GCPO, commit d2fa245); ``docs/paper_map.md`` lists what was followed and what differs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stage_grpo.objective import full_precision, num_groups
from stage_grpo.weighting.base import TokenBatch, TokenWeighting, TokenWeights

AVERAGED_TOKENS = ("critical", "all")
"""What the loss may be a mean of."""


def count_of(share: float, num_tokens: int) -> int:
    """K: a share of the tokens, rounded down. A product that is whole but for rounding counts as whole."""
    return int(share * num_tokens + 1e-9)


def initial_tokens(num_tokens: int, share: float) -> Bool[Tensor, " T"]:
    """Z_init: the first K_init tokens, on which all later ones depend.

    Args:
        num_tokens: T.
        share: K_init / T.

    Source: arXiv:2509.22485, causal dependency.
    """
    return torch.arange(num_tokens) < count_of(share, num_tokens)


def smoothed_entropies(entropies: Float[Tensor, "N T"], grid: tuple[int, int]) -> Float[Tensor, "N rows columns"]:
    """H-bar: mean entropy of each token and its neighbours left, upper left, above and upper right.

    Those are the neighbours that were sampled before it. The ones outside the image are left out of the mean.

    Args:
        entropies: H, nats.
        grid: Rows and columns.

    Raises:
        ValueError: The grid does not hold T tokens.

    Source: arXiv:2509.22485, the equation of H-bar.
    """
    rows, columns = grid
    if rows * columns != entropies.shape[1]:
        raise ValueError(
            f"grid={grid} does not hold {entropies.shape[1]} tokens; give the rows and columns of the image"
        )
    maps = full_precision(entropies).reshape(-1, rows, columns)
    values = torch.stack([maps, torch.ones_like(maps)])  # sums, and how many they are of
    padded = torch.nn.functional.pad(values, (1, 1, 1, 0))
    shifts = [(1, 1), (1, 0), (0, 0), (0, 1), (0, 2)]
    sums, counts = torch.stack([padded[..., y : y + rows, x : x + columns] for y, x in shifts]).sum(dim=0)
    return sums / counts


def entropy_gradients(entropies: Float[Tensor, "N T"], grid: tuple[int, int]) -> Float[Tensor, "N T"]:
    """Length of the spatial gradient of the smoothed entropy map: large where regions of the image meet.

    Central differences, one-sided ones at the border; nats a token.

    Args:
        entropies: H, nats.
        grid: Rows and columns, at least 2 each.

    Raises:
        ValueError: The grid does not hold T tokens, or has a side below 2.

    Source: arXiv:2509.22485, entropy-induced spatial structure.
    """
    if min(grid) < 2:
        raise ValueError(
            f"grid={grid} has no gradient along a side of 1; critical tokens need images of 2 x 2 at least"
        )
    along_rows, along_columns = torch.gradient(smoothed_entropies(entropies, grid), dim=(1, 2))
    return torch.hypot(along_rows, along_columns).reshape(entropies.shape)


def structure_tokens(
    gradients: Float[Tensor, "N T"], share: float, first_share: float, last_share: float
) -> Bool[Tensor, "N T"]:
    """Z_struct: the K_struct tokens of steepest entropy, the first and last ones of the image left out.

    Args:
        gradients: Output of `entropy_gradients`.
        share: K_struct / T.
        first_share: Share left out at the start: these are critical already.
        last_share: Share left out at the end.

    Source: arXiv:2509.22485, entropy-induced spatial structure; leaving out both ends is the authors' code.
    """
    num_tokens = gradients.shape[1]
    start = count_of(first_share, num_tokens)
    stop = start + count_of(1 - first_share - last_share, num_tokens)
    order = torch.arange(num_tokens, device=gradients.device)
    inside = ((order >= start) & (order < stop)).expand_as(gradients)
    return _largest(gradients, inside, count_of(share, num_tokens))


def group_similarity(code_vectors: Float[Tensor, "N T D"], num_generations: int) -> Float[Tensor, "N T"]:
    """S-bar: mean cosine over all pairs of a group's codes at one position, repeated for each image of the group.

    Args:
        code_vectors: e, codebook vectors; a zero vector has cosine 0 to everything.
        num_generations: G; a group of one image has no pair, and similarity 0.

    Returns:
        Similarities in [-1, 1].

    Raises:
        ValueError: N is not divisible by ``num_generations``.

    Source: arXiv:2509.22485, the equation of S.
    """
    groups = num_groups(code_vectors.shape[0], num_generations)
    units = torch.nn.functional.normalize(full_precision(code_vectors), dim=-1, eps=1e-12)
    units = units.reshape(groups, num_generations, *units.shape[1:])
    # Over all pairs, j = k included, cosines add up to |sum_j u_j|^2; the pairs j = k are the |u_j|^2.
    pairs = units.sum(dim=1).square().sum(dim=-1) - units.square().sum(dim=(1, 3))
    mean = (pairs / max(1, num_generations * (num_generations - 1))).clamp(-1.0, 1.0)
    return mean.repeat_interleave(num_generations, dim=0)


def diverse_tokens(similarity: Float[Tensor, "N T"], share: float, taken: Bool[Tensor, "N T"]) -> Bool[Tensor, "N T"]:
    """Z_sim: the K_sim tokens least alike in their group, of those that are not critical already.

    Args:
        similarity: Output of `group_similarity`.
        share: K_sim / T.
        taken: Z_init and Z_struct.

    Source: arXiv:2509.22485, token diversity; choosing beside the other two sets is the authors' code.
    """
    return _largest(-similarity, ~taken, count_of(share, similarity.shape[1]))


def dynamic_weights(logps: Float[Tensor, "N T"], ref_logps: Float[Tensor, "N T"], clip: float) -> Float[Tensor, "N T"]:
    """w: how far the policy has moved from its reference so far, as a mean over all tokens up to each one.

    ``w_t = 1/t sum_(j <= t) exp(clip(log pi - log pi_ref, -eps_w, eps_w))``, 1 where the two agree.

    Args:
        logps: The policy's log-probabilities of the codes, nats.
        ref_logps: The reference's, nats.
        clip: eps_w, nats.

    Returns:
        Weights between exp(-eps_w) and exp(eps_w).

    Source: arXiv:2509.22485, dynamic advantage weight, in the form of the authors' code.
    """
    ratios = (full_precision(logps) - full_precision(ref_logps)).clamp(-clip, clip).exp()
    counts = torch.arange(1, ratios.shape[1] + 1, device=ratios.device)
    return ratios.cumsum(dim=1) / counts


def _largest(values: Float[Tensor, "N T"], allowed: Bool[Tensor, "N T"], count: int) -> Bool[Tensor, "N T"]:
    """Mark the ``count`` largest allowed values of each row; of equal ones the first, on every device."""
    order = values.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True, stable=True)
    marked = torch.zeros_like(values, dtype=torch.bool)
    return marked.scatter(1, order[:, :count], True)


@dataclass(frozen=True)
class CriticalOptions:
    """Options of the critical-token weighting; the defaults are the authors' values.

    Attributes:
        first_share: K_init / T.
        gradient_share: K_struct / T.
        similarity_share: K_sim / T.
        last_share: Share of the last tokens that are never taken for their gradient.
        dynamic: Multiply critical tokens' advantages by w; needs the reference policy.
        ratio_clip: eps_w, nats.
        average_over: What the loss is a mean of: "critical" tokens (the authors' code), so that the weights of an
            image have mean 1 before w; or "all", where the step shrinks with the share of critical tokens.
        kl_on_all_tokens: Whether tokens that are not critical still feel the KL.
    """

    first_share: float = 0.1
    gradient_share: float = 0.1
    similarity_share: float = 0.1
    last_share: float = 0.1
    dynamic: bool = True
    ratio_clip: float = 0.5
    average_over: str = "critical"
    kl_on_all_tokens: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        for name in (option.name for option in fields(self) if option.name.endswith("_share")):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} is outside [0, 1]; give a share of the tokens, e.g. 0.1"
                )
        total = self.first_share + self.gradient_share + self.similarity_share
        if not 0 < total <= 1:
            raise ValueError(
                f"first_share + gradient_share + similarity_share = {total:g}; choose some tokens, and at most all"
            )
        if self.first_share + self.gradient_share + self.last_share > 1:
            raise ValueError(
                f"gradient_share={self.gradient_share} does not fit between first_share={self.first_share} and "
                f"last_share={self.last_share}; lower one of them"
            )
        if not self.ratio_clip >= 0:
            raise ValueError(f"ratio_clip={self.ratio_clip} must not be negative; 0 switches the dynamic weight off")
        if self.average_over not in AVERAGED_TOKENS:
            raise ValueError(f"average_over={self.average_over!r} is unknown; use {' or '.join(AVERAGED_TOKENS)}")


class CriticalTokens(TokenWeighting):
    """Only critical tokens count; how much, follows from how far the policy has moved from its reference."""

    name = "critical"
    Options = CriticalOptions

    def __init__(self, options: CriticalOptions | None = None):
        super().__init__(options)
        self.needs_reference = self.options.dynamic

    def choose(self, batch: TokenBatch) -> Bool[Tensor, "N T"]:
        """Z_select, the union of the three sets, which do not overlap: the same number of tokens in every image."""
        options = self.options
        first = initial_tokens(batch.codes.shape[1], options.first_share).to(batch.entropies.device)
        gradients = entropy_gradients(batch.entropies, batch.grid)
        steep = structure_tokens(gradients, options.gradient_share, options.first_share, options.last_share)
        alike = group_similarity(batch.code_vectors, batch.num_generations)
        return first | steep | diverse_tokens(alike, options.similarity_share, first | steep)

    def compute(self, batch: TokenBatch) -> TokenWeights:
        """Weigh tokens.

        Raises:
            ValueError: If the images have too few tokens for the shares, or the reference's scores are missing.
        """
        options, chosen = self.options, self.choose(batch).float()
        num_chosen = chosen[0].sum()
        if num_chosen == 0:
            raise ValueError(
                f"the shares choose none of {chosen.shape[1]} tokens; raise first_share to {1 / chosen.shape[1]:.2g}"
            )
        weights = chosen * (chosen.shape[1] / num_chosen) if options.average_over == "critical" else chosen
        kl_weights = None if options.kl_on_all_tokens else weights
        if not options.dynamic:
            return TokenWeights(weights, kl_weights, {"critical": chosen})
        if batch.ref_logps is None:
            raise ValueError(
                "dynamic=True needs the reference's log-probabilities; set beta above 0 or dynamic: false"
            )
        dynamic = dynamic_weights(batch.logps, batch.ref_logps, options.ratio_clip)
        return TokenWeights(weights * dynamic, kl_weights, {"critical": chosen, "dynamic_weights": dynamic})
