"""Getting weights into one cache, checked where a checksum is known, converted once, whole or not there at all.

::

    ~/.cache/stage-grpo/weights/          or $STAGE_WEIGHTS
      hps-v2.1/                           what a reward loads: transformers' layout
        config.json model.safetensors ...
        source.json                       what it was made from
        manifest.json                     size and SHA-256 of every file
      .sources/hps-v2.1/                  files on their way; removed when the folder is ready
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from filelock import FileLock

from stage_grpo.checksums import sha256_of
from stage_grpo.download import Patience, check_sha256, download_checked
from stage_grpo.weights.catalog import WeightEntry, WeightFile, get_entry

SOURCE = "source.json"
"""File of a ready folder that says what it was made from."""


class MissingWeightsError(ValueError):
    """Weights that a reward needs are not in the cache; the message says how to get them."""


def cache_folder() -> Path:
    """Folder of all weights: ``$STAGE_WEIGHTS``, else ``stage-grpo/weights`` in the user's cache folder."""
    chosen = os.environ.get("STAGE_WEIGHTS")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "stage-grpo" / "weights"


def folder(name: str) -> Path:
    """Ready folder of weights, in transformers' layout. Never uses the network.

    Args:
        name: Name of the weights.

    Raises:
        MissingWeightsError: They are not in the cache, or not whole.
        ValueError: No weights of that name.
    """
    get_entry(name)
    place = cache_folder() / name
    wrong = defect(place)
    if wrong is not None:
        what = f"are not in {cache_folder()}" if not place.exists() else f"in {place} are not whole: it {wrong}"
        raise MissingWeightsError(
            f"the weights {name!r} {what}; get them by: stage weights get {name} (add --from PATH for files that you "
            "have already; STAGE_WEIGHTS chooses another folder)"
        )
    return place


def is_present(name: str) -> bool:
    """Whether the ready folder of weights is there with all its files at their full size.

    Raises:
        ValueError: No weights of that name.
    """
    get_entry(name)
    return defect(cache_folder() / name) is None


def defect(place: Path, hashes: bool = False) -> str | None:
    """What is wrong with a ready folder, in words that follow "it", or None if it is whole.

    Args:
        place: The folder.
        hashes: Whether to read all its files and compare their SHA-256.
    """
    if not place.is_dir():
        return "does not exist"
    from stage_grpo import run_checkpoints  # brings torch along

    return run_checkpoints.defect(place, hashes)


def get(name: str, source: Path | None = None, patience: Patience | None = None) -> Path:
    """Makes weights present: downloaded or copied, checked, converted, and sealed by a manifest.

    Weights that are present are left alone unless a ``source`` is given, so a second call needs no network. A call
    that was interrupted is continued by the next one.

    Args:
        name: Name of the weights.
        source: Take files from here where it has them: a folder, or a file of one of the names. Of a folder that is
            not called as the weights, files without a known checksum are only taken from the one in it that is: many
            models have a ``config.json``. The others are downloaded, or taken from the hub's own cache.
        patience: Tries and waits of a download.

    Returns:
        The ready folder.

    Raises:
        ValueError: Unknown weights, a file with the wrong checksum, or files that cannot be converted.
        OSError: The network, or the folder, does not let us; the message says what to do instead.
    """
    entry = get_entry(name)
    root = cache_folder()
    if source is not None and not source.exists():
        raise ValueError(f"--from {source} does not exist; give a file or folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {root} ({error.strerror}); choose another by STAGE_WEIGHTS") from error
    with FileLock(root / f".{name}.lock"):
        if source is None and is_present(name):
            return root / name
        collected = root / ".sources" / name
        collected.mkdir(parents=True, exist_ok=True)
        files = _collect(name, entry, collected, source, patience)
        _make_ready(name, entry, files, root)
        shutil.rmtree(collected)
    return root / name


def _collect(
    name: str, entry: WeightEntry, folder: Path, source: Path | None, patience: Patience | None
) -> dict[str, Path]:
    """Bring every file of an entry together, and the shards that an index among them lists."""
    wanted = list(entry.files)
    files: dict[str, Path] = {}
    for file in wanted:  # grows while an index is read
        found = _find(name, file, source, only_one=len(entry.files) == 1)
        files[file.name] = found or _fetch(name, file, folder, patience)
        if file.name.endswith(".index.json"):
            wanted += _shards(file, files[file.name])
    return files


def _shards(index: WeightFile, path: Path) -> list[WeightFile]:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (UnicodeDecodeError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is no index of weights ({error}); get it again from {index.address}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{path} lists {name!r}, which is no file name; get it again from {index.address}")
    if index.hub is None:
        return [WeightFile(name, url=index.address.rpartition("/")[0] + f"/{name}") for name in names]
    return [WeightFile(name, hub=index.hub, revision=index.revision) for name in names]


def _find(name: str, file: WeightFile, source: Path | None, only_one: bool) -> Path | None:
    """A file that is on this machine already: in the user's folder, or in the hub's cache."""
    if source is not None:
        names = dict.fromkeys((file.name, file.upstream_name))
        places = [place / known for place in _folders(name, file, source) for known in names] or [source]
        # A single file may have been renamed, as GenEval's script does; its checksum tells.
        found = [p for p in places if p.is_file() and (p.name in names or only_one)]
        if found:
            check_sha256(
                found[0], file.sha256 or "", f"{found[0]} is not the official file", f"get it from {file.address}"
            )
            return found[0]
    if file.hub is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(file.hub, file.hub_path or file.name, revision=file.revision)
    right = isinstance(cached, str) and (file.sha256 is None or sha256_of(Path(cached)).startswith(file.sha256))
    return Path(cached) if isinstance(cached, str) and right else None


def _folders(name: str, file: WeightFile, source: Path) -> list[Path]:
    """Where in the user's folder a file is looked for; nowhere if it is none."""
    if not source.is_dir():
        return []
    own = [source / name, *([source] if source.resolve().name == name else [])]
    return own if file.sha256 is None else [*own, source]


def _fetch(name: str, file: WeightFile, folder: Path, patience: Patience | None) -> Path:
    target = folder / file.name
    if target.is_file():  # renamed only after its check
        return target
    by_hand = f"get it elsewhere, put it into FOLDER/{name} and pass it by: stage weights get {name} --from FOLDER"
    if file.hub is not None:
        from huggingface_hub import constants

        if not file.address.startswith(("http://", "https://")):
            raise ValueError(f"HF_ENDPOINT={os.environ['HF_ENDPOINT']!r} is no address; write https://HOST")
        if constants.HF_HUB_OFFLINE:
            raise OSError(f"{file.address} is not downloaded, because HF_HUB_OFFLINE is set; unset it, or {by_hand}")
    # Named after what it should be, so that bytes of another version are never continued.
    version = file.sha256 or file.revision
    part = folder / f".{file.name}.{version[:12].replace('/', '-')}.part"
    download_checked(file.address, part, file.name, file.sha256 or "", by_hand, patience)
    part.replace(target)
    return target


def _make_ready(name: str, entry: WeightEntry, files: dict[str, Path], root: Path) -> None:
    """Convert into a folder beside the final one, seal it, and put it in place."""
    from stage_grpo.run_checkpoints import publish, seal

    partial = root / ".partial" / name
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if entry.convert is None:
            for file_name, path in files.items():
                _place(path, partial / file_name, linked=path.is_relative_to(root))
        else:
            _converter(entry.convert)(dict(files), partial)
        (partial / SOURCE).write_text(json.dumps(_describe(name, entry, files), indent=2) + "\n", encoding="utf-8")
        seal(partial)
        publish(partial, root / name)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _place(path: Path, target: Path, linked: bool) -> None:
    """Copy a file; one of our own is linked instead, which takes no second gigabyte while both are there."""
    try:
        if linked:
            os.link(path, target)
    except OSError:  # a file system without links
        linked = False
    if not linked:
        shutil.copyfile(path, target)


def _converter(target: str) -> Any:
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def _describe(name: str, entry: WeightEntry, files: dict[str, Path]) -> dict[str, Any]:
    known = {file.name: file for file in entry.files}
    return {
        "weights": name,
        "licence": entry.licence,
        "home": entry.home,
        "convert": entry.convert,
        "files": {
            file_name: {
                "address": known[file_name].address if file_name in known else None,
                "sha256": sha256_of(path),
                # A checksum that was not known beforehand says what came, not that it is right.
                "checked": file_name in known and known[file_name].sha256 is not None,
            }
            for file_name, path in files.items()
        },
    }
