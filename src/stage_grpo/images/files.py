"""One generated image on disk: written whole or not at all, with what it was made from inside the file."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from jaxtyping import Int
from PIL import Image, PngImagePlugin

_KEY = "stage_grpo"
_ENDS = {".png": b"\0\0\0\0IEND\xaeB`\x82", ".jpg": b"\xff\xd9"}
"""Last bytes of a whole file. Decoders forgive their absence, so they are looked at."""
_PARTIAL = re.compile(r"\.(?P<host>.+)\.(?P<pid>\d+)\.\d+\.partial(\.\w+)?")
_STALE_SECONDS = 3600
"""A file takes a second to write: one that has been in the making for an hour was left by a killed process."""
_counter = itertools.count()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees nothing, what was there before, or all of it.

    Args:
        path: The file; its folder is made.
        content: Its bytes.

    Raises:
        OSError: The disk refuses; what was there before stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """A name beside a file to write it under, of its own for every process and every call."""
    return path.with_name(f".{platform.node()}.{os.getpid()}.{next(_counter)}.partial{path.suffix}")


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left half-written, and nothing that a living one may be writing.

    Args:
        folder: Searched with all folders below it; need not exist.
    """
    for path in folder.rglob(".*.partial*"):
        name = _PARTIAL.fullmatch(path.name)
        if name is None:
            continue
        dead = name["host"] == platform.node() and not psutil.pid_exists(int(name["pid"]))
        try:
            stale = time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # its process finished it just now
            continue
        if dead or stale:
            path.unlink(missing_ok=True)


def save_image(path: Path, image: Image.Image, about: Mapping[str, Any]) -> None:
    """Write an RGB image as PNG or JPEG, by its suffix. A killed process leaves no half-written file under the name.

    A JPEG has Pillow's own settings (quality 75, chroma at half the resolution), as HPS's protocol saves its images.

    Args:
        path: The file; its folder is made.
        image: RGB.
        about: What it was made from, as JSON knows it; kept in a text chunk (PNG) or the comment (JPEG).
    """
    text = json.dumps(dict(about), ensure_ascii=True, sort_keys=True)
    buffer = io.BytesIO()
    if path.suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_text(_KEY, text)
        image.save(buffer, "PNG", pnginfo=info)
    else:
        image.save(buffer, "JPEG", comment=text)
    write_whole(path, buffer.getvalue())


def read_about(path: Path) -> dict[str, Any]:
    """What :func:`save_image` wrote beside the pixels; empty for a file of another origin.

    Raises:
        ValueError: The file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            return _about(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path}: not an image ({error}); generate it again") from error


def read_whole(path: Path) -> tuple[bytes, tuple[int, int], dict[str, Any]]:
    """Read an image file and make sure that nothing of it is missing or damaged, as far as its format can tell.

    PNG has a checksum a chunk; of a JPEG the end and the decoding are looked at.

    Returns:
        The bytes of the file, width and height in pixels, and what :func:`read_about` gives.

    Raises:
        ValueError: The file is missing, torn, or no RGB image.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.verify()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            size, mode, about = image.size, image.mode, _about(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a whole image ({error}); generate it again") from error
    if mode != "RGB" or not content.endswith(_ENDS.get(path.suffix, b"")):
        raise ValueError(f"{path}: not a whole RGB image; generate it again")
    return content, size, about


def encode_codes(codes: Int[np.ndarray, " T"]) -> str:
    """Image codes, each under 65,536, as text for ``about``."""
    return base64.b64encode(codes.astype("<u2").tobytes()).decode()


def decode_codes(text: str) -> Int[np.ndarray, " T"]:
    """Image codes from what :func:`encode_codes` made of them.

    Raises:
        ValueError: The text is something else.
    """
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<u2").astype(np.int64)


def _about(image: Image.Image) -> dict[str, Any]:
    text = image.info.get(_KEY, image.info.get("comment"))
    try:
        about = json.loads(text) if text else {}
    except (UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return about if isinstance(about, dict) else {}
