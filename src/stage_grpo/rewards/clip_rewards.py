"""Rewards made of CLIP's features: HPSv2.1, the CLIP score, PickScore and LAION's aesthetic predictor."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stage_grpo.option_checks import is_number
from stage_grpo.rewards.batching import ModelOptions, weights_folder
from stage_grpo.rewards.clip_encoder import ClipEncoder, ImageTextReward
from stage_grpo.rewards.clip_pixels import crop_pixels_rounding_down, pad_pixels
from stage_grpo.rewards.loading import load_head

_STRAIGHT = str.maketrans({**dict.fromkeys("\u02bc\u2018\u2019\u201a\u201b", "'"), **dict.fromkeys("“”„‟", '"')})
HEAD = "model.safetensors"


def clean_text(text: str) -> str:
    """A prompt as open_clip's tokenizer reads it: curly quotes straight, HTML entities as their characters.

    Text in a broken encoding, which open_clip also repairs, is left as it is.
    """
    return html.unescape(html.unescape(text)).translate(_STRAIGHT).strip()


class HpsReward(ImageTextReward):
    """Human preference score v2.1: cosine of image and prompt by a CLIP ViT-H/14 tuned on people's choices.

    The raw cosine, usually 0.2 to 0.35 and spread over about 0.02 within a group; HPSv2's own benchmark multiplies
    it by 100. Oblong images are padded rather than cropped.

    Source: arXiv:2306.09341; ``hpsv2.score``.
    """

    name = "hps"
    requirements = ("hps-v2.1",)

    def __init__(self, options: ModelOptions | None = None):
        super().__init__(options)
        self.encoder = ClipEncoder(self.options, self.requirements[0], pixels=pad_pixels, clean=clean_text)

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " B"]:
        return self.encoder.cosine(images, prompts)


@dataclass(frozen=True)
class ClipOptions(ModelOptions):
    """Options of :class:`ClipReward`.

    Attributes:
        hundred: score 100 * max(cosine, 0), as the CLIP score is usually reported, instead of the cosine.

    Raises:
        ValueError: ``hundred`` is no bool, or what :class:`ModelOptions` refuses.
    """

    hundred: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.hundred, bool):
            raise ValueError(f"hundred={self.hundred!r} is no truth value; give true or false")


class ClipReward(ImageTextReward):
    """CLIP score: cosine of image and prompt by CLIP ViT-L/14, or any other ``CLIPModel`` that ``weights`` names.

    In [-1, 1]; in [0, 100] with ``hundred``. Source: arXiv:2104.08718, without its factor 2.5.
    """

    name = "clip"
    Options = ClipOptions
    requirements = ("clip-vit-large-patch14",)

    def __init__(self, options: ClipOptions | None = None):
        super().__init__(options)
        self.encoder = ClipEncoder(self.options, self.requirements[0])

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " B"]:
        cosine = self.encoder.cosine(images, prompts)
        return 100 * cosine.clamp(min=0) if self.options.hundred else cosine


@dataclass(frozen=True)
class PickscoreOptions(ModelOptions):
    """Options of :class:`PickscoreReward`.

    Attributes:
        scale: what the published score is multiplied by; Flow-GRPO trains with 1 / 26.

    Raises:
        ValueError: ``scale`` is no positive number, or what :class:`ModelOptions` refuses.
    """

    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not (is_number(self.scale) and math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale={self.scale!r} must be a number above 0; 1 gives the published score")


class PickscoreReward(ImageTextReward):
    """PickScore v1: exp(logit scale) times the cosine of image and prompt by a CLIP ViT-H/14 tuned on users' choices.

    Times the option ``scale``; published values lie around 20 to 23. Source: arXiv:2305.01569.
    """

    name = "pickscore"
    Options = PickscoreOptions
    requirements = ("pickscore-v1",)

    def __init__(self, options: PickscoreOptions | None = None):
        super().__init__(options)
        self.encoder = ClipEncoder(self.options, self.requirements[0], pixels=crop_pixels_rounding_down)

    def _score(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " B"]:
        cosine = self.encoder.cosine(images, prompts)
        return self.options.scale * self.encoder.model.logit_scale.float().exp() * cosine


@dataclass(frozen=True)
class AestheticOptions(ModelOptions):
    """Options of :class:`AestheticReward`; ``weights`` names the folder of the predictor.

    Attributes:
        clip_weights: a ready folder of CLIP ViT-L/14 instead of the one in the cache.

    Raises:
        ValueError: ``clip_weights`` is no text, or what :class:`ModelOptions` refuses.
    """

    clip_weights: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.clip_weights is not None and not (isinstance(self.clip_weights, str) and self.clip_weights):
            raise ValueError(f"clip_weights={self.clip_weights!r} is no text; give a folder, or leave it out")


class AestheticReward(ImageTextReward):
    """LAION's aesthetic predictor v2: five linear layers on the image's CLIP ViT-L/14 feature of length 1.

    Trained on marks from 1 to 10, and not bounded by them; prompts are not looked at.

    Source: github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    name = "aesthetic"
    Options = AestheticOptions
    requirements = ("clip-vit-large-patch14", "aesthetic-v2")
    weight_options = ("clip_weights", "weights")

    def __init__(self, options: AestheticOptions | None = None):
        super().__init__(options)
        of_clip = replace(self.options, weights=self.options.clip_weights)
        self.encoder = ClipEncoder(of_clip, self.requirements[0])

    @cached_property
    def head(self) -> torch.nn.Sequential:
        """The linear layers, float32."""
        folder = weights_folder(self.options.weights, self.requirements[1])
        return load_head(folder / HEAD, self.encoder.model.config.projection_dim, self.encoder.device)

    @torch.no_grad()
    def _score(self, images: list[Image.Image], prompts: list[str]) -> Float[Tensor, " B"]:
        return self.head(self.encoder.image_features(images)).squeeze(-1)
