"""GroundingDINO in transformers, asked for the phrases of a caption.

Source: arXiv:2303.05499, its phrase mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil

from stage_grpo.rewards.batching import batches
from stage_grpo.rewards.grounding_rules import Caption
from stage_grpo.rewards.loading import load_model
from stage_grpo.types import Box


class PhraseDetector:
    """GroundingDINO, asked for phrases.

    Args:
        folder: Weights, image processor and tokenizer in transformers' layout.
        device: Where it runs.
    """

    def __init__(self, folder: Path, device: str):
        self.device = device
        self._model = load_model(GroundingDinoForObjectDetection, folder, device, "float32")
        self._processor = GroundingDinoImageProcessorPil.from_pretrained(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def detect(
        self, images: Sequence[Image.Image], captions: Sequence[Caption], threshold: float, batch_size: int
    ) -> list[dict[str, list[Box]]]:
        """Finds the phrases of each picture's caption.

        Args:
            images: RGB pictures of any size; those of one size share batches, because padding would change results.
            captions: One for each picture.
            threshold: Phrase score, in [0, 1], above which a box counts.
            batch_size: Pictures at a time.

        Returns:
            For each picture the boxes of each phrase, in shares of its sides.
        """
        found: list[dict[str, list[Box]]] = [{} for _ in images]
        by_size: dict[tuple[int, int], list[int]] = {}
        for index, image in enumerate(images):
            by_size.setdefault(image.size, []).append(index)
        for group in by_size.values():
            for part in batches(len(group), batch_size):
                chosen = group[part]
                scores, boxes = self.phrase_scores([images[i] for i in chosen], [captions[i] for i in chosen])
                for place, index in enumerate(chosen):
                    found[index] = _above(scores[place], boxes[place], captions[index], threshold)
        return found

    @torch.inference_mode()
    def phrase_scores(
        self, images: Sequence[Image.Image], captions: Sequence[Caption]
    ) -> tuple[list[Float[Tensor, "phrases queries"]], Float[Tensor, "images queries 4"]]:
        """Confidence of each phrase at each query, and where the queries are.

        Args:
            images: Pictures of one size.
            captions: One for each picture.

        Returns:
            For each picture scores in [0, 1]; centre x, centre y, width, height in shares of its sides. On the CPU.
        """
        pixels = self._processor([image.convert("RGB") for image in images], return_tensors="pt")
        text = self._tokenizer([caption.text for caption in captions], padding=True, return_tensors="pt")
        output = self._model(**pixels.to(self.device), **text.to(self.device))
        probabilities = output.logits.float().sigmoid().cpu()
        scores = [
            token_shares(text, index, caption) @ probabilities[index].T for index, caption in enumerate(captions)
        ]
        return scores, output.pred_boxes.float().cpu()


def token_shares(encoding: Any, index: int, caption: Caption) -> Float[Tensor, "phrases 256"]:
    """Weight of each token in each phrase: 1 / n for its n tokens, so that a phrase scores the mean of its tokens.

    Args:
        encoding: Tokenized captions.
        index: Place of the caption among them.
        caption: The caption.
    """
    shares = torch.zeros(len(caption.phrases), 256)
    for row, parts in enumerate(caption.spans):
        for start, end in parts:
            first, last = encoding.char_to_token(index, start), encoding.char_to_token(index, end - 1)
            if first is not None and last is not None:
                shares[row, first : last + 1] = 1.0
    return shares / (shares.sum(-1, keepdim=True) + 1e-6)  # the published guard against phrases without a token


def _above(
    scores: Float[Tensor, "phrases queries"], boxes: Float[Tensor, "queries 4"], caption: Caption, threshold: float
) -> dict[str, list[Box]]:
    found: dict[str, list[Box]] = {}
    for phrase, confidences in zip(caption.phrases, scores):
        kept = (confidences > threshold).nonzero().flatten().tolist()
        found.setdefault(phrase, []).extend(
            _corners(boxes[query].tolist(), float(confidences[query])) for query in kept
        )
    return found


def _corners(box: list[float], confidence: float) -> Box:
    x, y, width, height = box
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2, confidence)
