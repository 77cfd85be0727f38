"""Reading and writing weights one tensor at a time, so that a checkpoint never has to fit in memory."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stage_grpo.checkpoints.errors import need, read_json, shorten, write_json

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
MAX_SHARD_BYTES = 1_000_000_000
"""Size at which a new output file is begun; with a tensor on its way it bounds the memory that writing needs."""


def weight_files(folder: Path) -> list[Path]:
    """Weight files of a checkpoint: safetensors where present, else pytorch files; all that an index names.

    Raises:
        ValueError: If there are none, or one that the index names is missing.
    """
    for index, single in zip(INDEXES, SINGLES, strict=True):
        if (folder / index).is_file():
            names = sorted(set(read_json(folder / index).get("weight_map", {}).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            need(names and not missing, f"{folder / index} names files that are missing: {shorten(missing)}")
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise ValueError(f"{folder} holds no weights; it needs one of {', '.join([*SINGLES, *INDEXES])}")


def indexed_names(folder: Path) -> set[str]:
    """Tensors that the index of a sharded checkpoint promises; empty without an index."""
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    return set(read_json(index)["weight_map"]) if index else set()


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in one weight file. Nothing in the file is ever executed.

    Raises:
        ValueError: If the file is torn, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - a safetensors handle is not a dictionary
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); download it again") from error
        return
    tensors = _load_pickle(path)
    for name in list(tensors):
        tensor = tensors.pop(name)
        need(isinstance(tensor, Tensor), f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor")
        yield name, tensor


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):  # files written before torch 1.6 cannot be mapped
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is torn, or holds more than tensors, and is refused: {error}") from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is not a whole pytorch file ({error}); download it again") from error
    need(isinstance(content, dict), f"{path} holds a {type(content).__name__}, not named tensors")
    return dict(content)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file, which others may read too: the library's own files are for their owner alone."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


class ShardWriter:
    """Writes tensors as ``model-0000i-of-0000n.safetensors`` with an index, or one ``model.safetensors``."""

    def __init__(self, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder = folder
        self.max_shard_bytes = max_shard_bytes
        self.shards: list[list[str]] = []
        self.num_bytes = 0
        self.dtypes: dict[str, int] = {}
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0

    @property
    def names(self) -> set[str]:
        """Everything added so far."""
        return {name for shard in self.shards for name in shard} | self._waiting.keys()

    def add(self, name: str, tensor: Shaped[Tensor, "*shape"]) -> None:
        """Take one tensor; it is copied, so views into a mapped file are welcome."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.max_shard_bytes:
            self._flush()
        self._waiting[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._waiting_bytes += size
        self.num_bytes += size
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.dtypes[dtype] = self.dtypes.get(dtype, 0) + tensor.numel()

    def close(self) -> None:
        """Write what is left, give the files their final names, and write the index."""
        self._flush()
        count = len(self.shards)
        if count == 1:
            self._temporary(0).rename(self.folder / SINGLES[0])
            return
        weight_map = {}
        for i, names in enumerate(self.shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(i).rename(self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(self.folder / INDEXES[0], index)

    def _flush(self) -> None:
        write_tensors(self._waiting, self._temporary(len(self.shards)))
        self.shards.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _temporary(self, i: int) -> Path:
        return self.folder / f"shard-{i}.safetensors"
