"""What a set of images was made by: one checksum of a policy's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stage_grpo.checksums import sha256_of

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "*.index.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def checkpoint_sha256(model: str | Path, base: str | Path | None = None) -> str:
    """SHA-256 over the names and checksums of the files that make a policy: weights, configs and tokenizer.

    Other files of the folder (a run's record, its optimiser) play no part, so a copy of the weights has the same hash.

    Args:
        model: Checkpoint folder of either format, folder of an adapter, or a hub name whose files are in the hub's
            local cache.
        base: Checkpoint that an adapter belongs to; by default the one that its config names.

    Returns:
        64 hexadecimal digits. An adapter's cover its base.

    Raises:
        ValueError: There is no such folder, and the hub's cache lacks the name.
    """
    folder = Path(model)
    if not folder.is_dir():
        folder = _cached_snapshot(str(model))
    if not (folder / _ADAPTER[0]).is_file():
        return _digest(_described(_files(folder, (*_WEIGHTS, *_CONFIGS))))
    named = json.loads((folder / _ADAPTER[0]).read_text(encoding="utf-8")).get("base_model_name_or_path")
    described = _described(_files(folder, _ADAPTER))
    return _digest([*described, f"base {checkpoint_sha256(base or named)}"])


def glob_weights(folder: Path) -> list[Path]:
    """Files of a checkpoint folder that hold weights, an adapter's included."""
    return _files(folder, _WEIGHTS)


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def _described(files: list[Path]) -> list[str]:
    with ThreadPoolExecutor() as pool:
        return [f"{path.name} {digest}" for path, digest in zip(files, pool.map(sha256_of, files))]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _cached_snapshot(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise ValueError(f"model={name!r} is neither a folder nor a hub name; correct it") from error
    if not isinstance(config, str):
        raise ValueError(f"model={name!r} is not in the hub's local cache; load it once, or give its folder")
    return Path(config).parent
