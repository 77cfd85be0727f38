"""What goes over the wire between a run and a reward in another process: one JSON object each way.

``docs/rewards.md`` states it for those who write a server of their own. What arrives is checked here, on both sides:
whatever is not exactly what it should be is a :class:`ProtocolError`, and nothing that arrives is ever executed.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from stage_grpo.option_checks import is_number
from stage_grpo.rewards.base import RewardResult
from stage_grpo.rewards.failures import REASON
from stage_grpo.types import Metadata

PROTOCOL = 1


class ProtocolError(ValueError):
    """Something arrived that is not what the protocol says.

    Attributes:
        status: HTTP status that says so.
    """

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """How much one request may hold.

    Attributes:
        max_images: Images.
        max_bytes: Bytes of the whole body.
        max_pixels: Pixels of one image.
        max_prompt: Characters of one prompt.
    """

    max_images: int = 256
    max_bytes: int = 256_000_000
    max_pixels: int = 4096 * 4096
    max_prompt: int = 20_000


def encode_request(images: list[Image.Image], prompts: list[str], metadata: list[Metadata]) -> bytes:
    """The body of a request: images as PNG in base64, prompts, and metadata."""
    content = {
        "protocol": PROTOCOL,
        "images": [_encode_image(image) for image in images],
        "prompts": prompts,
        "metadata": metadata,
    }
    return json.dumps(content).encode()


def decode_request(body: bytes, limits: Limits) -> tuple[list[Image.Image], list[str], list[Metadata]]:
    """Reads and checks the body of a request.

    Args:
        body: The bytes that came.
        limits: How much they may hold.

    Returns:
        RGB images, prompts and metadata, one of each a sample.

    Raises:
        ProtocolError: Anything that is not what it should be, or too much of it.
    """
    if len(body) > limits.max_bytes:
        raise ProtocolError(f"the request has {len(body)} bytes, more than {limits.max_bytes}", 413)
    content = _decode_object(body)
    images, prompts = content.get("images"), content.get("prompts")
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise ProtocolError("'images' must be a list of PNG files in base64")
    if len(images) > limits.max_images:
        raise ProtocolError(f"{len(images)} images are more than {limits.max_images}", 413)
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ProtocolError("'prompts' must be a list of strings")
    if any(len(prompt) > limits.max_prompt for prompt in prompts):
        raise ProtocolError(f"a prompt has more than {limits.max_prompt} characters", 413)
    metadata = content.get("metadata", [{} for _ in prompts])
    if not isinstance(metadata, list) or not all(isinstance(item, dict) for item in metadata):
        raise ProtocolError("'metadata' must be a list of objects")
    if not len(images) == len(prompts) == len(metadata):
        raise ProtocolError(f"{len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata do not pair")
    return [_decode_image(image, index, limits) for index, image in enumerate(images)], prompts, metadata


def encode_response(name: str, result: RewardResult) -> bytes:
    """The body of an answer: scores with null for what could not be scored, the reasons, and further details."""
    reasons = result.details.get(REASON, [None] * len(result.scores))
    content = {
        "protocol": PROTOCOL,
        "reward": name,
        "scores": [None if math.isnan(score) else float(score) for score in result.scores],
        "reasons": [None if reason is None else str(reason) for reason in reasons],
        "details": {key: [_plain(v) for v in values] for key, values in result.details.items() if key != REASON},
    }
    return json.dumps(content, allow_nan=False).encode()


def decode_response(body: bytes, num_images: int) -> RewardResult:
    """Reads and checks the body of an answer.

    Args:
        body: The bytes that came.
        num_images: Images that were sent.

    Returns:
        Scores, NaN for null, and details.

    Raises:
        ProtocolError: Anything that is not what it should be.
    """
    content = _decode_object(body)
    scores = content.get("scores")
    if not isinstance(scores, list) or len(scores) != num_images:
        found = f"{len(scores)} scores" if isinstance(scores, list) else f"{scores!r:.60}"
        raise ProtocolError(f"'scores' must be a list of {num_images} numbers, but is {found}")
    for score in scores:
        if score is not None and not (is_number(score) and math.isfinite(score)):
            raise ProtocolError(f"'scores' holds {score!r:.60}, which is no finite number")
    details = content.get("details") or {}
    if not isinstance(details, dict):
        raise ProtocolError(f"'details' must be an object, but is {details!r:.60}")
    columns = {**details, REASON: content.get("reasons") or [None] * num_images}
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != num_images:
            raise ProtocolError(f"the detail {name!r:.60} must be a list of {num_images} values")
    return RewardResult(np.array([math.nan if s is None else float(s) for s in scores], dtype=np.float64), columns)


def _decode_object(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body, parse_constant=_refuse_constant, parse_int=_as_int)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"this is no JSON ({str(error)[:100]})") from error
    if not isinstance(content, dict):
        raise ProtocolError(f"this is no JSON object but {content!r:.60}")
    if content.get("protocol") != PROTOCOL:
        raise ProtocolError(f"'protocol' is {content.get('protocol')!r:.60}, and {PROTOCOL} is spoken here")
    return content


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is no JSON; write null for a missing score")


def _as_int(digits: str) -> int:
    if math.isinf(float(digits)):
        raise ValueError(f"a number of {len(digits)} digits is too large")
    return int(digits)


def _encode_image(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def _decode_image(text: str, index: int, limits: Limits) -> Image.Image:
    try:
        data = base64.b64decode(text, validate=True)
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            pixels = image.width * image.height  # known from the header, before anything is unpacked
            if pixels > limits.max_pixels:
                raise ProtocolError(f"image {index} has {pixels} pixels, more than {limits.max_pixels}", 413)
            return image.convert("RGB")
    except ProtocolError:
        raise
    except (binascii.Error, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ProtocolError(f"image {index} is no PNG in base64 ({str(error)[:100]})") from error


def _plain(value: Any) -> Any:
    """A detail as JSON: numbers and text as they are, lists and mappings likewise, all else as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)
