"""A gallery of image sets side by side: one HTML file, no outside resource, fast with thousands of images.

Reads images and scores from disk and never loads a policy. How the page behaves is in
``templates/gallery_rules.js.j2`` (pure functions) and ``templates/gallery.js.j2`` (the document).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from stage_grpo.benchmarks import STRICT, get_benchmark
from stage_grpo.evaluation.scores import OVERALL, Scores
from stage_grpo.images.layouts import beside
from stage_grpo.pages.gallery_sets import GalleryImage, GallerySet, read_set
from stage_grpo.pages.render import render
from stage_grpo.pages.thumbnails import THUMBNAIL_SIZE, Thumbnail, make_thumbnails

_SCRIPTS = ("gallery_rules.js.j2", "gallery.js.j2")


def write_gallery(
    folders: Sequence[str | Path],
    path: str | Path | None = None,
    *,
    scores: Sequence[str | Path] | None = None,
    thumbnail_size: int = THUMBNAIL_SIZE,
) -> Path:
    """Write the gallery of image sets.

    Images are paired by place of their prompt, number of the image and prompt; so sets that were generated from the
    same prompts with the same seed stand side by side.

    Args:
        folders: Folders of the sets, in the order of the columns, e.g. before and after training.
        path: The HTML file; by default ``NAME.gallery.html`` beside the first folder.
        scores: Score file of each set; by default ``scores.json`` in it or ``NAME.scores.json`` beside it, if there.
        thumbnail_size: Longest side in pixels of the images within the file.

    Returns:
        The file written.

    Raises:
        ValueError: No folder or one named twice, not as many score files as folders, a folder without images, scores
            of other images, or a thumbnail size out of range.
    """
    places = [Path(os.path.abspath(folder)) for folder in folders]
    if not places or len(set(places)) < len(places):
        raise ValueError(f"image sets {', '.join(map(str, folders)) or '(none)'}: name each folder once")
    if scores is not None and len(scores) != len(places):
        raise ValueError(f"{len(scores)} score files for {len(places)} image sets; give one for each, in their order")
    sets = [read_set(place, of_it) for place, of_it in zip(places, scores or [None] * len(places))]
    out = Path(path) if path is not None else beside(places[0], ".gallery.html")
    flat = [one.folder / image.path for one in sets for image in one.images]
    page = _render(sets, make_thumbnails(flat, thumbnail_size), thumbnail_size, Path(os.path.abspath(out)).parent)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return out


def as_script_json(value: Any) -> Markup:
    """JSON that may stand inside a ``<script>`` element, whatever text it holds: no ``<``, ``>`` or ``&`` in it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def short_names(folders: Sequence[Path]) -> list[str]:
    """What to call each folder: its last name, with as many before it as tell all folders apart."""
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def gallery_data(sets: Sequence[GallerySet], sizes: Sequence[tuple[int, int] | None], home: Path) -> dict[str, Any]:
    """What the page shows, without the thumbnails.

    Args:
        sets: The image sets.
        sizes: Width and height of every image of every set, in order; None for one that cannot be read.
        home: Folder of the page: files are named relative to it.

    Returns:
        ``sets`` (name, summary, whether partial), ``measures``, ``verdict`` (place of the measure that says right or
        wrong, or None), ``tags`` and ``rows``; a row has one cell a set, None where the set lacks the image. A cell's
        ``thumb`` is the image's place among all images.
    """
    measures = list(dict.fromkeys(measure for one in sets for image in one.images for measure in image.scores))
    rows: dict[tuple[int, int, str], dict[str, Any]] = {}
    number = 0
    for column, one in enumerate(sets):
        for image in one.images:
            key = (image.index, image.sample, image.prompt)
            row = rows.setdefault(key, {**_row(image), "cells": [None] * len(sets)})
            row["tag"] = row["tag"] or image.tag
            row["cells"][column] = _cell(image, one.folder, sizes[number], number, measures, home)
            number += 1
    ordered = [rows[key] for key in sorted(rows)]
    names = short_names([one.folder for one in sets])
    return {
        "sets": [{"name": name, **_summary(one)} for name, one in zip(names, sets)],
        "measures": measures,
        "verdict": measures.index(STRICT) if STRICT in measures else None,
        "tags": _tags(sets, (row["tag"] for row in ordered)),
        "rows": ordered,
    }


def _render(sets: Sequence[GallerySet], thumbnails: Sequence[Thumbnail | None], size: int, home: Path) -> str:
    data = gallery_data(sets, [one and (one.width, one.height) for one in thumbnails], home)
    data["thumbnail"] = size
    script = "".join(files("stage_grpo").joinpath("templates", name).read_text("utf-8") for name in _SCRIPTS)
    # The page may run this one script, by its hash: a prompt that got out of the data could still not run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return render(
        "gallery",
        title=" · ".join(one["name"] for one in data["sets"]),
        num_images=sum(len(one.images) for one in sets),
        script=Markup(script),
        script_hash=digest,
        data=as_script_json(data),
        thumbnails=as_script_json([one and one.uri for one in thumbnails]),
    )


def _row(image: GalleryImage) -> dict[str, Any]:
    return {"index": image.index, "sample": image.sample, "prompt": image.prompt, "tag": image.tag}


def _cell(
    image: GalleryImage, folder: Path, size: tuple[int, int] | None, number: int, measures: list[str], home: Path
) -> dict[str, Any]:
    """One image; what it does not have is left out, as there are thousands of them."""
    file = os.path.relpath(folder / image.path, home).replace(os.sep, "/")
    cell: dict[str, Any] = {"thumb": number, "file": quote(file), "size": size, "seed": image.seed}
    cell["scores"] = [image.scores.get(measure) for measure in measures]
    cell["reasons"] = list(image.reasons)
    if image.objects is not None:
        cell["boxes"] = list(_boxes(image))
    return {name: value for name, value in cell.items() if value is not None and value != []}


def _boxes(image: GalleryImage) -> Iterable[list[Any]]:
    """Class, colour if known, corners and confidence of every object."""
    for name, boxes in (image.objects or {}).items():
        colors = image.colors.get(name, [])
        for place, box in enumerate(boxes):
            corners = [round(float(corner), 1) for corner in box[:4]]
            color = colors[place] if place < len(colors) else None
            yield [name, color, *corners, round(float(box[4]), 3)]


def _summary(one: GallerySet) -> dict[str, Any]:
    scores = one.scores
    if scores is None:
        return {"summary": "no scores", "partial": False}
    return {"summary": _headline(scores), "partial": scores.partial}


def _headline(scores: Scores) -> str:
    """The overall score of the first measure that has one, with its interval."""
    title = get_benchmark(scores.benchmark).title
    for measure, lines in scores.scores.items():
        value = lines.get(OVERALL)
        if value is not None:
            low, high = (bound if bound is not None else float("nan") for bound in scores.ci95[measure][OVERALL])
            return f"{title}, {measure} {value:.3f} [{low:.3f}, {high:.3f}]"
    return f"{title}, {scores.num_images} images scored"


def _tags(sets: Sequence[GallerySet], found: Iterable[str | None]) -> list[str]:
    """Categories that occur, in the benchmark's order where there is one."""
    occurring = list(dict.fromkeys(tag for tag in found if tag is not None))
    columns = [column for one in sets if one.scores for column in one.scores.columns]
    return [*(c for c in dict.fromkeys(columns) if c in occurring), *(t for t in occurring if t not in columns)]
