"""``conversion.json``: what a converted checkpoint was made from."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from stage_grpo.checkpoints.errors import read_json, write_json
from stage_grpo.checksums import sha256_of

MANIFEST = "conversion.json"
_PACKAGES = ("stage-grpo", "safetensors", "tokenizers", "torch", "transformers")


def describe(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Size in bytes, time of change in nanoseconds and SHA-256 of each file, by its name."""
    return {path.name: {**_stamp(path), "sha256": sha256_of(path)} for path in files}


def write_manifest(folder: Path, **content: Any) -> None:
    """Write the manifest; the versions of the packages that did the work are added."""
    write_json(folder / MANIFEST, {**content, "versions": {name: version(name) for name in _PACKAGES}})


def is_current(folder: Path, src: Path) -> bool:
    """Whether a folder holds a conversion of a checkpoint as it is now.

    Files of unchanged size and time are believed to be unchanged; those of another time are hashed.

    Args:
        folder: Converted checkpoint.
        src: Checkpoint that it should have been made from.

    Raises:
        ValueError: If the folder holds a manifest that is not JSON.
    """
    if not (folder / MANIFEST).is_file():
        return False
    files = read_json(folder / MANIFEST).get("source", {})
    return bool(files) and all(_is_same(src / name, known) for name, known in files.items())


def _is_same(path: Path, known: dict[str, Any]) -> bool:
    if not path.is_file() or path.stat().st_size != known["size"]:
        return False
    return path.stat().st_mtime_ns == known["mtime_ns"] or sha256_of(path) == known["sha256"]


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
