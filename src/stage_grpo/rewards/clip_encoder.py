"""Features of images and texts by CLIP, and what rewards made of them share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stage_grpo.rewards.base import Reward, RewardResult
from stage_grpo.rewards.batching import (
    ModelOptions,
    batches,
    choose_batch_size,
    pick_device,
    unique_texts,
    weights_folder,
)
from stage_grpo.rewards.clip_pixels import Pixels, crop_pixels
from stage_grpo.rewards.loading import load_model
from stage_grpo.rewards.readable import drop_infinite, unreadable
from stage_grpo.types import Metadata

ACTIVATIONS_PER_FEATURE = 16
"""Numbers that a transformer layer holds for each of a token's features: input, q, k, v, and 2 x 4 in the MLP."""


@dataclass
class ClipEncoder:
    """Features of length 1 of images and texts by a ``CLIPModel``, which is loaded when first asked for.

    Attributes:
        options: Folder, device, precision and batch size.
        weights: Name of the weights in the cache, unless the options name a folder.
        pixels: Makes an image what the model takes.
        clean: Applied to every text before it is tokenised.
    """

    options: ModelOptions
    weights: str
    pixels: Pixels = crop_pixels
    clean: Callable[[str], str] = str

    @cached_property
    def folder(self) -> Path:
        """Where the model lies."""
        return weights_folder(self.options.weights, self.weights)

    @cached_property
    def device(self) -> str:
        """Where it runs."""
        return pick_device(self.options.device)

    @cached_property
    def model(self) -> Any:
        """The ``CLIPModel``."""
        from transformers import CLIPModel

        return load_model(CLIPModel, self.folder, self.device, self.options.dtype)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        from transformers import CLIPTokenizer

        return CLIPTokenizer.from_pretrained(self.folder, local_files_only=True)

    @property
    def batch_size(self) -> int:
        """Images, or texts, at a time."""
        vision = self.model.config.vision_config
        size = bytes_per_image(vision.image_size, vision.patch_size, vision.hidden_size, self.options.dtype)
        return choose_batch_size(self.options.batch_size, size, self.device)

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> Float[Tensor, "B E"]:
        """Features of RGB images, float32, each row of length 1."""
        side = self.model.config.vision_config.image_size
        found = []
        for batch in batches(len(images), self.batch_size):
            pixels = torch.stack([self.pixels(image, side) for image in images[batch]])
            features = self.model.get_image_features(pixel_values=pixels.to(self.device, self.model.dtype))
            found.append(features.pooler_output.float())
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "B E"]:
        """Features of texts, float32, each row of length 1; equal texts are encoded once."""
        unique, index = unique_texts([self.clean(text) for text in texts])
        length = self.model.config.text_config.max_position_embeddings
        found = []
        for batch in batches(len(unique), self.batch_size):
            # No mask: attention is causal and the feature is read at the end of the text, before any padding.
            ids = self.tokenizer(
                unique[batch], padding=True, truncation=True, max_length=length, return_tensors="pt"
            ).input_ids
            found.append(self.model.get_text_features(input_ids=ids.to(self.device)).pooler_output.float())
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)[index]

    def cosine(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Float[Tensor, " B"]:
        """Cosine of each RGB image and its text, in [-1, 1], float32."""
        return (self.image_features(images) * self.text_features(texts)).sum(-1)


def bytes_per_image(image_size: int, patch_size: int, num_features: int, dtype: str) -> int:
    """What a vision transformer's activations take for one image, roughly.

    Args:
        image_size: Side in pixels.
        patch_size: Side of a patch in pixels.
        num_features: Of a token.
        dtype: Name of the dtype.
    """
    num_tokens = (image_size // patch_size) ** 2 + 1
    numbers = num_tokens * num_features * ACTIVATIONS_PER_FEATURE + 3 * image_size**2
    return numbers * getattr(torch, dtype).itemsize


def score_readable(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    score: Callable[[list[Image.Image], list[str]], Float[Tensor, " R"]],
) -> RewardResult:
    """Scores the images that can be read.

    Args:
        images: B images of any mode and size.
        prompts: B prompts.
        score: Gives R readable images, as RGB, and their prompts one number each.

    Returns:
        Scores with NaN, and details ``reason`` that say why, where an image cannot be read or the number is not
        finite; ``reason`` is None elsewhere.
    """
    scores = np.full(len(images), np.nan)
    reasons = [unreadable(image) for image in images]
    good = [place for place, reason in enumerate(reasons) if reason is None]
    if good:
        chosen = [images[place] for place in good]
        rgb = [image if image.mode == "RGB" else image.convert("RGB") for image in chosen]  # the latter always copies
        scores[good] = score(rgb, [prompts[place] for place in good]).double().cpu().numpy()
    drop_infinite(scores, reasons)
    return RewardResult(scores, {"reason": reasons})


class ImageTextReward(Reward):
    """One number for each image that can be read, NaN and the reason for the others. A subclass writes ``_score``."""

    Options = ModelOptions

    def compute(self, images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> RewardResult:
        """Looks at every image and every different prompt once. See :meth:`Reward.compute`.

        Raises:
            ValueError: the weights are missing or not whole.
        """
        return score_readable(images, prompts, self._score)

    @abstractmethod
    def _score(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " B"]:
        """Scores of RGB images."""
