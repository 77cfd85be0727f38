"""Where the scores of an image set lie: ``scores.json`` within it, or ``NAME.scores.json`` beside it."""

from __future__ import annotations

import logging
from pathlib import Path

from stage_grpo.evaluation.scores import Scores, records_file
from stage_grpo.images.layouts import beside

logger = logging.getLogger(__name__)


def find_scores(folder: Path) -> Path | None:
    """The scores of a set, None if there are none."""
    return next((path for path in _places(folder) if path.is_file()), None)


def set_scores_aside(folder: Path) -> None:
    """Rename the scores of a set that is made anew: ``scores.json`` to ``scores.former.json``, over an older one.

    Args:
        folder: Folder of the set. Files of these names that hold no scores stay.

    Raises:
        OSError: A file cannot be written or deleted.
    """
    for path in _places(folder):
        try:
            scores = Scores.load(path)
        except ValueError:
            continue
        former = path.with_name(f"{path.stem}.former.json")
        scores.save(former)
        path.unlink()
        records_file(path).unlink(missing_ok=True)
        logger.warning("%s is of the former images, and is now called %s", path, former.name)


def _places(folder: Path) -> tuple[Path, Path]:
    return folder / "scores.json", beside(folder, ".scores.json")
