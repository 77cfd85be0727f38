"""Several rewards of one step as one number a sample: what is left out, and how scales are made to agree.

Rewards have scales of their own: HPS spreads by 0.02 among the images of a prompt, GIT by 0.3. In a plain sum the
first is silent. Two ways out: normalise each reward within its group before the sum (TRL's ``normalize_then_sum``,
GDPO), or divide each by its usual spread, which :class:`RunningScales` keeps track of. Either way every component is
logged raw.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stage_grpo.objective import weighted_sum

AGGREGATIONS = ("weighted_sum", "normalize_then_sum", "running")
EPSILON = 1e-4
"""Added to a spread before division, as TRL does."""


def leave_out_failed(rewards: Float[Tensor, "N F"], num_generations: int) -> Float[Tensor, "N F"]:
    """Drop the samples that a reward failed on while it scored others of their group.

    TRL sums what is there, so that a missing component counts as 0: among rewards around 20 that makes a sample look
    terrible, among negative ones excellent. Such a row becomes NaN as a whole, and teaches nothing. A reward without a
    score for a whole group (one that does not apply to the prompt, or a server that was away) takes nothing from
    anyone, because only differences within the group count.

    Args:
        rewards: One column a reward, NaN where it has no score; groups contiguous.
        num_generations: Samples of one group (G).

    Returns:
        The same, with the rows of those samples NaN. No gradient.

    Raises:
        ValueError: The samples do not form whole groups.
    """
    missing = _grouped(rewards, num_generations).isnan()
    failed = missing & ~missing.all(dim=1, keepdim=True)
    return rewards.masked_fill(failed.any(dim=2).reshape(-1, 1), torch.nan)


def group_normalised_sum(
    rewards: Float[Tensor, "N F"], weights: Float[Tensor, " F"], num_generations: int
) -> Float[Tensor, " N"]:
    """Normalise each reward within its group, then sum: ``sum_f w_f (r_f - mean_G) / (std_G + 1e-4)``.

    What TRL computes under ``multi_objective_aggregation="normalize_then_sum"`` before it normalises the sums over the
    batch; here for those who need the sums themselves.

    Args:
        rewards: One column a reward, NaN where it has no score; groups contiguous.
        weights: One weight a reward.
        num_generations: Samples of one group (G), at least 2.

    Returns:
        One number a sample; NaN where no reward could score it.

    Raises:
        ValueError: The samples do not form whole groups.

    Source: GDPO, as in TRL.
    """
    grouped = _grouped(rewards, num_generations)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    normalised = (centred / (_group_variance(grouped).sqrt() + EPSILON)).reshape(rewards.shape)
    unscored = rewards.isnan().all(dim=1)
    return (normalised * weights.to(rewards)).nansum(dim=1).masked_fill(unscored, torch.nan)


class RunningScales:
    """The usual spread of each reward within a group, and weights that make the spreads equal.

    The spread is the root of an exponential average of the variance within groups, corrected for its start, so that
    the first step already counts in full. Differences between prompts do not enter: they cancel in the advantages.

    Args:
        num_rewards: Rewards (F).
        decay: Weight of the past in each step, at least 0 and below 1.

    Raises:
        ValueError: A decay outside its range.
    """

    def __init__(self, num_rewards: int, decay: float = 0.99):
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        self.decay = decay
        self._average = torch.zeros(num_rewards, dtype=torch.float64)
        self._weight = torch.zeros(num_rewards, dtype=torch.float64)

    def update(self, rewards: Float[Tensor, "N F"], num_generations: int) -> None:
        """Take in the rewards of one step, of all processes, so that all come to the same.

        A reward that scored no two samples of any group keeps its past.

        Raises:
            ValueError: The samples do not form whole groups.
        """
        grouped = _grouped(rewards.detach().to("cpu", torch.float64), num_generations)
        variance = _group_variance(grouped)[:, 0]
        told = (~grouped.isnan()).sum(dim=1) > 1
        seen = told.any(dim=0)
        latest = torch.where(told, variance, torch.nan).nanmean(dim=0)
        self._average = torch.where(seen, self.decay * self._average + (1 - self.decay) * latest, self._average)
        self._weight = torch.where(seen, self.decay * self._weight + (1 - self.decay), self._weight)

    @property
    def spreads(self) -> Float[Tensor, " F"]:
        """Usual standard deviation within a group, in units of each reward; NaN before a reward told any."""
        return (self._average / self._weight).sqrt()

    def weights(self, base: Float[Tensor, " F"]) -> Float[Tensor, " F"]:
        """Weights that give each reward a spread of its ``base`` weight: ``w_f / (spread_f + 1e-4)``.

        Args:
            base: The configured weights.

        Returns:
            Weights for the raw rewards; those of a reward without a known spread are the configured ones.
        """
        scaled = base.to(torch.float64).cpu() / (self.spreads + EPSILON)
        return torch.where(scaled.isnan(), base.to(scaled), scaled).to(base)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON data, exact."""
        return {"decay": self.decay, "average": self._average.tolist(), "weight": self._weight.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises:
            ValueError: A state of another number of rewards.
        """
        if len(state["average"]) != len(self._average):
            raise ValueError(
                f"the checkpoint has the scales of {len(state['average'])} rewards, this run has "
                f"{len(self._average)}; resume with the same rewards"
            )
        self.decay = float(state["decay"])
        self._average = torch.tensor(state["average"], dtype=torch.float64)
        self._weight = torch.tensor(state["weight"], dtype=torch.float64)


class RewardSum:
    """The rewards of a run as one number a sample, in one of three ways.

    * ``weighted_sum``: ``sum_f w_f r_f``.
    * ``normalize_then_sum``: each reward normalised within its group first, see :func:`group_normalised_sum`.
    * ``running``: ``sum_f w_f r_f / (spread_f + 1e-4)``, see :class:`RunningScales`.

    In each of them a sample that a reward failed on is left out, see :func:`leave_out_failed`.

    Args:
        weights: The configured weights.
        aggregation: One of ``AGGREGATIONS``.

    Raises:
        ValueError: An unknown aggregation.
    """

    def __init__(self, weights: Float[Tensor, " F"], aggregation: str = "weighted_sum"):
        if aggregation not in AGGREGATIONS:
            raise ValueError(f"aggregation={aggregation!r} is unknown; use one of {', '.join(AGGREGATIONS)}")
        self._base = weights.clone()
        self._normalise = aggregation == "normalize_then_sum"
        self._scales = RunningScales(len(weights)) if aggregation == "running" else None

    def take_in(
        self, rewards: Float[Tensor, "N F"], num_generations: int, training: bool
    ) -> tuple[Float[Tensor, "N F"], Float[Tensor, " F"]]:
        """Take in the rewards of one step, of all processes.

        Args:
            rewards: Raw rewards, NaN where there is no score; groups contiguous.
            num_generations: Samples of one group (G).
            training: Whether the running spreads learn from them.

        Returns:
            The rewards without the samples that one of them failed on, otherwise raw, and the weights that make
            their sum the wanted one.

        Raises:
            ValueError: The samples do not form whole groups.
        """
        kept = leave_out_failed(rewards, num_generations)
        if self._scales is None:
            return kept, self._base
        if training:
            self._scales.update(kept, num_generations)
        return kept, self._scales.weights(self._base)

    def totals(
        self, rewards: Float[Tensor, "N F"], weights: Float[Tensor, " F"], num_generations: int
    ) -> Float[Tensor, " N"]:
        """Sum what :meth:`take_in` gave, and maybe further columns with weights of their own.

        Returns:
            One number a sample; NaN where no reward could score it.
        """
        if self._normalise:
            return group_normalised_sum(rewards, weights, num_generations)
        return weighted_sum(rewards, weights)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON data, exact; empty if there is none."""
        return {} if self._scales is None else self._scales.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave; an empty state is a run that had none.

        Raises:
            ValueError: A state of another number of rewards.
        """
        if self._scales is not None and state:
            self._scales.load_state_dict(state)


def _grouped(rewards: Tensor, num_generations: int) -> Tensor:
    if len(rewards) % num_generations:
        raise ValueError(f"{len(rewards)} samples are no whole number of groups of num_generations={num_generations}")
    return rewards.reshape(-1, num_generations, rewards.shape[1])


def _group_variance(grouped: Tensor) -> Tensor:
    """Unbiased variance of the scored samples of each group, (groups, 1, F); 0 with fewer than two of them."""
    count = (~grouped.isnan()).sum(dim=1, keepdim=True)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    return centred.square().nansum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
