"""Fetch official prompt files into a cache, every byte checked, and find them again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from stage_grpo.checksums import sha256_of
from stage_grpo.download import Patience, check_sha256, download_checked
from stage_grpo.prompt_sets.sources import PromptSet, RemoteFile, get_prompt_set


def cache_folder() -> Path:
    """Folder of the fetched sets: ``$STAGE_DATA``, else ``stage-grpo/data`` in the user's cache folder."""
    chosen = os.environ.get("STAGE_DATA")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "stage-grpo" / "data"


def fetch(
    prompt_set: PromptSet,
    folder: Path | None = None,
    source: Path | None = None,
    patience: Patience | None = None,
) -> list[Path]:
    """Makes a prompt set present: every file whole and with its checksum, or not there at all.

    Files that are present and right are left alone, so a second call needs no network.

    Args:
        prompt_set: What to fetch; see ``sources.PROMPT_SETS``.
        folder: Where its files go; by default its own folder in :func:`cache_folder`.
        source: Copy from here instead of the network: the file itself, or a folder that holds the files under
            their names here or at home.
        patience: Tries and waits of a download.

    Returns:
        The files, in the set's order.

    Raises:
        ValueError: A file with the wrong checksum, already there or newly arrived (both checksums are named; a new
            one is not kept), or ``source`` lacks a file.
        OSError: The network, or the folder, does not let us; the message says where a file may be put by hand.
    """
    folder = folder or cache_folder() / prompt_set.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder} ({error.strerror}); choose another by --out") from error
    return [_fetch_file(prompt_set, file, folder, source, patience) for file in prompt_set.files]


def locate(name: str, folder: Path | None = None) -> list[Path]:
    """Files of a set that was fetched before, in the set's order. Never uses the network.

    Args:
        name: Name of the set.
        folder: Where its files are, if not in the cache.

    Raises:
        ValueError: Unknown set, or a file of it is missing or altered; the message says how to fetch it.
    """
    prompt_set = get_prompt_set(name)
    place = folder or cache_folder() / name
    state = presence(prompt_set, place)
    if state != "present":
        where = f" --out {folder}" if folder else ""
        raise ValueError(f"prompt set {name!r} is {state} in {place}; get it by: stage data fetch {name}{where}")
    return [place / file.name for file in prompt_set.files]


def presence(prompt_set: PromptSet, folder: Path | None = None) -> str:
    """Whether a set is "present", "missing", "incomplete" or "altered" (a file with another checksum)."""
    folder = folder or cache_folder() / prompt_set.name
    there = [file for file in prompt_set.files if (folder / file.name).is_file()]
    expected = {file.name: _checksum(file, folder) for file in there}
    if any(sha256 and sha256_of(folder / name) != sha256 for name, sha256 in expected.items()):
        return "altered"
    if not there:
        return "missing"
    is_whole = len(there) == len(prompt_set.files) and all(expected.values())
    return "present" if is_whole else "incomplete"


def _fetch_file(
    prompt_set: PromptSet, file: RemoteFile, folder: Path, source: Path | None, patience: Patience | None
) -> Path:
    target = folder / file.name
    sha256 = _checksum(file, folder)
    if not target.exists():
        # Named after its checksum, so that bytes of another version are never continued.
        part = folder / f".{file.name}.{(sha256 or 'unknown')[:12]}.part"
        if source is not None:
            _copy_file(prompt_set, file, sha256, source, part)
        else:
            by_hand = f"get it elsewhere and put it at {target}, or pass it by --from PATH"
            download_checked(file.address, part, file.name, sha256 or "", by_hand, patience)
        try:
            _check_content(file, part)
        except ValueError:
            part.unlink()
            raise
        part.replace(target)
    elif sha256 is not None:
        check_sha256(target, sha256, f"{target} is not the official file", "remove it to fetch it again")
        return target
    if sha256 is None:
        _check_content(file, target)
        _record(file, folder).write_text(sha256_of(target) + "\n", encoding="utf-8")
    return target


def _record(file: RemoteFile, folder: Path) -> Path:
    """Where the checksum of a file is kept that has none beforehand."""
    return folder / f"{file.name}.sha256"


def _checksum(file: RemoteFile, folder: Path) -> str | None:
    """What a file's SHA-256 must be, or None if nothing says so yet."""
    if file.sha256 is not None:
        return file.sha256
    try:
        return _record(file, folder).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def _check_content(file: RemoteFile, path: Path) -> None:
    """Refuse a page that asks to log in, where no checksum tells: JSON files must be lists of texts."""
    if file.sha256 is not None or not file.name.endswith(".json"):
        return
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        prompts = None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"what came for {file.name} is no JSON list of prompts; get it from {file.address}")


def _copy_file(prompt_set: PromptSet, file: RemoteFile, sha256: str | None, source: Path, part: Path) -> None:
    found = _find_in(source, prompt_set, file)
    try:
        shutil.copyfile(found, part)
        check_sha256(part, sha256 or "", f"{found} is not the official file", f"get it from {file.address}")
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _find_in(source: Path, prompt_set: PromptSet, file: RemoteFile) -> Path:
    if source.is_file() and len(prompt_set.files) == 1:
        return source
    if source.is_file():
        names = ", ".join(file.name for file in prompt_set.files)
        raise ValueError(f"--from {source} is one file; give the folder that holds {names}")
    names = (file.name, file.upstream_name)
    places = [folder / name for folder in (source, source / prompt_set.name) for name in names]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ValueError(f"--from {source} holds no {' or '.join(dict.fromkeys(names))}; get it from {file.address}")
    return found
