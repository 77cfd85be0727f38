"""GIT in transformers, asked questions that are answered by yes or no.

Source: arXiv:2205.14100.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, GitForCausalLM

from stage_grpo.rewards.loading import load_model


class YesNoModel:
    """GIT, asked questions that are answered by yes or no.

    Args:
        folder: Weights, image processor and tokenizer in transformers' layout.
        device: Where it runs.
        dtype: Of its weights and arithmetic, by name.
    """

    def __init__(self, folder: Path, device: str, dtype: str):
        self.device = device
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._model = load_model(GitForCausalLM, folder, device, dtype)
        self._processor = CLIPImageProcessorPil.from_pretrained(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._yes, self._no = self._tokenizer.convert_tokens_to_ids(["yes", "no"])

    @torch.inference_mode()
    def p_yes(self, images: Sequence[Image.Image], asked: Sequence[Sequence[str]]) -> list[list[float]]:
        """Probability of "yes" where only "yes" and "no" are possible, in [0, 1], for each question of each picture.

        Args:
            images: RGB pictures of any size; each goes once through the image encoder and through the text layers,
                where pictures see themselves alone.
            asked: Questions about each.
        """
        pixels = self._processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        beginning = torch.full((len(images), 1), self._tokenizer.cls_token_id, device=self.device)
        seen = self._model(
            pixel_values=pixels.to(self.device, self._dtype), input_ids=beginning, use_cache=True, logits_to_keep=1
        ).past_key_values
        owners = [index for index, texts in enumerate(asked) for _ in texts]
        seen.batch_select_indices(torch.tensor(owners, device=self.device))
        ids, ends = self._tokens([text for texts in asked for text in texts])
        # Padding stands behind the last token, which is causal: it needs no mask. The picture takes no places.
        places = torch.arange(1, ids.shape[1] + 1, device=self.device)[None]
        logits = self._model(input_ids=ids, past_key_values=seen, position_ids=places, use_cache=True).logits
        last = logits[torch.arange(len(ids), device=self.device), ends].float()
        p_yes = iter((last[:, self._yes] - last[:, self._no]).sigmoid().tolist())
        return [[next(p_yes) for _ in texts] for texts in asked]

    def _tokens(self, texts: list[str]) -> tuple[Int[Tensor, "questions length"], Int[Tensor, " questions"]]:
        """Token ids without [CLS] and [SEP], padded on the right, and the place of each last one."""
        rows = [self._tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        longest = max(map(len, rows))
        ids = [row + [self._tokenizer.pad_token_id] * (longest - len(row)) for row in rows]
        ends = [len(row) - 1 for row in rows]
        return torch.tensor(ids, device=self.device), torch.tensor(ends, device=self.device)
