"""Reads a run folder: `run.json`, `metrics.jsonl` and `samples/`, of this version or an older one.

Whatever is missing reads as empty: a report of a run that crashed, or that did not log something, is still a report.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stage_grpo.option_checks import is_number

ABANDONED = "abandoned"
"""Key of the rows of ``metrics.jsonl`` that a rollback took back; its number."""


@dataclass(frozen=True)
class Samples:
    """Images that the trainer saved at one step, whole groups in order.

    Attributes:
        step: Optimiser step.
        images: RGB.
        prompts: One an image.
        rewards: Total reward of each image; None where it could not be scored.
        advantages: Mean advantage over the image's tokens, as the loss uses it.
        grid: Rows and columns of image tokens; None if unknown.
        weights: Advantage weights M of each image's tokens, row by row; None if tokens were not reweighted.
        columns: Images of one prompt.
    """

    step: int
    images: list[Image.Image]
    prompts: list[str]
    rewards: list[float | None]
    advantages: list[float | None]
    grid: tuple[int, int] | None
    weights: list[list[float]] | None
    columns: int


@dataclass(frozen=True)
class RunRecord:
    """What a run left behind.

    Attributes:
        path: The run folder.
        config: The resolved configuration.
        versions: Versions of the packages.
        about: The other entries of `run.json`, such as seed and commit.
        metrics: Rows of `metrics.jsonl` in order.
        abandoned: Those that rollbacks took back, in order; not among the metrics.
        sample_steps: Steps at which images were saved, ascending.
    """

    path: Path
    config: dict[str, Any]
    versions: dict[str, str]
    about: dict[str, Any]
    metrics: list[dict[str, Any]]
    abandoned: list[dict[str, Any]]
    sample_steps: list[int]

    @property
    def num_steps(self) -> int:
        """The last step that was logged; 0 if none was."""
        return max((row["step"] for row in self.metrics), default=0)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """One metric over the steps at which it was logged.

        Args:
            name: A metric's name, see docs/metrics.md.

        Returns:
            Steps and values, both empty if the metric was never logged. Of several rows at a step the last counts.
        """
        found = {row["step"]: row[name] for row in self.metrics if _is_finite(row.get(name))}
        return list(found), [float(value) for value in found.values()]

    def samples(self, step: int) -> Samples | None:
        """The images saved at a step.

        Args:
            step: One of ``sample_steps``.

        Returns:
            The images, or None if the files are missing or do not fit each other.
        """
        stem = self.path / "samples" / f"step_{step:06d}"
        record = _read_json(stem.with_suffix(".json"))
        prompts = record.get("prompts") or []
        try:
            with Image.open(stem.with_suffix(".png")) as opened:
                sheet = opened.convert("RGB")
        except OSError:
            return None
        tile, columns = record.get("tile") or 0, record.get("columns") or len(prompts)
        if not prompts or tile <= 0 or sheet.width < min(columns, len(prompts)) * tile:
            return None
        grid = record.get("grid")
        return Samples(
            step=step,
            images=_cut(sheet, len(prompts), columns, tile),
            prompts=prompts,
            rewards=_padded(record.get("rewards"), len(prompts)),
            advantages=_padded(record.get("advantages"), len(prompts)),
            grid=(int(grid[0]), int(grid[1])) if grid else None,
            weights=record.get("weights"),
            columns=columns,
        )


def read_run(run_dir: str | Path) -> RunRecord:
    """Read a run folder.

    Args:
        run_dir: The output folder of a training run.

    Returns:
        What was found there.

    Raises:
        ValueError: There is no such folder.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder; give the output folder of a training run.")
    run = _read_json(path / "run.json")
    stems = [p.stem.removeprefix("step_") for p in sorted((path / "samples").glob("step_*.json"))]
    rows = _read_rows(path / "metrics.jsonl")
    return RunRecord(
        path=path,
        config=run.pop("config", None) or {},
        versions=run.pop("versions", None) or {},
        about=run,
        # What a rollback took back is not the run that the last rows belong to.
        metrics=[row for row in rows if ABANDONED not in row],
        abandoned=[row for row in rows if ABANDONED in row],
        sample_steps=sorted(int(stem) for stem in stems if stem.isdigit()),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that are whole: the last one of a crashed run may be torn."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _cut(sheet: Image.Image, num_images: int, columns: int, tile: int) -> list[Image.Image]:
    height = sheet.height // -(-num_images // columns)
    corners = [(i % columns * tile, i // columns * height) for i in range(num_images)]
    return [sheet.crop((x, y, x + tile, y + height)) for x, y in corners]


def _padded(values: list[Any] | None, length: int) -> list[Any]:
    return (list(values or []) + [None] * length)[:length]


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
