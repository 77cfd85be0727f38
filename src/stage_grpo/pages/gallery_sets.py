"""Image sets as a gallery shows them: each image with its prompt and, where it was evaluated, its scores.

Any folder of images will do. What is known of an image comes from ``manifest.jsonl``, the scores, the file itself or
``metadata.jsonl`` of its prompt folder, in this order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from stage_grpo.evaluation.score_files import find_scores
from stage_grpo.evaluation.scores import Scores
from stage_grpo.images.files import read_about
from stage_grpo.images.folders import IMAGE_SUFFIXES
from stage_grpo.images.layouts import LAYOUTS, side_folder
from stage_grpo.images.problems import Problems
from stage_grpo.images.set_files import GENERATION, MANIFEST, SetFiles, read_description, read_files

_GRID = "grid.png"


@dataclass(frozen=True)
class GalleryImage:
    """One image of a set.

    Attributes:
        path: Path within the set.
        index: Place of its prompt in the list of prompts, from 0.
        sample: Which image of its prompt it is, from 0.
        prompt: Its prompt.
        tag: Category of the prompt.
        seed: Seed that it was drawn with.
        scores: Measure to score; None where it could not be scored, no key where it was not measured.
        reasons: Why it is not correct, one line each.
        objects: Class to boxes [x1, y1, x2, y2, confidence] in pixels; None if nothing looked for objects.
        colors: Class to the colours of its first boxes.
    """

    path: PurePosixPath
    index: int
    sample: int
    prompt: str
    tag: str | None = None
    seed: int | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    objects: dict[str, list[list[float]]] | None = None
    colors: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class GallerySet:
    """The images of one checkpoint.

    Attributes:
        folder: Where they lie.
        images: In the order of the prompts.
        scores: What `stage evaluate` said of them, if it did.
    """

    folder: Path
    images: tuple[GalleryImage, ...]
    scores: Scores | None


def is_image_set(folder: Path) -> bool:
    """Whether a folder holds an image set: its records, or an image anywhere in it."""
    if _side_layout(folder) == "hps" or (folder / MANIFEST).is_file() or (folder / GENERATION).is_file():
        return True
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.rglob("*"))


def read_set(folder: str | Path, scores: str | Path | None = None) -> GallerySet:
    """Read an image set.

    Args:
        folder: Its folder.
        scores: Its scores; by default those that `find_scores` finds.

    Raises:
        ValueError: The folder is missing or holds no image, or the scores cannot be read or are of other images.
    """
    folder = Path(folder)
    files = read_files(folder, LAYOUTS[_side_layout(folder)], Problems())
    path = Path(scores) if scores is not None else find_scores(folder)
    loaded = Scores.load(path) if path is not None else None
    scored = {PurePosixPath(record["path"]): record for record in loaded.per_image} if loaded else {}
    known = files.manifest or scored
    images = [_from_record(path, known[path], scored.get(path)) for path in known] or list(_scan(files))
    if not images:
        raise ValueError(f"{folder} holds no image ({', '.join(IMAGE_SUFFIXES)}); give the folder of an image set")
    _check_scores(files, path, scored, images)
    return GallerySet(folder, tuple(sorted(images, key=lambda image: (image.index, image.sample))), loaded)


def _side_layout(folder: Path) -> str:
    """The layout that says where the set's records lie."""
    return "hps" if side_folder(LAYOUTS["hps"], folder).is_dir() else "flat"


def _from_record(path: PurePosixPath, known: dict[str, Any], scored: dict[str, Any] | None) -> GalleryImage:
    scored = scored or {}
    objects = scored.get("objects")
    return GalleryImage(
        path=path,
        index=known["index"],
        sample=known["sample"],
        prompt=known["prompt"],
        tag=known.get("tag") or scored.get("tag"),
        seed=known.get("seed"),
        scores=scored.get("scores") or {},
        reasons=tuple(scored.get("reasons") or ()),
        objects=objects if isinstance(objects, dict) else None,
        colors=scored.get("colors") or {},
    )


def _scan(files: SetFiles) -> Iterator[GalleryImage]:
    """The images of a folder that has neither a manifest nor scores."""
    paths = sorted(path for path in files.found if path.suffix.lower() in IMAGE_SUFFIXES and path.name != _GRID)
    folders: dict[PurePosixPath, int] = {}
    for number, path in enumerate(paths):
        about = _about(files.root / path)
        if about is not None:
            yield GalleryImage(path, about["index"], about["sample"], about["prompt"], seed=about.get("seed"))
            continue
        home = path.parent.parent
        described = read_description(files.root / home, None, Problems()) if len(path.parts) > 2 else None
        if described is None:
            yield GalleryImage(path, number, 0, path.stem)
            continue
        sample = folders[home] = folders.get(home, -1) + 1
        index = int(home.name) if home.name.isdigit() else number
        yield GalleryImage(path, index, sample, described["prompt"], tag=described.get("tag"))


def _about(path: Path) -> dict[str, Any] | None:
    try:
        about = read_about(path)
    except ValueError:
        return None
    kinds = {"prompt": str, "index": int, "sample": int}
    return about if all(type(about.get(key)) is kind for key, kind in kinds.items()) else None


def _check_scores(
    files: SetFiles, path: Path | None, scored: dict[PurePosixPath, Any], images: list[GalleryImage]
) -> None:
    """Refuse scores of another set, and paths that lead out of this one."""
    outside = next((p for p in scored if p.is_absolute() or ".." in p.parts), None)
    if outside is not None:
        raise ValueError(f"{path} names {str(outside)!r}, which leads out of {files.root}; evaluate the set again")
    shared = scored.keys() & {image.path for image in images} & files.found
    prompts = {image.path: image.prompt for image in images}
    if scored and (not shared or any(scored[p]["prompt"] != prompts[p] for p in shared)):
        raise ValueError(f"{path} holds scores of other images than those in {files.root}; evaluate the set again")
