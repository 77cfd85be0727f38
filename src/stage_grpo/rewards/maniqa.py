"""MANIQA: image quality without a reference and without the prompt, by pyiqa."""

from __future__ import annotations

from dataclasses import dataclass
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
    """As :class:`~stage_grpo.rewards.batching.ModelOptions`; ``weights`` is a file of pyiqa's instead of a folder."""


class ManiqaReward(Reward):
    """Quality of the picture as people of the KonIQ-10k set rated it, about [0, 1].

    pyiqa fetches its weights itself, into its own cache. Its licence (PolyForm Noncommercial 1.0.0) forbids commercial
    use. It cuts each image into 20 even pieces, where AR-GRPO's code draws 20 at random: this reward is deterministic.
    Source: arXiv:2204.08958.
    """

    name = "maniqa"
    Options = ManiqaOptions
    extra = "iqa"
    packages = ("pyiqa",)

    def __init__(self, options: Any = None):
        super().__init__(options)
        self._metric: Any = None

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> np.ndarray:
        """Rates the images. See :meth:`Reward.compute`."""
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
    import pyiqa  # pyright: ignore[reportMissingImports]

    return pyiqa.create_metric("maniqa", device=device, as_loss=False, pretrained_model_path=weights)
