"""Features of images and texts by CLIP, and what rewards made of them share: loading, and what cannot be scored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stage_grpo.rewards.base import RewardResult
from stage_grpo.rewards.batching import (
    ModelOptions,
    batches,
    choose_batch_size,
    pick_device,
    unique_texts,
    weights_folder,
)
from stage_grpo.rewards.clip_pixels import Pixels, crop_pixels

ACTIVATIONS_PER_FEATURE = 16
"""Numbers that a transformer layer holds for each of a token's features: input, q, k, v, and 2 x 4 in the MLP."""


@contextmanager
def _unsplit() -> Iterator[None]:
    """Loads a reward's model whole while a run trains with ZeRO-3, which would leave every process a share of it."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def load_model(model_class: Any, folder: Path, device: str, dtype: str, **arguments: Any) -> Any:
    """A model of ``transformers`` from a folder, ready to judge and never trained.

    Args:
        model_class: Class whose ``from_pretrained`` reads it.
        folder: In transformers' layout.
        device: Where it goes.
        dtype: Of its weights.
        **arguments: Of the class's constructor.

    Raises:
        ValueError: The folder lacks weights, which would otherwise be drawn at random.
    """
    with _unsplit():
        model, report = model_class.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True, **arguments
        )
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise ValueError(
            f"{folder} lacks {len(wrong)} weights of {model_class.__name__}, such as {wrong[0]}; get them again"
        )
    return model.eval().requires_grad_(False).to(device)


def load_head(file: Path, num_inputs: int, device: str) -> torch.nn.Sequential:
    """Linear layers in float32, one after the other without activations, that end in one number.

    Args:
        file: safetensors of ``layers.N.weight`` and ``layers.N.bias``, applied in the order of N.
        num_inputs: Features that come in.
        device: Where it goes.

    Raises:
        ValueError: The layers do not fit to one another, or to what comes in or goes out.
    """
    from safetensors.torch import load_file

    tensors = load_file(file)
    places = sorted({int(name.split(".")[1]) for name in tensors})
    widths = [num_inputs]
    layers = []
    for place in places:
        weight, bias = tensors[f"layers.{place}.weight"].float(), tensors[f"layers.{place}.bias"].float()
        layers.append(torch.nn.Linear(weight.shape[1], weight.shape[0], device="meta"))
        layers[-1].load_state_dict({"weight": weight, "bias": bias}, assign=True)
        if weight.shape[1] != widths[-1]:
            break
        widths.append(weight.shape[0])
    if len(widths) != len(places) + 1 or widths[-1] != 1:
        raise ValueError(f"{file} does not lead from {num_inputs} features to one score; get it again")
    return torch.nn.Sequential(*layers).eval().requires_grad_(False).to(device)


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
    reasons: list[str | None] = [_unreadable(image) for image in images]
    good = [place for place, reason in enumerate(reasons) if reason is None]
    if good:
        rgb = [images[place].convert("RGB") for place in good]
        scores[good] = score(rgb, [prompts[place] for place in good]).double().cpu().numpy()
    for place in good:
        if not np.isfinite(scores[place]):
            reasons[place] = f"the score is {scores[place]}; use dtype float32"
            scores[place] = np.nan
    return RewardResult(scores, {"reason": reasons})


def _unreadable(image: Image.Image) -> str | None:
    if min(image.size) == 0:
        return f"the image is empty, {image.width} x {image.height} pixels"
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for truncated and broken files
        return f"the image cannot be read: {error}"
    return None
