"""Generated images on disk, in the layout that GenEval's own tools read and write.

::

    images/
      00000/                 one folder a prompt, numbered without gaps
        metadata.jsonl       one JSON object: {"prompt", "tag", "include", ...}
        samples/00000.png    the images of the prompt
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from stage_grpo.types import Metadata

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MAX_LISTED = 10


@dataclass(frozen=True)
class PromptFolder:
    """The images of one prompt.

    Attributes:
        name: The folder's name, e.g. "00012".
        metadata: What the prompt asks for; holds "prompt" and whatever the benchmark needs ("tag").
        images: Paths of the images, sorted by name.
    """

    name: str
    metadata: Metadata
    images: tuple[Path, ...]


def read_prompt_folders(images_dir: Path) -> list[PromptFolder]:
    """Read a set of generated images, refusing anything incomplete.

    Every image is decoded once, so that a torn file shows here and not after an hour of scoring.

    Args:
        images_dir: The folder of the whole set.

    Returns:
        The prompts in order of their number.

    Raises:
        ValueError: The folder is missing or empty, or holds missing or unreadable metadata, unreadable or torn
            images, prompts with fewer images than the others, or gaps in the numbering. The message lists the first
            ten problems.
    """
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise ValueError(f"{images_dir} is not a folder; generate images first, or correct the path.")
    paths = sorted(p for p in images_dir.iterdir() if p.is_dir() and p.name.isdigit())
    if not paths:
        raise ValueError(
            f"{images_dir} holds no prompt folders; expected {images_dir / '00000'} with metadata.jsonl and"
            " samples/00000.png, and so on."
        )
    problems = _gaps(paths)
    folders = []
    for path in paths:
        metadata = _read_metadata(path / "metadata.jsonl", problems)
        images = _readable_images(path / "samples", problems)
        if metadata is not None and images:
            folders.append(PromptFolder(path.name, metadata, images))
    problems += _uneven(folders)
    if problems:
        raise ValueError(_listing(images_dir, problems))
    return folders


def load_image(path: Path) -> Image.Image:
    """Read one image as RGB, upright as its EXIF orientation says; GenEval's own script reads it so too.

    Args:
        path: An image file.

    Returns:
        The decoded image, RGB, uint8.

    Raises:
        ValueError: The file cannot be read or decoded in full.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"{path}: {reason}; generate this image again.") from error


def _gaps(paths: list[Path]) -> list[str]:
    numbers = {int(p.name) for p in paths}
    missing = sorted(set(range(max(numbers) + 1)) - numbers)
    return [f"{paths[0].parent / f'{number:05d}'}: missing; generate the prompts again" for number in missing]


def _read_metadata(path: Path, problems: list[str]) -> Metadata | None:
    """The one JSON object of the file, or None after noting what is wrong."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        metadata = json.loads(lines[0]) if len(lines) == 1 else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        problems.append(f"{path}: {reason}")
        return None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
        problems.append(f'{path}: expected one JSON object with "prompt" on one line')
        return None
    return metadata


def _readable_images(samples: Path, problems: list[str]) -> tuple[Path, ...]:
    """Paths of the images that decode; notes those that do not."""
    paths = sorted(p for p in samples.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        problems.append(f"{samples}: holds no image ({', '.join(IMAGE_SUFFIXES)})")
    readable = []
    for path in paths:
        try:
            load_image(path)
            readable.append(path)
        except ValueError as error:
            problems.append(str(error))
    return tuple(readable)


def _uneven(folders: list[PromptFolder]) -> list[str]:
    """Prompts with another number of images than most: the sign of an interrupted generation."""
    if not folders:
        return []
    usual, _ = Counter(len(folder.images) for folder in folders).most_common(1)[0]
    return [
        f"{folder.images[0].parent}: {len(folder.images)} images where most prompts have {usual}"
        for folder in folders
        if len(folder.images) != usual
    ]


def _listing(images_dir: Path, problems: list[str]) -> str:
    shown = "\n".join(f"  {problem}" for problem in problems[:_MAX_LISTED])
    more = f"\n  and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
    return f"{images_dir} cannot be evaluated, {len(problems)} problem(s):\n{shown}{more}"
