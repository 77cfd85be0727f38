"""Scores that only a benchmark's official code computes, on a checkout of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stage_grpo.evaluation.measuring import Outcome
from stage_grpo.images.sets import ImageSet, SetImage

OFFICIAL = "official"
"""Under this name the options of the official code stand among those of the rewards: "root" and "python"."""
_HOME = "github.com/Karine-Huang/T2I-CompBench"
_OPTIONS = ("root", "python")


class OfficialCodeError(ValueError):
    """The official code failed on a category; the others may be scored."""


def official_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Where the official code is: what is given, else ``$T2I_COMPBENCH_ROOT`` and ``$T2I_COMPBENCH_PYTHON``.

    Raises:
        ValueError: An unknown option.
    """
    if unknown := sorted(set(given) - set(_OPTIONS)):
        raise ValueError(f"the official code has no option {unknown}; known are {', '.join(_OPTIONS)}")
    root = given.get("root") or os.environ.get("T2I_COMPBENCH_ROOT")
    return {"root": root, "python": given.get("python") or os.environ.get("T2I_COMPBENCH_PYTHON") or "python"}


def official_lacking(options: Mapping[str, Any], category: str) -> list[tuple[str, str]]:
    """What running the official code needs and this machine lacks: each thing, and how to get it.

    Args:
        options: What :func:`official_options` returned.
        category: The category.
    """
    from stage_grpo.evaluation.official_t2i_compbench import check_checkout, find_python

    if not options["root"]:
        return [("only the official code scores it", f"get {_HOME} and set T2I_COMPBENCH_ROOT to it")]
    try:
        check_checkout(Path(options["root"]).expanduser(), [category])
        find_python(options["python"])
    except ValueError as error:
        what, _, remedy = str(error).rpartition("; ")
        return [(what, remedy)]
    return []


def official_outcomes(options: Mapping[str, Any], image_set: ImageSet, images: Sequence[SetImage]) -> list[Outcome]:
    """Run the official code on a category.

    Its results stay in ``t2i_compbench`` within the set's folder; while the images are the same, it is not run again.

    Args:
        options: What :func:`official_options` returned.
        image_set: The set.
        images: N images of one category.

    Returns:
        N outcomes.

    Raises:
        OfficialCodeError: The official code failed, or cannot score such a set.
    """
    from stage_grpo.evaluation.t2i_compbench import category_scores

    category = images[0].metadata["tag"]
    try:
        found = category_scores(image_set.folder, category, Path(options["root"]), options["python"])
    except ValueError as error:
        raise OfficialCodeError(str(error)) from error
    scores = {path.relative_to(image_set.folder).as_posix(): score for path, score in found.items()}
    return [_outcome(scores.get(image.path)) for image in images]


def _outcome(score: float | None) -> Outcome:
    reason = "the official code gives no number" if score is None else None
    return {"score": score, "reason": reason, "details": {}}
