"""ImageReward: BLIP reads the prompt while it looks at the image, and linear layers make one number of it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stage_grpo.rewards.batching import batches, choose_batch_size, pick_device, weights_folder
from stage_grpo.rewards.clip_encoder import ImageTextReward, bytes_per_image
from stage_grpo.rewards.clip_pixels import crop_pixels
from stage_grpo.rewards.loading import load_head, load_model

MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Of the raw scores of the authors' training set: the published score has mean 0 and spread 1 there."""
MAX_TOKENS = 35
"""Of a prompt; later ones are cut off. Shorter prompts are padded to it, as the original does."""
VISION, TEXT, HEAD = "vision", "text", "head.safetensors"
"""Parts of the folder of weights; the tokenizer's files stand beside them."""


class ImageReward(ImageTextReward):
    """ImageReward v1.0: how much people would like the image for the prompt, about -2 to 2, mean 0 and spread 1.

    Source: arXiv:2304.05977; image-reward 1.5.
    """

    name = "image_reward"
    requirements = ("image-reward",)

    @cached_property
    def folder(self) -> Path:
        """Where the parts lie."""
        return weights_folder(self.options.weights, self.requirements[0])

    @cached_property
    def device(self) -> str:
        """Where they run."""
        return pick_device(self.options.device)

    @cached_property
    def vision(self) -> Any:
        """The ``BlipVisionModel``."""
        from transformers import BlipVisionModel

        return load_model(BlipVisionModel, self.folder / VISION, self.device, self.options.dtype)

    @cached_property
    def text(self) -> Any:
        """The ``BlipTextModel``, whose layers look at the image."""
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        return load_model(BlipTextModel, self.folder / TEXT, self.device, self.options.dtype, add_pooling_layer=False)

    @cached_property
    def head(self) -> torch.nn.Sequential:
        """The linear layers, float32."""
        return load_head(self.folder / HEAD, self.text.config.hidden_size, self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """BERT's tokenizer."""
        from transformers import BertTokenizer

        return BertTokenizer.from_pretrained(self.folder, local_files_only=True)

    @torch.no_grad()
    def _score(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " B"]:
        vision = self.vision.config
        size = bytes_per_image(vision.image_size, vision.patch_size, vision.hidden_size, self.options.dtype)
        batch_size = choose_batch_size(self.options.batch_size, size, self.device)
        raw = torch.cat([self._raw(images[batch], prompts[batch]) for batch in batches(len(images), batch_size)])
        return (raw - MEAN) / STD

    def _raw(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " B"]:
        """What the head says of a batch, before it is centred."""
        pixels = torch.stack([crop_pixels(image, self.vision.config.image_size) for image in images])
        seen = self.vision(pixel_values=pixels.to(self.device, self.vision.dtype)).last_hidden_state
        words = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(self.device)
        read = self.text(
            input_ids=words.input_ids, attention_mask=words.attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return self.head(read[:, 0].float()).squeeze(-1)
