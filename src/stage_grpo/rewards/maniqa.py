"""MANIQA: image quality without a reference and without the prompt, by pyiqa."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from stage_grpo.rewards.base import Reward
from stage_grpo.rewards.batching import ModelOptions, batches, choose_batch_size, pick_device
from stage_grpo.types import Metadata

_ACTIVATION_BYTES = 1_500_000_000
"""Of one image, which is cut into 20 pieces of 224 x 224 pixels, roughly."""


@dataclass(frozen=True)
class ManiqaOptions(ModelOptions):
    """As :class:`~stage_grpo.rewards.batching.ModelOptions`, in float32 alone.

    ``weights`` is a file instead of a folder: MANIQA's own ``ckpt_koniq10k.pt``, for machines without a network.

    Raises:
        ValueError: another dtype, or what :class:`~stage_grpo.rewards.batching.ModelOptions` refuses.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.dtype != "float32":
            raise ValueError(f"dtype={self.dtype!r}: pyiqa computes maniqa in float32; leave dtype out")


class ManiqaReward(Reward):
    """Quality of the picture as people of the KonIQ-10k set rated it, about [0, 1].

    pyiqa fetches the weights, into its own cache, unless the option ``weights`` names them. Its licence (PolyForm
    Noncommercial 1.0.0) forbids commercial use. It looks at 20 pieces of each image, the upper four rows of an even
    grid of 5 x 5, where AR-GRPO's code draws 20 at random: this reward is deterministic. Source: arXiv:2204.08958.
    """

    name = "maniqa"
    Options = ManiqaOptions
    extra = "iqa"
    packages = ("pyiqa",)

    def __init__(self, options: Any = None):
        super().__init__(options)
        self._metric: Any = None

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> np.ndarray:
        """Rates the images. See :meth:`Reward.compute`.

        Raises:
            ValueError: ``weights`` is no file, or not one of MANIQA's; pyiqa or its torchvision does not import.
        """
        import torch

        device = pick_device(self.options.device)
        if self._metric is None:
            self._metric = _build(device, self.options.weights)
        size = choose_batch_size(self.options.batch_size, _ACTIVATION_BYTES, device)
        scores = []
        with torch.inference_mode():
            for part in batches(len(images), size):
                pixels = [
                    torch.from_numpy(np.asarray(image.convert("RGB")) / np.float32(255)) for image in images[part]
                ]
                for group in _runs_of_one_size(pixels):
                    batch = torch.stack(group).permute(0, 3, 1, 2).to(device)
                    scores += self._metric(batch).reshape(-1).double().cpu().tolist()
        return np.array(scores, dtype=np.float64)


def _runs_of_one_size(pixels: list[Any]) -> list[list[Any]]:
    """Cut a list of pictures where the size changes: a batch has one."""
    runs: list[list[Any]] = []
    for picture in pixels:
        if not runs or runs[-1][0].shape != picture.shape:
            runs.append([])
        runs[-1].append(picture)
    return runs


def _build(device: str, weights: str | None) -> Any:
    """MANIQA by pyiqa, as trained on KonIQ-10k."""
    import torch

    from stage_grpo.weights.convert_clip import read_tensors

    try:
        import pyiqa  # pyright: ignore[reportMissingImports]
        from pyiqa.archs import arch_util, maniqa_arch  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:  # torchvision of another build of torch raises RuntimeError
        remedy = f"install the torchvision that belongs to torch {torch.__version__}, from the same index"
        raise ValueError(f"pyiqa does not import ({error}); {remedy}") from error
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"weights={weights!r} is no file; give MANIQA's ckpt_koniq10k.pt, or leave weights out")
    file = weights or arch_util.load_file_from_url(maniqa_arch.default_model_urls["koniq"])
    with _untrained_vit(maniqa_arch):
        metric = pyiqa.create_metric("maniqa", device=device, as_loss=False, pretrained=False)
    try:
        # Not by pyiqa, which would unpickle whatever the file holds.
        tensors = read_tensors(Path(file))
        metric.net.load_state_dict(arch_util.clean_state_dict(tensors.get("params", tensors)))
    except (ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{file} does not hold MANIQA's weights; give ckpt_koniq10k.pt") from error
    return metric


@contextmanager
def _untrained_vit(module: Any) -> Iterator[None]:
    """Lets pyiqa build its image encoder without fetching weights that MANIQA's own replace at once."""
    kept = module.timm
    module.timm = SimpleNamespace(create_model=lambda name, pretrained: kept.create_model(name, pretrained=False))
    try:
        yield
    finally:
        module.timm = kept
