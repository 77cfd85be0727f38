"""STAGE's weighting: tokens in dispute get a smaller advantage and a larger KL coefficient (section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

from stage_grpo import similarity
from stage_grpo.weighting.base import TokenBatch, TokenWeighting, TokenWeights


@dataclass(frozen=True)
class StageOptions:
    """Options of STAGE's weighting: the configuration's keys of the same names.

    Attributes:
        reweight_advantages: Multiply advantages by M (Eq. 7, 8).
        advantage_weight_normalization: See :func:`stage_grpo.similarity.advantage_weights`.
        reweight_kl: Multiply each token's KL by its similarity weight.
        kl_weight_form: See :func:`stage_grpo.similarity.kl_weights`, as the three below.
        kl_weight_a: a.
        kl_weight_b: b.
        kl_weight_clip: Bounds, lower and upper.
    """

    reweight_advantages: bool = True
    advantage_weight_normalization: similarity.Normalization = "none"
    reweight_kl: bool = True
    kl_weight_form: similarity.KLWeightForm = "clipped"
    kl_weight_a: float = 0.5
    kl_weight_b: float = 0.5
    kl_weight_clip: list[float] | tuple[float, float] = (0.0, 1.0)


class StageWeighting(TokenWeighting):
    """Weights made of each token's similarity to images of opposite advantage."""

    name = "stage"
    Options = StageOptions

    def compute(self, batch: TokenBatch) -> TokenWeights:
        """Weigh tokens; the similarity is measured and logged even where nothing is reweighted."""
        options = self.options
        alike = similarity.opposite_sign_similarity(batch.code_vectors, batch.advantages, batch.num_generations)
        advantage_weights = kl_weights = None
        if options.reweight_advantages:
            advantage_weights = similarity.advantage_weights(
                alike, batch.num_generations, options.advantage_weight_normalization
            )
        if options.reweight_kl:
            lower, upper = options.kl_weight_clip
            kl_weights = similarity.kl_weights(
                alike, options.kl_weight_a, options.kl_weight_b, (lower, upper), options.kl_weight_form
            )
        return TokenWeights(advantage_weights, kl_weights, {"similarity": alike})
