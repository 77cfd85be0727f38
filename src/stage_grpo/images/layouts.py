"""Where the images of a benchmark lie: the folders that each benchmark's official scorer reads.

===============  ======================================================================================
geneval          ``00000/metadata.jsonl``, ``00000/samples/00000.png``, ``00000/grid.png``
t2i_compbench    ``color_val/samples/a green bench and a red car_000000.png``
hps              ``anime/00000.jpg``, numbered in each style
flat             ``00000.png``; further images of a prompt ``00000_1.png``, ``00000_2.png``, ...
===============  ======================================================================================

Source: github.com/djghosh13/geneval, Karine-Huang/T2I-CompBench and tgxs002/HPSv2.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from stage_grpo.types import PromptRow

_LONGEST_NAME = 255
"""Bytes that a file name may have on the usual file systems."""


@dataclass(frozen=True)
class PlannedImage:
    """One image of a set, whether it exists or not.

    Attributes:
        path: Where it lies within the folder of the set.
        index: Place of its prompt in the list of prompts, from 0.
        sample: Which image of its prompt it is, from 0.
        row: Its prompt.
    """

    path: PurePosixPath
    index: int
    sample: int
    row: PromptRow


@dataclass(frozen=True)
class ImageLayout:
    """How a benchmark's images are arranged.

    Attributes:
        name: What it is called.
        image_path: Path of an image, of its prompt, the prompt's place in its numbering and the image's own number.
        own_files: What the paths of images look like, and of the files that describe a prompt.
        numbered_by_tag: Whether prompts are numbered in each category (the metadata's ``tag``) or through all.
        describes_prompts: Whether every prompt has a folder with ``metadata.jsonl`` and ``grid.png``.
        shares_folder: Whether other files may lie in the folder of the set; the official scorer of HPS takes
            everything there for a style.
    """

    name: str
    image_path: Callable[[PromptRow, int, int], PurePosixPath]
    own_files: re.Pattern[str]
    numbered_by_tag: bool = False
    describes_prompts: bool = False
    shares_folder: bool = True


def plan_images(layout: ImageLayout, rows: Sequence[PromptRow], num_images: int) -> list[PlannedImage]:
    """All images of a set, prompt by prompt.

    Args:
        layout: How they are arranged.
        rows: The prompts.
        num_images: Images of each.

    Raises:
        ValueError: No prompts, fewer than one image, or prompts whose images cannot have files of their own.
    """
    if not rows or num_images < 1:
        raise ValueError(f"{len(rows)} prompts and num_images={num_images}: give at least one of each")
    places = _numbering(layout, rows)
    planned = [
        PlannedImage(layout.image_path(row, place, sample), index, sample, row)
        for index, (row, place) in enumerate(zip(rows, places))
        for sample in range(num_images)
    ]
    seen: dict[PurePosixPath, PlannedImage] = {}
    for image in planned:
        if image.path in seen:
            raise ValueError(
                f"prompts {seen[image.path].index} and {image.index} ({image.row.prompt!r}) would both write "
                f"{image.path}; keep each prompt of a category once"
            )
        seen[image.path] = image
    return planned


def side_folder(layout: ImageLayout, images_dir: Path) -> Path:
    """The folder for what is not an image (``manifest.jsonl``): a sibling of the set, or the set itself."""
    return images_dir if layout.shares_folder else beside(images_dir, ".about")


def beside(path: Path, ending: str) -> Path:
    """The sibling of a file or folder whose name is longer by ``ending``; the path may be "." or lead through ".."."""
    whole = Path(os.path.abspath(path))
    return whole.with_name(whole.name + ending)


def _numbering(layout: ImageLayout, rows: Sequence[PromptRow]) -> list[int]:
    if not layout.numbered_by_tag:
        return list(range(len(rows)))
    counts: Counter[str] = Counter()
    places = []
    for row in rows:
        tag = _tag(row)
        places.append(counts[tag])
        counts[tag] += 1
    return places


def _tag(row: PromptRow) -> str:
    tag = row.metadata.get("tag")
    if not isinstance(tag, str) or not tag or "/" in tag or tag.startswith("."):
        raise ValueError(f"prompt {row.prompt!r} has tag {tag!r}; its images go into a folder of that name")
    return tag


def _geneval_path(row: PromptRow, place: int, sample: int) -> PurePosixPath:
    return PurePosixPath(f"{place:05d}", "samples", f"{sample:05d}.png")


def _t2i_compbench_path(row: PromptRow, place: int, sample: int) -> PurePosixPath:
    name = f"{row.prompt}_{sample:06d}.png"
    if "/" in name or "\0" in name or name.startswith(".") or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"prompt {row.prompt!r} cannot be part of a file name (no slash, no dot in front, at most "
            f"{_LONGEST_NAME - len(name.encode()) + len(row.prompt.encode())} bytes), as T2I-CompBench wants it"
        )
    return PurePosixPath(f"{_tag(row)}_val", "samples", name)


def _hps_path(row: PromptRow, place: int, sample: int) -> PurePosixPath:
    return PurePosixPath(_tag(row), _numbered(place, sample, "jpg"))


def _flat_path(row: PromptRow, place: int, sample: int) -> PurePosixPath:
    return PurePosixPath(_numbered(place, sample, "png"))


def _numbered(place: int, sample: int, suffix: str) -> str:
    return f"{place:05d}.{suffix}" if sample == 0 else f"{place:05d}_{sample}.{suffix}"


LAYOUTS: dict[str, ImageLayout] = {
    layout.name: layout
    for layout in (
        ImageLayout(
            "geneval",
            _geneval_path,
            re.compile(r"\d{5,}/(samples/\d{5,}\.png|metadata\.jsonl|grid\.png)"),
            describes_prompts=True,
        ),
        ImageLayout("t2i_compbench", _t2i_compbench_path, re.compile(r"[^/]+_val/samples/[^/]+_\d{6,}\.png")),
        ImageLayout(
            "hps", _hps_path, re.compile(r"[^/]+/\d{5,}(_\d+)?\.jpg"), numbered_by_tag=True, shares_folder=False
        ),
        ImageLayout("flat", _flat_path, re.compile(r"\d{5,}(_\d+)?\.png")),
    )
}
