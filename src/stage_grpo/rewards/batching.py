"""What rewards with a model share: their options, device, weights, batches, and prompts that are encoded once.

Nothing here imports torch before it is asked for a device or its memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stage_grpo import weights as weights_cache

DTYPES = ("float32", "bfloat16", "float16")
MEMORY_SHARE = 0.25
"""Share of a device's free memory that one batch of a reward may take: the policy lives there as well."""
MAX_BATCH_SIZE = 256


@dataclass(frozen=True)
class ModelOptions:
    """Options of a reward that runs a model.

    Attributes:
        weights: a ready folder, in transformers' layout, or the name of other weights in the cache
            (``stage weights list``), instead of the reward's own.
        device: ``cpu``, ``cuda`` or ``cuda:N``; None takes this process's GPU if there is one.
        dtype: of the model's weights and arithmetic: float32, bfloat16 or float16.
        batch_size: images at a time; None: what fits into a share of the free memory.

    Raises:
        ValueError: a value of the wrong kind.
    """

    weights: str | None = None
    device: str | None = None
    dtype: str = "float32"
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("weights", "device"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"{name}={value!r} is no text; give a name, or leave {name} out")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; use one of {', '.join(DTYPES)}")
        size = self.batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"batch_size={size!r} must be a whole number of at least 1, or left out")


def pick_device(device: str | None) -> str:
    """The device that a reward runs on: the one asked for, else this process's GPU, else the CPU.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    import torch

    num_gpus = torch.cuda.device_count()
    if device is None:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % num_gpus}" if num_gpus else "cpu"
    if device.startswith("cuda") and not num_gpus:
        raise ValueError(f"device={device!r}, but torch sees no GPU; use cpu, or leave device out")
    return device


def weights_folder(chosen: str | None, name: str) -> Path:
    """Folder to load weights from: the chosen one, or the one in the cache that is chosen by its name, else its own.

    Raises:
        MissingWeightsError: no folder is chosen, and the cache lacks the weights.
        ValueError: what is chosen is no folder.
    """
    if chosen is None or chosen in weights_cache.WEIGHTS:
        return weights_cache.folder(chosen or name)
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise ValueError(f"weights={chosen!r} is no folder; give a folder in transformers' layout, or leave it out")
    return folder


def unique_texts(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different texts in the order of their first use, and for each text its place among them.

    A step scores every prompt for a whole group of images, so that encoding each once saves most of that work.
    """
    places: dict[str, int] = {}
    index = [places.setdefault(text, len(places)) for text in texts]
    return list(places), index


def choose_batch_size(chosen: int | None, bytes_per_image: int, device: str) -> int:
    """Images at a time: the chosen number, else as many as fit into a share of the free memory.

    Args:
        chosen: The option ``batch_size``.
        bytes_per_image: What the model's activations take for one image, roughly.
        device: Where the model runs.

    Returns:
        A number of at least 1 and at most 256, beyond which batches bring no speed.
    """
    if chosen is not None:
        return chosen
    import torch

    from stage_grpo.devices import free_bytes

    budget = MEMORY_SHARE * free_bytes(torch.device(device))
    return max(1, min(MAX_BATCH_SIZE, int(budget // max(1, bytes_per_image))))


def batches(num_items: int, batch_size: int) -> Iterator[slice]:
    """Slices that cut ``num_items`` into runs of at most ``batch_size``."""
    for start in range(0, num_items, batch_size):
        yield slice(start, min(start + batch_size, num_items))
