"""Measure every image of a set with one reward, going on where a killed evaluation stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from stage_grpo import weights
from stage_grpo.checksums import sha256_of
from stage_grpo.images.files import write_whole
from stage_grpo.images.folders import load_image
from stage_grpo.images.sets import ImageSet, SetImage
from stage_grpo.rewards.base import Reward
from stage_grpo.rewards.failures import NOT_APPLICABLE, REASON

Outcome = dict[str, Any]
"""What a reward said of one image: "score" (None for no score), "reason" (why there is none) and its "details"."""

_SECRETS = ("token",)
_THREADS = 4


class MeasureCache:
    """The outcomes of one reward on one set, on disk as they come: a killed evaluation loses one batch.

    The file is named after a key of everything that decides an outcome, and says the key itself, so a part is never
    taken for that of another set, reward or option.

    Args:
        folder: Where cache files lie; None keeps nothing.
        name: Name of the reward.
        key: SHA-256 of everything that decides an outcome.
    """

    def __init__(self, folder: Path | None, name: str, key: str):
        self._path = folder and folder / f"{re.sub('[^A-Za-z0-9_]+', '-', name)}-{key[:16]}.jsonl"
        self._key = key

    def load(self) -> dict[str, Outcome]:
        """Outcomes by path of the image; a line that a crash tore is dropped, on disk too."""
        if self._path is None or not self._path.is_file():
            return {}
        lines = []
        for line in self._path.read_bytes().split(b"\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        if not lines or lines[0] != {"key": self._key}:
            self._path.unlink()
            return {}
        whole = "".join(json.dumps(line) + "\n" for line in lines).encode()
        if whole != self._path.read_bytes():
            write_whole(self._path, whole)
        return {line["path"]: line["outcome"] for line in lines[1:]}

    def append(self, images: Sequence[SetImage], outcomes: Sequence[Outcome]) -> None:
        """Add a batch. What failed is not kept, so that it is tried again."""
        if self._path is None:
            return
        kept = [(i, o) for i, o in zip(images, outcomes) if o["score"] is not None or _is_not_applicable(o)]
        is_new = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            head = [json.dumps({"key": self._key})] if is_new else []
            rows = [json.dumps({"path": image.path, "outcome": outcome}) for image, outcome in kept]
            file.write("".join(f"{line}\n" for line in [*head, *rows]))


def measure_images(
    reward: Reward,
    image_set: ImageSet,
    images: Sequence[SetImage],
    details: Sequence[str],
    cache: MeasureCache,
    batch_size: int,
) -> list[Outcome]:
    """Measure images batch by batch: a benchmark at full size does not fit in memory.

    Args:
        reward: What measures.
        image_set: The set that they are of.
        images: N of its images.
        details: Names of the reward's details to keep, where it has them.
        cache: What was measured before, and where to put what is measured now.
        batch_size: Images read at a time; a reward may cut them into smaller batches of its own.

    Returns:
        N outcomes.

    Raises:
        ValueError: The reward returned what it should not, or its weights turn out not to be whole.
    """
    done = cache.load()
    open_images = [image for image in images if image.path not in done]
    with (
        tqdm(total=len(images), initial=len(images) - len(open_images), desc=reward.name, disable=None) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for start in range(0, len(open_images), batch_size):
            batch = open_images[start : start + batch_size]
            pictures = list(pool.map(lambda image: load_image(image_set.folder / image.path), batch))
            # A reward that changes its metadata must not change the next one's.
            described = [dict(image.metadata) for image in batch]
            result = reward.score(pictures, [image.prompt for image in batch], described)
            outcomes = [_outcome(result.scores[i], result.details, details, i) for i in range(len(batch))]
            cache.append(batch, outcomes)
            done.update((image.path, outcome) for image, outcome in zip(batch, outcomes))
            bar.update(len(batch))
    return [done[image.path] for image in images]


def cache_key(image_set: ImageSet, name: str, options: dict[str, Any], reward: Reward, details: Iterable[str]) -> str:
    """SHA-256 of what decides the outcomes of a reward on a set, as far as it can be known.

    Args:
        image_set: The set.
        name: Name of the reward.
        options: Its options.
        reward: The reward, whose weights in the cache are looked at.
        details: What is kept of its details: another measure may need others.
    """
    seals = {}
    for needed in reward.needed_weights():
        seal = weights.cache_folder() / needed / "manifest.json"
        seals[needed] = sha256_of(seal) if seal.is_file() else None
    parts = [image_set.fingerprint, name, options, seals, sorted(set(details)), version("stage-grpo")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def without_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Options as they may be written down."""
    return {name: value for name, value in options.items() if name not in _SECRETS}


def _outcome(score: float, found: dict[str, list[Any]], details: Sequence[str], place: int) -> Outcome:
    reason = found[REASON][place] if found.get(REASON) else None
    unscored = np.isnan(score)
    return {
        "score": None if unscored else float(score),
        "reason": str(reason or "no reason given") if unscored else None,
        "details": {name: plain(found[name][place]) for name in details if name in found},
    }


def plain(value: Any) -> Any:
    """A detail as JSON knows it; numbers that are not finite become None."""
    rules: list[tuple[Any, Callable[[Any], Any]]] = [
        ((type(None), str, bool), lambda v: v),
        (np.bool_, bool),
        (Real, lambda v: (int(v) if isinstance(v, (int, np.integer)) else float(v)) if np.isfinite(v) else None),
        (dict, lambda v: {str(key): plain(item) for key, item in v.items()}),
        ((list, tuple, np.ndarray), lambda v: [plain(item) for item in v]),
    ]
    return next((convert(value) for kind, convert in rules if isinstance(value, kind)), str(value))


def _is_not_applicable(outcome: Outcome) -> bool:
    return outcome["reason"] is not None and outcome["reason"].startswith(NOT_APPLICABLE)
