"""The checkpoints of a run on disk: sealed when whole, recognised when not, never the last whole one deleted.

A checkpoint is written below ``.partial`` and renamed to ``checkpoint-N`` when all of it is there. Its
``manifest.json`` holds size and SHA-256 of every file, so that a later loss is seen as well.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stage_grpo.checksums import sha256_of

MANIFEST = "manifest.json"
PARTIAL = ".partial"
"""Folder of a run in which checkpoints are written."""
SET_ASIDE = "discarded-"
"""What the name of a folder begins with that is about to be deleted, inside ``.partial``."""


def seal(folder: Path) -> None:
    """Flush every file of a checkpoint to the disk and write its manifest.

    Raises:
        OSError: If the disk refuses.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor() as pool:
        described = list(pool.map(_flush_and_describe, files))
    names = [path.relative_to(folder).as_posix() for path in files]
    content = {"written_at": time.time_ns(), "files": dict(zip(names, described))}
    path = folder / MANIFEST
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _flush(path)
    _flush(folder)


def publish(partial: Path, final: Path) -> None:
    """Rename a sealed checkpoint to its final name; an older one of that name gives way."""
    aside = _set_aside(final) if final.exists() else None
    partial.rename(final)
    _flush(final.parent)
    if aside is not None:
        shutil.rmtree(aside)


def not_written(run: Path, name: str, error: BaseException) -> str:
    """Say that a checkpoint could not be written, what is left, and what to do."""
    kept = sorted(path.name for path in run.glob("checkpoint-*"))
    untouched = f"untouched are {', '.join(kept)}" if kept else "there is no earlier one"
    return f"{name} could not be written to {run} ({error}); {untouched}; free space, then continue with --resume auto"


def defect(folder: Path, hashes: bool = True) -> str | None:
    """Say what is wrong with a checkpoint.

    Args:
        folder: A ``checkpoint-N`` folder.
        hashes: Whether to read all files and compare their hashes; without, presence and sizes are compared.

    Returns:
        One line, or None if the checkpoint is whole.
    """
    files = _files(folder)
    if not files:
        return f"has no readable {MANIFEST}, so its writing did not end"
    for name, known in files.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != known["size"]:
            return f"is torn: {name} has {path.stat().st_size} of {known['size']} bytes"
    if hashes:
        with ThreadPoolExecutor() as pool:
            found = pool.map(sha256_of, [folder / name for name in files])
        for (name, known), digest in zip(files.items(), found):
            if digest != known["sha256"]:
                return f"is damaged: {name} no longer has the hash it was written with"
    return None


def newest_whole(run: Path) -> tuple[Path | None, dict[Path, str]]:
    """Find the whole checkpoint of a run that was written last.

    Returns:
        The checkpoint, or None; and the defects of those that were written later and passed over.
    """
    skipped: dict[Path, str] = {}
    for folder in _newest_first(run):
        wrong = defect(folder)
        if wrong is None:
            return folder, skipped
        skipped[folder] = wrong
    return None, skipped


def rotate(run: Path, limit: int | None, protected: Collection[Path] = ()) -> None:
    """Delete the oldest whole checkpoints beyond a limit. Torn ones do not count, and stay to be looked at.

    Args:
        run: Output folder of the run.
        limit: Whole checkpoints to keep, at least 1; None keeps all.
        protected: Checkpoints to keep in any case.
    """
    if limit is None:
        return
    whole = [folder for folder in _newest_first(run) if defect(folder, hashes=False) is None]
    kept = {folder.resolve() for folder in protected}
    for folder in whole[max(1, limit) :]:
        if folder.resolve() not in kept:
            _discard(folder)


def _discard(folder: Path) -> None:
    """Delete a checkpoint, out of sight first: one that is half deleted must not be found."""
    shutil.rmtree(_set_aside(folder))


def _set_aside(folder: Path) -> Path:
    hidden = folder.parent / PARTIAL / f"{SET_ASIDE}{folder.name}"
    hidden.parent.mkdir(exist_ok=True)
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    return hidden


def _newest_first(run: Path) -> list[Path]:
    found = [path for path in run.glob("checkpoint-*") if path.is_dir() and path.name.split("-")[-1].isdigit()]
    return sorted(found, key=_written_at, reverse=True)


def _written_at(folder: Path) -> int:
    """Nanoseconds; by the clock rather than by the step, because a run may have gone back to an older checkpoint."""
    written: Any = _manifest(folder).get("written_at")
    return written if isinstance(written, int) else folder.stat().st_mtime_ns


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of each file of the manifest; empty if the manifest cannot be what :func:`seal` wrote."""
    files = _manifest(folder).get("files")
    if not isinstance(files, dict):
        return {}
    described = all(isinstance(known, dict) and {"size", "sha256"} <= known.keys() for known in files.values())
    return files if described else {}


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def _flush_and_describe(path: Path) -> dict[str, Any]:
    _flush(path)
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
