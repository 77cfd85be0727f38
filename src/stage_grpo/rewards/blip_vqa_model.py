"""BLIP for visual question answering in transformers, asked questions that are answered by yes or no.

Source: arXiv:2201.12086; the ``vqa_prob`` inference of github.com/Karine-Huang/T2I-CompBench.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, BlipForQuestionAnswering, BlipImageProcessorPil

from stage_grpo.rewards.loading import load_model

MAX_TOKENS = 35
"""Of a question; later ones are cut off."""


class BlipVqa:
    """BLIP, asked questions that are answered by yes or no.

    Args:
        folder: Weights and BERT's tokenizer in transformers' layout.
        device: Where it runs.
        dtype: Of its weights and arithmetic, by name.
    """

    def __init__(self, folder: Path, device: str, dtype: str):
        self.device = device
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._model = load_model(BlipForQuestionAnswering, folder, device, dtype)
        self._tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        side = self._model.config.vision_config.image_size
        # Squeezed to a square, whatever its shape was. Written out, as the files on the hub name another size.
        self._processor = BlipImageProcessorPil(size={"height": side, "width": side})
        # Two tokens behind BERT's own: [DEC] begins an answer, [ENC] a question.
        self._answer = self._model.config.text_config.bos_token_id
        self._question = self._answer + 1
        self._yes_no = self._tokenizer.convert_tokens_to_ids(["yes", "no"])

    @torch.inference_mode()
    def p_yes(self, images: Sequence[Image.Image], asked: Sequence[Sequence[str]]) -> list[list[float]]:
        """Probability of "yes" where only "yes" and "no" are possible, in [0, 1], for each question of each picture.

        Args:
            images: RGB pictures of any size; equal ones go through the image encoder once.
            asked: Questions about each.
        """
        seen, index = self._encoded(images)
        owners = [index[place] for place, texts in enumerate(asked) for _ in texts]
        texts = [text for row in asked for text in row]
        words = self._tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        ids, mask = words.input_ids.to(self.device), words.attention_mask.to(self.device)
        ids[:, 0] = self._question
        read = self._model.text_encoder(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen[owners]
        ).last_hidden_state
        yes, no = self._answers(read, mask.sum(-1)).unbind(-1)
        # The ratio of the two softmax values, without their underflow.
        p_yes = iter((yes - no).sigmoid().tolist())
        return [[next(p_yes) for _ in row] for row in asked]

    def _answers(
        self, read: Float[Tensor, "questions length width"], lengths: Int[Tensor, " questions"]
    ) -> Float[Tensor, "questions 2"]:
        """Logits of "yes" and "no", float32, as first word of the answer to questions that have been read.

        Questions of one length go together: transformers 5.23 passes the answerer's mask of the question's padding on
        under a name that its attention does not look at, so padding would be read as words.
        """
        found = torch.empty(len(read), 2, device=self.device)
        for length in lengths.unique().tolist():
            rows = lengths == length
            logits = self._model.text_decoder(
                input_ids=torch.full((int(rows.sum()), 1), self._answer, device=self.device),
                encoder_hidden_states=read[rows, :length],
                use_cache=False,
            ).logits[:, 0]
            found[rows] = logits[:, self._yes_no].float()
        return found

    def _encoded(self, images: Sequence[Image.Image]) -> tuple[Float[Tensor, "images tokens width"], list[int]]:
        """What the image encoder makes of the different pictures, and the place of each picture among them."""
        places: dict[tuple[tuple[int, int], bytes], int] = {}
        different, index = [], []
        for image in (image.convert("RGB") for image in images):
            place = places.setdefault((image.size, image.tobytes()), len(places))
            if place == len(different):
                different.append(image)
            index.append(place)
        pixels = self._processor(different, return_tensors="pt")["pixel_values"]
        return self._model.vision_model(pixel_values=pixels.to(self.device, self._dtype)).last_hidden_state, index
