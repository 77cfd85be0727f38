"""What lies in the folder of an image set: its files, and the records that ``stage generate`` left beside them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stage_grpo.images.files import remove_leftovers
from stage_grpo.images.layouts import LAYOUTS, ImageLayout, side_folder
from stage_grpo.images.problems import Problems
from stage_grpo.types import Metadata

GENERATION = "generation.json"
MANIFEST = "manifest.jsonl"
CODEBOOK = "codebook.safetensors"
DESCRIPTION = "metadata.jsonl"


@dataclass(frozen=True)
class SetFiles:
    """The files of a set.

    Attributes:
        root: Folder of the set.
        side: Folder of what describes it; the same, or a sibling.
        found: Every file within, as path from ``root``, without hidden ones and without links that lead outside.
        entries: Names directly in ``root``, without hidden ones.
        generation: What ``generation.json`` says; empty if there is none.
        manifest: Lines of ``manifest.jsonl`` by path of the image; None if there is none that can be read.
    """

    root: Path
    side: Path
    found: frozenset[PurePosixPath]
    entries: tuple[str, ...]
    generation: dict[str, Any]
    manifest: dict[PurePosixPath, dict[str, Any]] | None

    @property
    def prompt_folders(self) -> list[str]:
        """Names of the numbered folders, in order of their number."""
        return sorted((name for name in self.entries if name.isdecimal() and (self.root / name).is_dir()), key=int)


def read_files(images_dir: Path, layout: ImageLayout, problems: Problems) -> SetFiles:
    """List a set's folder and read its records.

    Args:
        images_dir: The folder.
        layout: How its images are arranged.
        problems: Takes note of links that lead outside and of records that are torn or incomplete.

    Raises:
        ValueError: There is no such folder, or nothing in it.
    """
    if not images_dir.is_dir():
        what = "is a file" if images_dir.exists() else "is not a folder"
        raise ValueError(f"{images_dir} {what}; generate images first, or correct the path.")
    entries = tuple(sorted(name for name in os.listdir(images_dir) if not name.startswith(".")))
    side = side_folder(layout, images_dir)
    if not entries:
        raise ValueError(f"{images_dir} is empty; generate images first, or correct the path.")
    generation = _read_generation(side, problems)
    manifest = _read_manifest(side, problems)
    if generation and manifest is None and not (side / MANIFEST).exists():
        problems.add(
            "unfinished", f"{side}: {GENERATION} without {MANIFEST}; run the same `stage generate` to the end"
        )
    return SetFiles(images_dir, side, _walk(images_dir, problems), entries, generation, manifest)


def begun_layouts(folder: Path) -> list[ImageLayout]:
    """How the set that was begun in a folder is arranged; several layouts if its record cannot be read, none if none.

    Args:
        folder: The folder; need not exist.
    """
    begun = []
    for layout in LAYOUTS.values():
        side = side_folder(layout, folder)
        named = str(_read_generation(side, Problems()).get("layout"))
        if (side / GENERATION).is_file() and (named == layout.name or named not in LAYOUTS):
            begun.append(layout)
    return begun


def remove_set(folder: Path) -> None:
    """Delete the set that was begun in a folder: its images, what describes its prompts, its records. All else stays.

    Args:
        folder: The folder; need not exist.

    Raises:
        OSError: Something cannot be deleted. What is left counts as a set that was begun.
    """
    layouts = begun_layouts(folder)
    sides = {side_folder(layout, folder) for layout in layouts}
    for side in sides:
        (side / MANIFEST).unlink(missing_ok=True)  # first: the set is complete no more
    remove_leftovers(folder)
    found = _walk(folder, Problems())
    own = [path for path in found if any(layout.own_files.fullmatch(str(path)) for layout in layouts)]
    for path in own:
        (folder / path).unlink()
    for side in sides:
        (side / CODEBOOK).unlink(missing_ok=True)
        (side / GENERATION).unlink()
    emptied = {folder / parent for path in own for parent in path.parents} | sides
    for place in sorted(emptied - {folder}, key=lambda place: len(place.parts), reverse=True):
        if not any(place.iterdir()):
            place.rmdir()


def read_description(folder: Path, columns: tuple[str, ...] | None, problems: Problems) -> Metadata | None:
    """The one JSON object of a prompt folder's ``metadata.jsonl``, or None after noting what is wrong with it.

    Args:
        folder: The prompt folder.
        columns: Allowed values of "tag"; None allows any, or none.
        problems: Takes note.
    """
    path = folder / DESCRIPTION
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        metadata = json.loads(lines[0]) if len(lines) == 1 else None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        problems.add("metadata", f"{path}: {reason}; generate this prompt again")
        return None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str) or not metadata["prompt"].strip():
        problems.add("metadata", f'{path}: expected one JSON object with "prompt" on one line')
        return None
    if columns is not None and metadata.get("tag") not in columns:
        problems.add("unknown tag", f"{path}: tag {metadata.get('tag')!r} is none of {', '.join(columns)}")
        return None
    return metadata


def _walk(root: Path, problems: Problems) -> frozenset[PurePosixPath]:
    inside = root.resolve()
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in [*folders, *files]:
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                target = path.resolve()
                problems.add("link", f"{path}: a link to {target}, outside the folder; copy what it leads to instead")
            elif name in files and not name.startswith("."):
                found.append(PurePosixPath(path.relative_to(root).as_posix()))
    return frozenset(found)


def _read_generation(side: Path, problems: Problems) -> dict[str, Any]:
    path = side / GENERATION
    try:
        generation = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.add("records", f"{path}: cannot be read ({error}); generate the set again")
        return {}
    if not isinstance(generation, dict):
        problems.add("records", f"{path}: no JSON object; generate the set again")
        return {}
    return generation


def _read_manifest(side: Path, problems: Problems) -> dict[PurePosixPath, dict[str, Any]] | None:
    path = side / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.add("manifest", f"{path}: cannot be read ({error}); generate the set again")
        return None
    lines: dict[PurePosixPath, dict[str, Any]] = {}
    for number, line in enumerate(filter(str.strip, text.split("\n")), start=1):
        wrong, entry = _parse_line(line)
        image = PurePosixPath(entry.get("path", ""))
        if wrong is None and image in lines:
            wrong = f"{image} is named twice"
        if wrong is not None:
            problems.add("manifest", f"{path}, line {number}: {wrong}; run the same `stage generate` again")
            continue
        lines[image] = entry
    if not lines:
        problems.add("manifest", f"{path}: names no image; run the same `stage generate` again")
        return None
    return lines


def _parse_line(line: str) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a line of the manifest, if anything, and the line."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        return f"torn ({error})", {}
    kinds = {"path": str, "index": int, "sample": int, "prompt": str, "sha256": str}
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in kinds.items()):
        return f"expected an object with {', '.join(kinds)}", {}
    path = PurePosixPath(entry["path"])
    if path.is_absolute() or ".." in path.parts or not path.name or "\\" in entry["path"]:
        return f"path {entry['path']!r} leads out of the folder", {}
    return None, entry
