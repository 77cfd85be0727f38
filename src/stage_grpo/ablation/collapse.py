"""When a run counts as collapsed. The limits were fixed before any grid was run, and stand here alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stage_grpo.evaluation.statistics import Difference

KL_OVER_ENTROPY = 1.0
"""Largest KL at the end, as a multiple of the reference policy's entropy at the start, both nats a token: beyond it
the policy is further from its reference than the reference's own choice is wide."""
LAST_SHARE = 0.1
"""Share of the steps that makes "the end" and "the start"."""


def collapse_reasons(rows: Sequence[Mapping[str, Any]], gain: Difference | None) -> list[str]:
    """Say why a run counts as collapsed.

    Args:
        rows: Rows of ``metrics.jsonl``, one a step.
        gain: Graded held-out score after minus before, with its paired interval; None if it could not be scored.

    Returns:
        Any of: "not a number" (KL, loss or gradient norm of the last steps), "KL" (above ``KL_OVER_ENTROPY``), and
        "score" (the whole interval lies below 0). Empty if the run stands.
    """
    reasons = []
    last = ending(rows)
    if any(name in row and row[name] is None for row in last for name in ("kl", "loss", "grad_norm")):
        reasons.append("not a number")
    drift, width = end_mean(rows, "kl"), end_mean(list(reversed(rows)), "entropy/reference")
    if drift is not None and width is not None and drift > KL_OVER_ENTROPY * width:
        reasons.append("KL")
    if gain is not None and gain.high < 0:
        reasons.append("score")
    return reasons


def ending(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The last tenth of the steps, at least one."""
    steps = [row for row in rows if "loss" in row]
    return list(steps[-max(1, round(LAST_SHARE * len(steps))) :])


def end_mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a metric over the last tenth of the steps; None if it was not logged there, or mostly not a number."""
    logged = [row[name] for row in ending(rows) if name in row]
    found = [value for value in logged if value is not None and math.isfinite(value)]
    return float(np.mean(found)) if found and 2 * len(found) >= len(logged) else None
