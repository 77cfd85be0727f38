"""STAGE's similarity-aware weights: which tokens of a group receive contradictory gradients, and how much.

Images of one prompt share near-identical regions. Where two of them put the same code but carry advantages of
opposite sign, their gradients fight: those tokens get a smaller advantage (Eq. 7, 8) and a larger KL weight.
Everything is local to a group, for any number of groups, in float32 (float64 stays float64).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from stage_grpo.objective import full_precision, num_groups

Normalization = Literal["none", "group"]
KLWeightForm = Literal["clipped", "graded"]

_MIN_MEAN_WEIGHT = 1e-6  # Below this a group's M is nothing but rounding; dividing by it would amplify that.


def opposite_sign_similarity(
    code_vectors: Float[Tensor, "N T D"], advantages: Float[Tensor, " N"], num_generations: int
) -> Float[Tensor, "N T"]:
    """Mean cosine of each token's code to the group's codes there that have the opposite advantage sign.

    ``Sim(i, t) = mean over j of cos(q_it, q_jt)``, j running over the other samples of the same group with
    ``A_i * A_j <= 0``. A sample with A_i = 0 is compared with every other one; one without any such j has
    similarity 0. The released code leaves j = i at 0 but counts it when A_i = 0; here it is not counted.

    Args:
        code_vectors: Codebook vectors of the sampled tokens, groups contiguous; any length, a zero vector has
            cosine 0 to everything. No gradient is expected.
        advantages: Advantage of each sample before weighting; only its sign matters.
        num_generations: Completions of one prompt (G).

    Returns:
        Similarities in [-1, 1].

    Raises:
        ValueError: N is not divisible by ``num_generations``.

    Source: arXiv:2509.25027 Eq. 5, 6.
    """
    groups = num_groups(code_vectors.shape[0], num_generations)
    units = torch.nn.functional.normalize(full_precision(code_vectors), dim=-1, eps=1e-12)
    units = units.reshape(groups, num_generations, *units.shape[1:])
    # The sign of the product, not the product: two tiny advantages would underflow to "opposite".
    signs = full_precision(advantages).sign().reshape(groups, num_generations)
    opposite = signs[:, :, None] * signs[:, None, :] <= 0
    others = ~torch.eye(num_generations, dtype=torch.bool, device=opposite.device)
    pairs = (opposite & others).to(units.dtype)
    counts = pairs.sum(dim=-1).clamp(min=1.0)
    # mean_j cos(q_i, q_j) = q_i . mean_j q_j for unit vectors: one matmul, never a (G, G, T) tensor.
    mean_opposite = torch.einsum("pij,pjtd->pitd", pairs / counts[..., None], units)
    similarity = (units * mean_opposite).sum(dim=-1).clamp(-1.0, 1.0)
    return similarity.reshape(groups * num_generations, -1)


def advantage_weights(
    similarity: Float[Tensor, "N T"], num_generations: int, normalization: Normalization = "none"
) -> Float[Tensor, "N T"]:
    """Multiplier M of each token's advantage: ``(1 - Sim) / 2``.

    Args:
        similarity: Output of `opposite_sign_similarity`, in [-1, 1].
        num_generations: Completions of one prompt (G).
        normalization: "none" is the paper's equation, M in [0, 1]: where images are alike the whole step
            shrinks. "group" divides M by its mean over the group's G x T tokens (mean 1, at least 0): the
            contrast between tokens stays and the step keeps its size, which is what the released code's
            policy term sum(M * A) / sum(M) does for one group.

    Returns:
        Weights, at least 0.

    Raises:
        ValueError: Unknown ``normalization``, or N is not divisible by ``num_generations``.

    Source: arXiv:2509.25027 Eq. 7, 8. The paper's "Norm to [0, 1]" of 1 - Sim, which lies in [0, 2], is read
    as division by 2.
    """
    _check_name("normalization", normalization, get_args(Normalization))
    groups = num_groups(similarity.shape[0], num_generations)
    weights = (1.0 - full_precision(similarity)) / 2.0
    if normalization == "none":
        return weights
    grouped = weights.reshape(groups, -1)
    mean = grouped.mean(dim=1, keepdim=True).clamp(min=_MIN_MEAN_WEIGHT)
    return (grouped / mean).reshape(weights.shape)


def kl_weights(
    similarity: Float[Tensor, "N T"],
    a: float = 0.5,
    b: float = 0.5,
    clip: tuple[float, float] = (0.0, 1.0),
    form: KLWeightForm = "clipped",
) -> Float[Tensor, "N T"]:
    """Multiplier of each token's KL coefficient: tokens in dispute are held closer to the reference.

    Args:
        similarity: Output of `opposite_sign_similarity`, in [-1, 1].
        a: Weight where similarity is lowest.
        b: What full similarity adds.
        clip: Bounds (low, high) of Sim + 1 in the "clipped" form. The paper names none; the released code has
            (0, 1), with which every Sim >= 0 gives a + b.
        form: "clipped": ``a + b * clip(Sim + 1)``, the paper. "graded": ``a + b * (Sim + 1) / 2``, which
            varies over the whole range.

    Returns:
        Weights; with the defaults in [0.5, 1].

    Raises:
        ValueError: Unknown ``form``, ``clip`` out of order, or a weight could become negative.

    Source: arXiv:2509.25027, section 3.2, the equation of beta'.
    """
    _check_name("form", form, get_args(KLWeightForm))
    low, high = clip
    if not low <= high:
        raise ValueError(f"clip is {clip}; the lower bound must not lie above the upper one, e.g. (0.0, 1.0).")
    span = (low, high) if form == "clipped" else (0.0, 1.0)
    if min(a + b * span[0], a + b * span[1]) < 0.0:
        raise ValueError(f"a={a}, b={b} give KL weights down to {min(a + b * x for x in span)}; keep them >= 0.")
    similarity = full_precision(similarity)
    if form == "graded":
        return a + b * (similarity + 1.0) / 2.0
    return a + b * (similarity + 1.0).clamp(low, high)


def _check_name(field: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a name that is not in the list."""
    if value not in known:
        raise ValueError(f"{field} is {value!r}; choose one of {', '.join(known)}.")
