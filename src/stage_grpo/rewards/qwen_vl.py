"""Qwen2.5-VL in this process: one question about one image, answered greedily, in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

from stage_grpo.rewards.batching import batches, choose_batch_size
from stage_grpo.rewards.loading import load_model

MAX_PIXELS = 512 * 512
BYTES_PER_IMAGE = 400_000_000
"""Activations of one image of 512 x 512 pixels and its answer in a model of 7 billion parameters, roughly."""
_BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
_AFTER = "<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"


class QwenVl:
    """A Qwen2.5-VL model with its tokenizer and image processor.

    Args:
        folder: Checkpoint in transformers' layout.
        device: Where it runs.
        dtype: Name of the dtype of its weights.
        batch_size: Images at a time; None: what fits into a share of the memory that the model leaves free.
    """

    def __init__(self, folder: Path, device: str, dtype: str, batch_size: int | None):
        self._batch_size = batch_size
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self._processor.size = {"shortest_edge": 56 * 56, "longest_edge": MAX_PIXELS}
        self._model = load_model(Qwen2_5_VLForConditionalGeneration, folder, device, dtype)

    def answer(self, images: list[Image.Image], questions: list[str], max_tokens: int) -> list[str | Exception]:
        """Ask one question about each of B RGB images.

        Returns:
            B answers.
        """
        answers: list[str | Exception] = []
        batch_size = choose_batch_size(self._batch_size, BYTES_PER_IMAGE, str(self._model.device))
        for part in batches(len(images), batch_size):
            answers += self._answer_batch(images[part], questions[part], max_tokens)
        return answers

    @torch.inference_mode()
    def _answer_batch(self, images: list[Image.Image], questions: list[str], max_tokens: int) -> list[str]:
        pixels = self._processor(images=images, return_tensors="pt")
        # An image takes one place for each square of merged patches.
        places = (pixels["image_grid_thw"].prod(dim=1) // self._processor.merge_size**2).tolist()
        texts = [
            _BEFORE + "<|image_pad|>" * count + _AFTER.replace("{question}", question)
            for count, question in zip(places, questions)
        ]
        tokens = self._tokenizer(texts, return_tensors="pt", padding=True)
        ids: Int[Tensor, "B P"] = tokens["input_ids"].to(self._model.device)
        output = self._model.generate(
            input_ids=ids,
            attention_mask=tokens["attention_mask"].to(ids.device),
            mm_token_type_ids=(ids == self._model.config.image_token_id).int(),
            pixel_values=pixels["pixel_values"].to(ids.device, self._model.dtype),
            image_grid_thw=pixels["image_grid_thw"].to(ids.device),
            max_new_tokens=max_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return self._tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
