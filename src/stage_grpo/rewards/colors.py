"""Names the colour of an object in a picture: CLIP, asked about the object's pixels before a grey background.

Source: arXiv:2310.11513 and its evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from stage_grpo.prompt_sets.vocabulary import COLORS
from stage_grpo.rewards.clip_encoder import ClipEncoder

BACKGROUND = "#999"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def crop_object(image: Image.Image, box: Sequence[float], mask: Bool[Tensor, "H W"]) -> Image.Image:
    """The part of a picture within a box, grey wherever the object is not.

    Args:
        image: RGB.
        box: ``x1, y1, x2, y2`` in pixels, the last two exclusive; more values are not looked at.
        mask: The object's pixels.
    """
    blank = Image.new("RGB", image.size, color=BACKGROUND)
    x1, y1, x2, y2 = (round(value) for value in box[:4])
    return Image.composite(image, blank, Image.fromarray(mask.numpy())).crop((x1, y1, x2, y2))


class ColorClassifier:
    """Says which of the benchmark's ten colours an object has.

    Args:
        encoder: Features of images and texts; the benchmark uses OpenAI's CLIP ViT-L/14.
    """

    def __init__(self, encoder: ClipEncoder):
        self.encoder = encoder
        self._texts: dict[str, Float[Tensor, "colors E"]] = {}

    def classify(self, crops: Sequence[Image.Image], names: Sequence[str]) -> list[str | None]:
        """Names the colour of the object in each picture.

        Args:
            crops: K pictures of one object each, as `crop_object` makes them.
            names: For each, the name of the object's class.

        Returns:
            K colours; None where the model's output is not finite.
        """
        if not crops:
            return []
        cosines = self.cosines(crops, names)
        finite = cosines.isfinite().all(-1).tolist()
        return [COLORS[index] if ok else None for index, ok in zip(cosines.argmax(-1).tolist(), finite)]

    def cosines(self, crops: Sequence[Image.Image], names: Sequence[str]) -> Float[Tensor, "K colors"]:
        """Cosine of each picture with each colour, in the order of ``vocabulary.COLORS``; in [-1, 1], float32.

        A colour's direction is the mean over the templates. It is made once for a class and kept.

        Args:
            crops: K pictures, at least one.
            names: For each, the name of the object's class.
        """
        new = [name for name in dict.fromkeys(names) if name not in self._texts]
        if new:
            self._texts.update(zip(new, self._encode(new)))
        images = self.encoder.image_features(crops)
        return torch.stack([self._texts[name] @ image for name, image in zip(names, images)])

    def _encode(self, names: list[str]) -> Float[Tensor, "names colors E"]:
        texts = [t.format(color=color, name=name) for name in names for color in COLORS for t in TEMPLATES]
        features = self.encoder.text_features(texts).unflatten(0, (len(names), len(COLORS), len(TEMPLATES)))
        return torch.nn.functional.normalize(features.mean(2), dim=-1)
