"""A checkpoint of either format, as a folder that transformers can load."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock

from stage_grpo.checkpoints.configs import MODEL_TYPES, ORIGINAL
from stage_grpo.checkpoints.convert import convert
from stage_grpo.checkpoints.errors import need, read_json
from stage_grpo.checkpoints.manifest import is_current

SUFFIX = ".transformers"
"""Added to a folder's name to name its converted copy."""
ON_THE_HUB = {f"deepseek-ai/Janus-Pro-{size}": f"deepseek-community/Janus-Pro-{size}" for size in ("1B", "7B")}
"""Published checkpoints in the original format -> the same weights in transformers' format."""


def as_transformers(path: str | Path) -> Path:
    """Give a checkpoint in transformers' format.

    A checkpoint in DeepSeek's original format is converted once, into a folder beside it (``Janus-Pro-7B`` into
    ``Janus-Pro-7B.transformers``), and the copy is used again as long as the original's files are unchanged. Processes
    that ask at the same time wait for one of them to convert.

    Args:
        path: Checkpoint folder.

    Returns:
        The folder itself, unless it is in the original format; then its converted copy.

    Raises:
        ValueError: If the checkpoint cannot be converted, see `stage_grpo.checkpoints.convert`, or if there is no
            converted copy and the folder beside it cannot be written.
    """
    folder = Path(path).resolve()
    if not is_original(folder):
        return Path(path)
    cached = folder.with_name(folder.name + SUFFIX)
    if is_current(cached, folder):
        return cached
    need(
        os.access(folder.parent, os.W_OK),
        f"{folder} is in DeepSeek's format and {cached} cannot be written; "
        f"run `stage convert {folder} ELSEWHERE` and use that folder",
    )
    with FileLock(folder.with_name(f".{cached.name}.lock")):
        return cached if is_current(cached, folder) else convert(folder, cached, overwrite=True)


def is_original(folder: Path) -> bool:
    """Whether a folder holds a checkpoint in DeepSeek's original format."""
    config = folder / "config.json"
    return config.is_file() and MODEL_TYPES.get(str(read_json(config).get("model_type"))) == ORIGINAL


def remedy_on_the_hub(name: str, key: str = "model") -> str:
    """What to do with a hub name whose checkpoint is in the original format, which is read from a folder alone."""
    folder = name.split("/")[-1]
    remedy = f"hf download {name} --local-dir {folder}, then --{key} {folder}"
    return f"{remedy}; or --{key} {ON_THE_HUB[name]}" if name in ON_THE_HUB else remedy
