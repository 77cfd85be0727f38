"""A set of generated images on disk, whole or in the making.

Any number of processes work on it without knowing of each other. ``generation.json`` (the settings) is there first and
``manifest.jsonl`` last: a set with a manifest is complete. Every file is written whole or not at all and its content
follows from the settings, so two processes may write the same one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image
from tqdm.auto import tqdm

from stage_grpo.images.files import encode_codes, partial_path, read_whole, save_image, write_whole
from stage_grpo.images.folders import load_image
from stage_grpo.images.layouts import ImageLayout, PlannedImage, side_folder
from stage_grpo.images.set_files import CODEBOOK, GENERATION, MANIFEST

_DECIDING = ("sampling", "prompt_template", "dtype", "checkpoint")
"""Settings that every image and every line of the manifest carry."""
_REMEDY = "name another --out, or give --overwrite to begin anew"


@dataclass(frozen=True)
class GeneratedSet:
    """The files of a set.

    Attributes:
        folder: Where the images lie.
        layout: How they are arranged.
        plan: All images, prompt by prompt.
        settings: Content of ``generation.json``.
    """

    folder: Path
    layout: ImageLayout
    plan: Sequence[PlannedImage]
    settings: Mapping[str, Any]

    @property
    def side(self) -> Path:
        """Folder of everything but images and what belongs to one prompt."""
        return side_folder(self.layout, self.folder)

    def save(self, planned: PlannedImage, image: Image.Image, codes: Int[np.ndarray, " T"]) -> None:
        """Write one image.

        Args:
            planned: Which one.
            image: RGB.
            codes: What it was decoded from.
        """
        save_image(self.folder / planned.path, image, {**self._about(planned), "codes": encode_codes(codes)})

    def lacking(self, images: Sequence[PlannedImage], quiet: bool = True) -> set[str]:
        """Paths, within the set, of those images that are missing, torn, or made from something else.

        Args:
            images: Which ones to look at.
            quiet: Whether to show no progress.
        """
        recorded = self._recorded_hashes()
        hashes = self._hashes(images, quiet)
        return {path for path, digest in hashes.items() if digest is None or digest != recorded.get(path, digest)}

    def describe_prompts(self, images: Sequence[PlannedImage]) -> None:
        """Write ``metadata.jsonl`` and ``grid.png`` of the prompts whose images are all there, if the layout has them.

        Args:
            images: Some or all images of the prompts in question.
        """
        indices = dict.fromkeys(planned.index for planned in images)
        members = [planned for index in indices for planned in self._by_prompt[index]]
        self._describe(list(indices), self._hashes(members))

    def complete(self, codebook: bytes) -> bool:
        """Check the whole set and, if nothing is missing, write what is left and then the manifest.

        Args:
            codebook: Content of ``codebook.safetensors``.

        Returns:
            Whether the set is complete.
        """
        if not all((self.folder / planned.path).is_file() for planned in self.plan):
            return False  # the usual answer while other processes are at work, without decoding anything
        hashes = self._hashes(self.plan)
        if None in hashes.values():
            return False
        self._describe(list(self._by_prompt), hashes)
        _write_changed(self.side / CODEBOOK, codebook)
        entries = [self._entry(planned, hashes[str(planned.path)]) for planned in self.plan]
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
        _write_changed(self.side / MANIFEST, "".join(lines).encode())
        return True

    def reopen(self) -> None:
        """Say that the set is not complete any more."""
        (self.side / MANIFEST).unlink(missing_ok=True)

    @cached_property
    def _by_prompt(self) -> dict[int, list[PlannedImage]]:
        return {index: list(images) for index, images in groupby(self.plan, key=lambda planned: planned.index)}

    @cached_property
    def _shared(self) -> dict[str, Any]:
        return {key: self.settings[key] for key in _DECIDING}

    def _about(self, planned: PlannedImage) -> dict[str, Any]:
        own = {"prompt": planned.row.prompt, "index": planned.index, "sample": planned.sample}
        return {**own, "seed": self.settings["seed"], **self._shared}

    def _sha256(self, planned: PlannedImage) -> str | None:
        """Checksum of an image's file, or None if the image has to be made (again)."""
        try:
            content, size, about = read_whole(self.folder / planned.path)
        except ValueError:
            return None
        about.pop("codes", None)
        whole = size == (self.settings["image_size"],) * 2 and about == self._about(planned)
        return hashlib.sha256(content).hexdigest() if whole else None

    def _hashes(self, images: Sequence[PlannedImage], quiet: bool = True) -> dict[str, str | None]:
        with ThreadPoolExecutor() as pool:
            digests = pool.map(self._sha256, images)
            shown = tqdm(digests, total=len(images), unit="img", desc="check", leave=False, disable=quiet)
            return {str(planned.path): digest for planned, digest in zip(images, shown)}

    def _recorded_hashes(self) -> dict[str, str]:
        """Checksums of the files as the manifest has them, if there is one: a JPEG has none of its own."""
        try:
            lines = (self.side / MANIFEST).read_text(encoding="utf-8").split("\n")  # prompts hold other separators
            return {entry["path"]: entry["sha256"] for entry in map(json.loads, filter(None, lines))}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def _entry(self, planned: PlannedImage, digest: str | None) -> dict[str, Any]:
        tag = {"tag": planned.row.metadata["tag"]} if "tag" in planned.row.metadata else {}
        about = self._about(planned)
        numbers = {key: about.pop(key) for key in ("index", "sample", "prompt")}
        return {"path": planned.path.as_posix(), **numbers, **tag, **about, "sha256": digest}

    def _describe(self, indices: Sequence[int], hashes: Mapping[str, str | None]) -> None:
        if not self.layout.describes_prompts:
            return
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda index: self._describe_prompt(self._by_prompt[index], hashes), indices))

    def _describe_prompt(self, members: Sequence[PlannedImage], hashes: Mapping[str, str | None]) -> None:
        from stage_grpo.run_folder import image_grid  # brings the trainer's callbacks, which readers do not need

        paths = [str(planned.path) for planned in members]
        about = {"images": [hashes[path] for path in paths]}
        if None in about["images"]:
            return
        folder = (self.folder / paths[0]).parent.parent
        row = members[0].row
        text = json.dumps({**row.metadata, "prompt": row.prompt}, ensure_ascii=False) + "\n"
        _write_changed(folder / "metadata.jsonl", text.encode())
        if len(members) > 1 and not _is_grid_of(folder / "grid.png", about):
            images = [load_image(self.folder / path) for path in paths]
            save_image(folder / "grid.png", image_grid(images, math.ceil(math.sqrt(len(images)))), about)


def claim(side: Path, settings: Mapping[str, Any], keep: Sequence[str] = ()) -> dict[str, Any]:
    """Write the settings of a set, or compare them with those that it was begun with.

    Args:
        side: Folder of ``generation.json``.
        settings: What this process would generate with.
        keep: Settings to take over from the set instead of comparing them.

    Returns:
        The settings of the set.

    Raises:
        ValueError: The set was begun with other settings, or its settings cannot be read.
    """
    path = side / GENERATION
    if not path.exists():
        _create(path, json.dumps(settings, indent=2).encode() + b"\n")
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {_REMEDY}") from error
    if not isinstance(begun, dict):
        raise ValueError(f"{path} holds {begun!r} instead of settings; {_REMEDY}")
    # The same weights may have moved to another folder.
    free = {*keep, *(("model",) if settings["checkpoint"] is not None else ())}
    ours, theirs = _flat(settings, free), _flat(begun, free)
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if changed:
        listed = ", ".join(f"{key} was {theirs.get(key)!r} and is {ours.get(key)!r}" for key in changed)
        raise ValueError(f"out={str(side)!r} was begun with other settings: {listed}; {_REMEDY}")
    return begun


def _create(path: Path, content: bytes) -> None:
    """Write a file unless there is one. The first of several processes wins."""
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(content)
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_changed(path: Path, content: bytes) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_whole(path, content)


def _is_grid_of(path: Path, about: Mapping[str, Any]) -> bool:
    try:
        return read_whole(path)[2] == about
    except ValueError:
        return False


def _flat(settings: Mapping[str, Any], free: set[str]) -> dict[str, Any]:
    """Settings and the settings within them by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return {key: value for key, value in flat.items() if key not in free}
